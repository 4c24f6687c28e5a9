//! `bench`: the same load for kvs and its peers, side by side in one run.
//!
//! | module | what it is |
//! |---|---|
//! | [`options`] | the command line |
//! | [`scenario`] | the canonical cases: load, targets, promises |
//! | [`workload`], [`zipf`] | which keys and values, from seeds |
//! | [`target`] | what can be measured |
//! | [`stores`], [`servers`] | targets over sockets, and the servers that are started for them |
//! | [`network`] | the load generator |
//! | [`null_server`] | the ceiling: a server without a table |
//! | [`in_process`] | targets without a socket |
//! | [`rounds`] | all targets in turn, again and again |
//! | [`results`] | medians, spread, ratios |
//! | [`claim`] | promises, and whether they were kept |
//! | [`run`], [`show`] | what was found, as text, JSON, CSV, picture, folder |

mod claim;
mod in_process;
mod network;
mod null_server;
mod options;
mod results;
mod rounds;
mod run;
mod scenario;
mod servers;
mod show;
mod stores;
mod target;
mod workload;
mod zipf;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use clap::Parser;
use clap::error::ErrorKind;
use serde_json::json;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

pub use options::BenchOptions;
use run::{Measured, Run};
use scenario::{Case, Kind, Scenario};
use show::machine::Facts;
use show::{csv, folder, json as as_json, picture, table};
use stores::Settings;
use target::{Interrupted, Ready, Span};

use crate::cli::TargetOptions;
use crate::figures;
use crate::output::{self, Format, Outcome};
use crate::progress::Progress;
use crate::target::usage;

/// Parts of `bench` that are processes of their own. They are no commands for users: no help, completion or manual page has them.
#[derive(Debug, Parser)]
pub enum Part {
    /// The null server of a benchmark
    #[command(name = NULL_SERVER)]
    NullServer {
        /// Its threads
        workers: usize,
        /// Its unix socket
        unix: PathBuf,
    },
    /// A server that ends with the benchmark
    #[command(name = CHILD)]
    Child {
        /// The benchmark
        parent: u32,
        /// The server
        program: OsString,
        /// Its arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
}

/// What the null server is called on the command line.
pub const NULL_SERVER: &str = "bench-null-server";
/// What a server's first moments are called there.
pub const CHILD: &str = "bench-child";

/// The part that the command line asks for, if it does.
pub fn part() -> Option<Result<Part, clap::Error>> {
    let wanted = std::env::args_os().nth(1)?;
    (wanted == NULL_SERVER || wanted == CHILD).then(Part::try_parse)
}

/// Is a part.
pub fn run_part(part: &Part) -> anyhow::Result<Outcome> {
    match part {
        Part::NullServer { workers, unix } => null_server::run(*workers, unix)?,
        Part::Child { parent, program, arguments } => {
            servers::child::exec_below(*parent, program, arguments)?
        }
    }
    Ok(Outcome::Done)
}

/// Measures, and shows what was found.
pub fn run(store: &TargetOptions, format: Format, options: &BenchOptions) -> anyhow::Result<Outcome> {
    if options.list_scenarios {
        return list(format);
    }
    let settings = settings(store, options)?;
    let cases = cases(options)?;
    if let Some(directory) = &options.output {
        folder::prepare(directory)?;
    }
    let facts = Facts::gather();
    let run = measure(cases, options, &settings, format)?;
    let document = as_json::document(&run, &facts);
    if format == Format::Json {
        output::print_json(&document)?;
    }
    if let Some(path) = &options.csv {
        std::fs::write(path, csv::rounds(&run)).with_context(|| format!("can't write {}", path.display()))?;
    }
    if let Some(path) = &options.picture {
        std::fs::write(path, picture::svg(&run))
            .with_context(|| format!("can't write {}", path.display()))?;
    }
    if let Some(directory) = &options.output {
        folder::write(directory, &run, &facts, &document)?;
    }
    Ok(Outcome::Done)
}

/// What the options say about servers; from here on, Ctrl-C ends them.
fn settings(store: &TargetOptions, options: &BenchOptions) -> anyhow::Result<Settings> {
    if store.name.is_some() {
        let message = "bench starts stores of its own; for one that runs give --server or --unix";
        return Err(usage(ErrorKind::ArgumentConflict, message).into());
    }
    let interrupted = Interrupted::default();
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, interrupted.flag()).context("can't watch for signals")?;
    }
    Ok(Settings {
        running_tcp: store.server.clone(),
        running_unix: store.unix.clone(),
        workers: options.workers.map(|workers| workers as usize),
        durability: options.durability.clone(),
        interrupted,
    })
}

/// The cases of the scenarios that are wanted, as the options change them.
fn cases(options: &BenchOptions) -> Result<Vec<Case>, clap::Error> {
    let mut cases = Vec::new();
    for name in &options.scenario {
        let wanted: Vec<Scenario> =
            scenario::all().filter(|scenario| name == "all" || scenario.name == name).collect();
        if wanted.is_empty() {
            return Err(wrong(&format!(
                "there is no scenario `{name}`; --list-scenarios tells which there are"
            )));
        }
        cases.extend(wanted.into_iter().flat_map(|scenario| (scenario.cases)()));
    }
    let knows = |name: &String| cases.iter().any(|case| case.targets.contains(&name.as_str()));
    if let Some(name) = options.targets.iter().find(|name| !knows(name)) {
        return Err(wrong(&format!(
            "there is no target `{name}` in that; --list-scenarios tells which there are"
        )));
    }
    cases.iter_mut().for_each(|case| options.change(case));
    cases.retain(|case| !case.targets.is_empty());
    Ok(cases)
}

fn wrong(message: &str) -> clap::Error {
    usage(ErrorKind::InvalidValue, message)
}

/// Measures one case after the other; as text, each is shown as soon as it is known.
fn measure(
    cases: Vec<Case>,
    options: &BenchOptions,
    settings: &Settings,
    format: Format,
) -> anyhow::Result<Run> {
    let begun = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let steps = cases.iter().map(|case| case.targets.len() * options.round_count()).sum::<usize>() as u64;
    let (mut progress, mut measured, mut done) = (Progress::steps(steps), Vec::new(), 0);
    for case in cases {
        done += (case.targets.len() * options.round_count()) as u64;
        let found = measure_case(case, options, settings, &progress)?;
        if format == Format::Text {
            // The bar would be in the way.
            drop(progress);
            let gap = if measured.is_empty() { "" } else { "\n" };
            output::print(format!("{gap}{}", table::text(&found)).as_bytes())?;
            progress = Progress::steps(steps);
        }
        progress.set(done);
        measured.push(found);
    }
    Ok(Run {
        command: command(),
        begun,
        rounds: options.round_count(),
        duration: options.duration(),
        warm_up: options.warm_up(),
        cases: measured,
    })
}

fn measure_case(
    case: Case,
    options: &BenchOptions,
    settings: &Settings,
    progress: &Progress,
) -> anyhow::Result<Measured> {
    let name = &case.name;
    let Ready { mut targets, missing } = ready(&case, settings, progress).with_context(|| name.clone())?;
    let (warm_up, duration) = (options.warm_up(), options.duration());
    let span = Span { warm_up, duration, interrupted: settings.interrupted.clone() };
    let told = |target: &str, round: usize| {
        progress.say(format!("{name}: {target}, round {} of {}", round + 1, options.round_count()));
        progress.step();
    };
    let series =
        rounds::measure(&mut targets, options.round_count(), &span, &told).with_context(|| name.clone())?;
    let verdicts = case.claims.iter().map(|claim| claim.judge(&series)).collect();
    Ok(Measured { case, series, verdicts, missing })
}

/// The targets of a case.
fn ready(case: &Case, settings: &Settings, progress: &Progress) -> anyhow::Result<Ready> {
    if case.kind == Kind::Network {
        let told = |target: &str, keys: u64| {
            let keys = figures::counted(keys, "key", "keys");
            progress.say(format!("{}: {target} stores {keys}", case.name));
        };
        return stores::ready(case, settings, &told);
    }
    progress.say(format!("{}: getting ready", case.name));
    in_process::ready(case, settings)
}

/// The command line as it was given, for a shell.
fn command() -> String {
    let quoted = |argument: OsString| {
        let text = argument.to_string_lossy().into_owned();
        let plain = |letter: char| letter.is_ascii_alphanumeric() || "-_=./,:%+@".contains(letter);
        if !text.is_empty() && text.chars().all(plain) {
            text
        } else {
            format!("'{}'", text.replace('\'', "'\\''"))
        }
    };
    let arguments: Vec<String> = std::env::args_os().skip(1).map(quoted).collect();
    format!("kvs-tools {}", arguments.join(" "))
}

/// Shows the scenarios.
fn list(format: Format) -> anyhow::Result<Outcome> {
    if format == Format::Json {
        let scenario = |scenario: Scenario| json!({ "name": scenario.name, "about": scenario.about });
        output::print_json(&scenario::all().map(scenario).collect())?;
        return Ok(Outcome::Done);
    }
    for scenario in scenario::all() {
        output::print_line(format_args!("{}: {}", scenario.name, scenario.about))?;
        for case in (scenario.cases)() {
            output::print_line(format_args!("  {}: {}", case.name, case.targets.join(", ")))?;
            for claim in &case.claims {
                output::print_line(format_args!("    {claim}"))?;
            }
        }
    }
    Ok(Outcome::Done)
}
