//! Text that others wrote (values in the store, names, messages of servers), made fit for a log line, `/state` or an Event.

use crate::terminal::is_plain;

/// The longest foreign text that is shown, in bytes. A sentence with an address or two fits.
pub const LONGEST: usize = 256;

/// Foreign text in one line of at most [`LONGEST`] bytes: control characters, line breaks and characters that change the
/// direction of writing are escaped, and a text that is too long says how long it was.
pub fn foreign_text(text: &str) -> String {
    let mut shown = String::with_capacity(text.len().min(LONGEST + 32));
    for c in text.chars() {
        let escaped: String = if is_plain(c) { c.to_string() } else { c.escape_default().to_string() };
        if shown.len() + escaped.len() > LONGEST {
            shown.push_str(&format!("… ({} bytes)", text.len()));
            return shown;
        }
        shown.push_str(&escaped);
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_text_is_cut_and_control_characters_are_escaped() {
        assert_eq!(foreign_text("vxlan"), "vxlan");
        assert_eq!(foreign_text("a\nb\u{1b}[31m\u{202e}é"), "a\\nb\\u{1b}[31m\\u{202e}é");
        let long = foreign_text(&"é".repeat(100_000));
        assert!(long.len() < LONGEST + 32 && long.ends_with("… (200000 bytes)"), "{long}");
        assert!(foreign_text(&"\0".repeat(1_000)).len() < LONGEST + 32);
    }
}
