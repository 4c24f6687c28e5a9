//! A run as a folder that says all that is needed to repeat and to doubt it.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::Context as _;
use kvs_core::instance::format_duration;
use serde_json::Value;

use super::machine::Facts;
use super::{csv, picture, table};
use crate::bench::run::Run;

/// Makes the folder, so that a run isn't lost at its end because it can't be kept.
///
/// # Errors
/// It is there already, or can't be made.
pub fn prepare(directory: &Path) -> anyhow::Result<()> {
    if let Some(parent) = directory.parent() {
        fs::create_dir_all(parent).with_context(|| format!("can't make {}", parent.display()))?;
    }
    let made = fs::create_dir(directory);
    made.with_context(|| format!("can't make {}; a run is kept in a new folder", directory.display()))
}

/// Writes the run into it.
///
/// # Errors
/// The disk is full, or the like.
pub fn write(directory: &Path, run: &Run, facts: &Facts, document: &Value) -> anyhow::Result<()> {
    let files = [
        ("command.txt", format!("{}\n", run.command)),
        ("machine.txt", Facts::lines(&facts.machine)),
        ("versions.txt", Facts::lines(&facts.versions)),
        ("results.json", format!("{document:#}\n")),
        ("rounds.csv", csv::rounds(run)),
        ("latency.csv", csv::latencies(run)),
        ("latency.svg", picture::svg(run)),
        ("README.md", page(run, facts)),
    ];
    for (name, text) in files {
        let path = directory.join(name);
        fs::write(&path, text).with_context(|| format!("can't write {}", path.display()))?;
    }
    Ok(())
}

fn page(run: &Run, facts: &Facts) -> String {
    let known =
        |name: &str| facts.machine.iter().find(|(known, _)| *known == name).map_or("?", |(_, text)| text);
    let mut text = format!("# Benchmark run\n\n```sh\n{}\n```\n\n", run.command);
    _ = writeln!(
        text,
        "{} rounds of {} each, after {} of warm-up, on {} ({} cores, kernel {}). Figures are medians of the rounds; ratios are \
         medians of the rounds' ratios; latencies are of all rounds together.\n",
        run.rounds,
        format_duration(run.duration),
        format_duration(run.warm_up),
        known("processor"),
        known("cores"),
        known("kernel")
    );
    for measured in &run.cases {
        text.push_str(&table::markdown(measured));
        text.push('\n');
    }
    text.push_str("![Latencies](latency.svg)\n\n");
    text.push_str(
        "`machine.txt` and `versions.txt` say what it ran on, `rounds.csv` and `latency.csv` are the raw data, and `results.json` has \
         all of it.\n",
    );
    text
}
