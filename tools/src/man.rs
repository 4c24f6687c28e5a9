//! `man`: manual pages from the definition of the command line.

use std::path::Path;

use anyhow::Context as _;
use clap::CommandFactory as _;
use clap_mangen::Man;
use serde_json::json;

use crate::cli::Cli;
use crate::output::{self, Format, Outcome};

/// Writes all pages into `directory`, or prints the main one.
pub fn run(format: Format, directory: Option<&Path>) -> anyhow::Result<Outcome> {
    let command = Cli::command();
    let Some(directory) = directory else {
        let mut page = Vec::new();
        Man::new(command).render(&mut page).context("can't make the manual page")?;
        match format {
            Format::Text => output::print(&page)?,
            Format::Json => output::print_json(&json!({"page": String::from_utf8_lossy(&page)}))?,
        }
        return Ok(Outcome::Done);
    };
    let names: Vec<String> = std::iter::once(format!("{}.1", command.get_name()))
        .chain(command.get_subcommands().map(|one| format!("{}-{}.1", command.get_name(), one.get_name())))
        .collect();
    std::fs::create_dir_all(directory)
        .and_then(|()| clap_mangen::generate_to(command, directory))
        .with_context(|| format!("can't write manual pages to {}", directory.display()))?;
    match format {
        Format::Text => output::print_line(format_args!("{} pages in {}", names.len(), directory.display()))?,
        Format::Json => {
            output::print_json(&json!({"directory": directory.to_string_lossy(), "pages": names}))?
        }
    }
    Ok(Outcome::Done)
}
