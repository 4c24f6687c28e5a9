//! The command-line tool: everything an operator or a script needs.
//!
//! | module | what it is |
//! |---|---|
//! | [`cli`] | the command line: options, commands, help; completions and the manual come from the same definition |
//! | [`target`] | which store is meant, and how to reach it |
//! | [`operator`] | the operator's socket of a store: commands, and its orderly end |
//! | [`output`] | what commands say: text, JSON, and one line for an error |
//! | [`columns`] | tables of text |
//! | [`figures`] | numbers, sizes and durations for people |
//! | [`record`] | an entry as a line of JSON |
//! | [`progress`] | the progress bar |
//! | [`bench`] | the load generator and comparison |
//! | the others | one command each, by its name |
//!
//! Exit status: 0 done, 1 failed, 2 the answer is no, 64 wrong usage. Whoever stops reading standard output early has what it
//! wanted: that is no failure.
#![deny(unsafe_code)]

mod bench;
mod check;
mod check_backup;
mod cli;
mod columns;
mod completions;
mod console;
mod del;
mod export;
mod figures;
mod get;
mod import;
mod incr;
mod inspect;
mod list;
mod man;
mod operator;
mod output;
mod progress;
mod purge;
mod quit;
mod record;
mod restart;
mod salvage;
mod set;
mod stats;
mod target;

use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Command};
use output::{Format, Outcome};
use target::Target;

/// Exit status: the answer is no.
const EXIT_NO: u8 = 2;
/// Exit status of wrong usage.
const EXIT_USAGE: u8 = 64;

fn main() -> ExitCode {
    let result = match bench::part() {
        Some(part) => part.map_err(anyhow::Error::from).and_then(|part| bench::run_part(&part)),
        None => Cli::try_parse().map_err(anyhow::Error::from).and_then(run),
    };
    match result {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::No) => EXIT_NO.into(),
        Err(error) => report(&error),
    }
}

fn run(cli: Cli) -> anyhow::Result<Outcome> {
    let format = if cli.json { Format::Json } else { Format::Text };
    let target = || Target::from_options(cli.target.clone());
    match cli.command {
        Command::Get { key } => get::run(&target()?, format, &key),
        Command::Set { key, value, if_absent } => set::run(&target()?, format, &key, &value, if_absent),
        Command::Del { keys } => del::run(&target()?, format, &keys),
        Command::Incr { key, by } => incr::run(&target()?, format, &key, by),
        Command::List { prefix } => list::run(&target()?, format, &prefix),
        Command::Stats => stats::run(&target()?, format),
        Command::Inspect(what) => inspect::run(&target()?, format, &what),
        Command::Check { backup: None, .. } => check::run(&target()?, format),
        Command::Check { backup: Some(backup), salvage: None } => check_backup::run(&backup, format),
        Command::Check { backup: Some(backup), salvage: Some(to) } => salvage::run(&backup, &to, format),
        Command::Export { file } => export::run(&target()?, format, &file),
        Command::Import { file } => import::run(&target()?, format, &file),
        Command::Console { command } => console::run(&target()?, format, &command),
        Command::Restart { which } => restart::run(&target()?, format, which),
        Command::Quit => quit::run(&target()?, format),
        Command::Purge => purge::run(&target()?, format),
        Command::Bench(options) => bench::run(&cli.target, format, &options),
        Command::Completions { shell } => completions::run(format, shell),
        Command::Man { directory } => man::run(format, directory.as_deref()),
    }
}

/// Tells what went wrong, and gives the exit status that says so.
fn report(error: &anyhow::Error) -> ExitCode {
    if let Some(usage) = error.downcast_ref::<clap::Error>() {
        // Help and version come this way too. Nobody is left to be told when this fails.
        let _ = usage.print();
        return if usage.use_stderr() { EXIT_USAGE.into() } else { ExitCode::SUCCESS };
    }
    if error.is::<output::NobodyReads>() {
        return ExitCode::SUCCESS;
    }
    output::complain(&format!("{error:#}"));
    ExitCode::FAILURE
}
