//! `completions`: a script that teaches a shell this command line.

use clap::CommandFactory as _;
use clap_complete::Shell;
use serde_json::json;

use crate::cli::Cli;
use crate::output::{self, Format, Outcome};

/// Prints the script for `shell`.
pub fn run(format: Format, shell: Shell) -> anyhow::Result<Outcome> {
    let mut command = Cli::command();
    let name = command.get_name().to_owned();
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, name, &mut script);
    match format {
        Format::Text => output::print(&script)?,
        Format::Json => {
            let script = String::from_utf8_lossy(&script);
            output::print_json(&json!({"shell": shell.to_string(), "script": script}))?;
        }
    }
    Ok(Outcome::Done)
}
