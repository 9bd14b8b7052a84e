//! What is generated from the definition of the command line: completions for shells, and the man page.

use std::io::Write;

use anyhow::Context;
use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::cli::Cli;

/// Arguments of `flanneld completions`.
#[derive(Debug, Args)]
pub(crate) struct CompletionsArgs {
    /// The shell
    #[arg(value_name = "SHELL")]
    shell: Shell,
}

/// Prints a completion script.
pub(crate) fn completions(args: &CompletionsArgs) -> anyhow::Result<()> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "flanneld", &mut text);
    print(&text)
}

/// Prints the man page, flanneld(8): the daemon, its flags and the list of commands.
pub(crate) fn man() -> anyhow::Result<()> {
    print(&page()?)
}

fn page() -> anyhow::Result<Vec<u8>> {
    let command = Cli::command().disable_help_subcommand(true);
    let examples = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    let (page, mut text) = (clap_mangen::Man::new(command).section("8").manual("flannel"), Vec::new());
    page.render_title(&mut text)?;
    page.render_name_section(&mut text)?;
    // A synopsis of forty flags helps no reader.
    text.extend(b".SH SYNOPSIS\n\\fBflanneld\\fR [\\fIOPTIONS\\fR]\n.br\n\\fBflanneld\\fR \\fICOMMAND\\fR [\\fIOPTIONS\\fR]\n");
    page.render_description_section(&mut text)?;
    page.render_options_section(&mut text)?;
    page.render_subcommands_section(&mut text)?;
    text.extend(verbatim("NOTES", &examples).into_bytes());
    Ok(text)
}

/// A section whose lines stay as they are.
fn verbatim(title: &str, text: &str) -> String {
    let lines = text.lines().map(|line| line.replace('\\', "\\e").replace('-', "\\-").replace('\'', "\\(aq"));
    // A line that begins with a dot would be an instruction.
    let lines: Vec<String> = lines.map(|line| if line.starts_with('.') { format!("\\&{line}") } else { line }).collect();
    format!(".SH {title}\n.nf\n{}\n.fi\n", lines.join("\n"))
}

fn print(text: &[u8]) -> anyhow::Result<()> {
    match std::io::stdout().lock().write_all(text) {
        // The reader has what it wants (`flanneld man | head`).
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("cannot write to standard output"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn completions_know_flags_and_commands() {
        for shell in [Shell::Bash, Shell::Fish, Shell::Zsh] {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "flanneld", &mut text);
            let text = String::from_utf8(text).unwrap();
            for word in ["etcd-endpoints", "install-cni", "docker-opts"] {
                assert!(text.contains(word), "{shell}: {word} is missing");
            }
        }
    }

    #[test]
    fn verbatim_lines_are_no_instructions() {
        assert_eq!(verbatim("NOTES", ".x\n a-b 'c' \\"), ".SH NOTES\n.nf\n\\&.x\n a\\-b \\(aqc\\(aq \\e\n.fi\n");
    }

    #[test]
    fn man_page_has_every_visible_flag_and_command() {
        let text = String::from_utf8(page().unwrap()).unwrap().replace("\\-", "-");
        assert!(text.contains(".TH flanneld 8") || text.contains(".TH \"flanneld\" \"8\""), "{text}");
        let command = Cli::command();
        let flags = command.get_arguments().filter(|flag| !flag.is_hide_set()).filter_map(|flag| flag.get_long());
        for flag in flags {
            assert!(text.contains(&format!("--{flag}")), "--{flag} is missing");
        }
        for command in command.get_subcommands().filter(|command| !command.is_hide_set()) {
            assert!(text.contains(command.get_name()), "{} is missing", command.get_name());
        }
    }
}
