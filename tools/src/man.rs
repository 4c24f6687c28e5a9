//! `man`: manual pages from the definition of the command line.

use std::path::Path;

use anyhow::Context as _;
use clap::{Command, CommandFactory as _};
use clap_mangen::Man;
use serde_json::json;

use crate::cli::Cli;
use crate::output::{self, Format, Outcome};

/// Writes all pages into `directory`, or prints the main one.
pub fn run(format: Format, directory: Option<&Path>) -> anyhow::Result<Outcome> {
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    let Some(directory) = directory else {
        let (_, text) = page(&command)?;
        match format {
            Format::Text => output::print(text.as_bytes())?,
            Format::Json => output::print_json(&json!({"page": text}))?,
        }
        return Ok(Outcome::Done);
    };
    let pages: Vec<(String, String)> =
        std::iter::once(&command).chain(command.get_subcommands()).map(page).collect::<Result<_, _>>()?;
    write_all(directory, &pages)
        .with_context(|| format!("can't write manual pages to {}", directory.display()))?;
    let names: Vec<&str> = pages.iter().map(|(name, _)| name.as_str()).collect();
    match format {
        Format::Text => output::print_line(format_args!("{} pages in {}", names.len(), directory.display()))?,
        Format::Json => {
            output::print_json(&json!({"directory": directory.to_string_lossy(), "pages": names}))?
        }
    }
    Ok(Outcome::Done)
}

/// Name of the file, and the text.
fn page(command: &Command) -> anyhow::Result<(String, String)> {
    let manual = Man::new(command.clone());
    let mut page = Vec::new();
    manual.render(&mut page).context("can't make the manual page")?;
    let mut text = String::from_utf8(page).context("can't make the manual page")?;
    // What comes after the help is examples, so the section is called that.
    for title in ["Example:", "Examples:"] {
        text = text.replace(&format!(".SH EXTRA\n{title}\n"), ".SH EXAMPLES\n");
    }
    Ok((manual.get_filename(), text))
}

fn write_all(directory: &Path, pages: &[(String, String)]) -> std::io::Result<()> {
    std::fs::create_dir_all(directory)?;
    pages.iter().try_for_each(|(name, text)| std::fs::write(directory.join(name), text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn man_pages_have_their_examples_under_that_name() {
        let mut command = Cli::command();
        command.build();
        let (name, text) = page(&command).expect("a page");
        assert_eq!(name, "kvs-tools.1");
        assert!(text.contains(".SH EXAMPLES\n  kvs\\-tools set") && !text.contains(".SH EXTRA"), "{text}");
    }
}
