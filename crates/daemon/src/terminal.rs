//! What a terminal may be sent: text without control characters, in its width, coloured if it is one.

use std::env;
use std::io::{IsTerminal, stdout};

use serde_json::Value;

/// The form of a text for standard output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Style {
    /// Whether it is coloured.
    pub color: bool,
    /// The width in columns; `None`: as wide as it is.
    pub width: Option<usize>,
}

/// Narrower terminals than this get lines of this width.
const NARROWEST: usize = 40;

impl Style {
    /// Plain text of any width.
    pub const PLAIN: Style = Style { color: false, width: None };

    /// What standard output is. `NO_COLOR` switches colours off (no-color.org).
    pub fn of_stdout() -> Style {
        if !stdout().is_terminal() {
            return Style::PLAIN;
        }
        let is_dumb = env::var("TERM").is_ok_and(|term| term == "dumb");
        let color = env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()) && !is_dumb;
        let width = rustix::termios::tcgetwinsize(stdout()).ok().map(|size| usize::from(size.ws_col)).filter(|width| *width > 0);
        Style { color, width: width.map(|width| width.max(NARROWEST)) }
    }

    /// A text in a colour.
    pub fn paint(self, color: Color, text: &str) -> String {
        if self.color { format!("\x1b[{}m{text}\x1b[0m", color as u8) } else { text.to_owned() }
    }
}

/// A colour, by its number for terminals.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Color {
    /// Wrong.
    Red = 31,
    /// Well.
    Green = 32,
    /// Doubtful.
    Yellow = 33,
}

/// Whether a terminal may be sent this character as it is: no control character, and none that changes the direction of writing.
pub(crate) fn is_plain(c: char) -> bool {
    !c.is_control() && !matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

/// A text in one line that a terminal may be sent: other characters are escaped.
pub fn clean(text: &str) -> String {
    if text.chars().all(is_plain) {
        return text.to_owned();
    }
    text.chars().map(|c| if is_plain(c) { c.to_string() } else { c.escape_default().to_string() }).collect()
}

/// A document whose texts are all [`clean`].
pub fn cleaned(value: Value) -> Value {
    match value {
        Value::String(text) => Value::String(clean(&text)),
        Value::Array(list) => Value::Array(list.into_iter().map(cleaned).collect()),
        Value::Object(map) => Value::Object(map.into_iter().map(|(name, value)| (clean(&name), cleaned(value))).collect()),
        other => other,
    }
}

/// Columns of a text that is clean. Characters of double width are not counted as such.
pub fn columns(text: &str) -> usize {
    text.chars().count()
}

/// A text in lines of a width, broken between words, the lines after the first one indented.
pub fn wrap(text: &str, width: Option<usize>, indent: usize) -> String {
    let Some(width) = width else { return text.to_owned() };
    let (mut lines, mut line, mut is_start) = (String::new(), String::new(), true);
    for word in text.split(' ') {
        if columns(&line) + 1 + columns(word) > width && !line.trim().is_empty() {
            lines.push_str(line.trim_end());
            lines.push('\n');
            line = " ".repeat(indent);
            is_start = true;
        }
        if is_start && word.is_empty() && !lines.is_empty() {
            continue;
        }
        if !is_start {
            line.push(' ');
        }
        line.push_str(word);
        is_start = false;
    }
    lines + &line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_text_has_no_control_characters() {
        assert_eq!(clean("vxlan – ✗"), "vxlan – ✗");
        assert_eq!(clean("a\n\u{1b}]0;x\u{7}\u{9b}31m\u{202e}b"), "a\\n\\u{1b}]0;x\\u{7}\\u{9b}31m\\u{202e}b");
        let value = cleaned(serde_json::json!({ "a\u{1b}": ["\u{1b}[2J", 1, { "b": "\r" }] }));
        assert_eq!(value.to_string(), r#"{"a\\u{1b}":["\\u{1b}[2J",1,{"b":"\\r"}]}"#);
    }

    #[test]
    fn long_lines_are_broken_between_words() {
        assert_eq!(wrap("one two three four", Some(9), 2), "one two\n  three\n  four");
        assert_eq!(wrap("  one two", Some(80), 2), "  one two");
        assert_eq!(wrap("averyveryverylongword x", Some(9), 2), "averyveryverylongword\n  x");
        assert_eq!(wrap("one two three four", None, 2), "one two three four");
    }
}
