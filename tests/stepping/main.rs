//! Proof by exhaustion that a kill is harmless: a mutation is executed one instruction at a time, and whatever a process that
//! is killed there leaves is recovered and checked. `report/kill-at-every-instruction.md` says what is covered and what is not.
//!
//! | module | what it is |
//! |---|---|
//! | [`mutations`] | the table of what is stepped through |
//! | [`store`] | what is in the store before, what is asked for, what must come of it |
//! | [`explore`] | one mutation, instruction by instruction |
//! | [`stage`] | the segments, the children and the files that it needs |
//! | [`recoveries`] | recovery, instruction by instruction |
//! | [`judge`] | the promises, held against one image |
//! | [`agreement`] | which requests have happened: client, connection, backup ring |
//! | [`readers`] | what lock-free readers rely on |
//! | [`image`] | images in this process's memory, and their locks |
//! | [`pages`] | images: copying and comparing |
//! | [`tracee`] | a child that is stepped |
//! | [`work`], [`child`] | what that child does |
//! | [`backup`] | the backup file: what its thread does, and what it must hold |
//! | [`client`] | requests served as a worker serves them |
//! | [`live`] | real servers with connected clients, killed at every instruction of the worker's loop |
//! | [`mutants`] | deliberate faults, each of which must be caught |
#![forbid(unsafe_code)]

mod agreement;
mod backup;
mod child;
mod client;
mod explore;
mod image;
mod judge;
mod live;
mod mutants;
mod mutations;
mod pages;
mod readers;
mod recoveries;
mod stage;
mod store;
mod tracee;
mod violation;
mod work;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use child::Places;
use clap::{Args, Parser, Subcommand};
use explore::{Effort, Tried, explore};
use kvs_harness::random::{self, Random};
use mutations::{MUTATIONS, Mutation};
use violation::Violation;
use work::Work;

/// Steps through mutations of the store, one instruction at a time.
#[derive(Parser)]
struct Options {
    #[command(subcommand)]
    child: Option<Child>,
    #[command(flatten)]
    what: What,
    /// Real servers and clients that stay connected, instead of mutations; with --all or --seconds.
    #[arg(long)]
    live: bool,
    /// Only mutations, or mutants, whose name contains this.
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
}

#[derive(Args)]
#[group(required = false, multiple = false)]
struct What {
    /// Everything: every image, every kill, every recovery.
    #[arg(long)]
    all: bool,
    /// Every image; no kills, and no recovery stepped.
    #[arg(long)]
    images: bool,
    /// Puts each fault of tests/mutants into a copy of the sources, and demands that stepping through that finds it.
    #[arg(long)]
    mutants: bool,
    /// A random part of everything, for so many seconds.
    #[arg(long, value_name = "N")]
    seconds: Option<u64>,
}

#[derive(Subcommand)]
enum Child {
    /// The child that is stepped.
    #[command(hide = true)]
    Perform {
        #[arg(long)]
        work: String,
        #[arg(long)]
        segment: PathBuf,
        #[arg(long)]
        requests: PathBuf,
        #[arg(long)]
        backup: PathBuf,
    },
    /// Tells whether a child can be traced here.
    Try,
    /// A child that does nothing.
    #[command(hide = true)]
    Idle,
    /// The child that is stepped: recovers.
    #[command(hide = true)]
    Recover {
        #[arg(long)]
        segment: PathBuf,
    },
}

fn main() -> ExitCode {
    match run(Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("stepping: {error:#}");
            if error.is::<Violation>() { ExitCode::from(VIOLATION) } else { ExitCode::FAILURE }
        }
    }
}

/// Most real kills of one mutation outside of locks when everything is tried. Only values of many kilobytes have more images than that, most of
/// them of memory that is still free.
const KILLS_MAX: usize = 3000;
/// How the program ends when a promise was broken.
const VIOLATION: u8 = 3;

fn run(options: Options) -> anyhow::Result<()> {
    match options.child {
        Some(Child::Perform { work, segment, requests, backup }) => {
            let work = Work::called(&work).context("no such work")?;
            let places = Places { segment: &segment, requests: &requests, backup: &backup };
            return child::perform(work, &places);
        }
        Some(Child::Recover { segment }) => return child::recover(&segment),
        Some(Child::Idle) => return child::idle(),
        Some(Child::Try) => return tracee::try_it(),
        None => {}
    }
    if options.what.mutants {
        return mutants::try_all(&options.only);
    }
    if options.live {
        return live::run(&options.only, options.what.seconds.map(Duration::from_secs));
    }
    tracee::fix_addresses()?;
    let chosen: Vec<&Mutation> =
        MUTATIONS.iter().filter(|mutation| mutation.name.contains(&options.only)).collect();
    if chosen.is_empty() {
        bail!("no mutation is called {:?}", options.only);
    }
    match options.what {
        What { seconds: Some(seconds), .. } => sample(chosen, Duration::from_secs(seconds)),
        What { images: true, .. } => {
            each(&chosen, Effort { lock_kills_max: 0, kills_max: 0, recoveries: 0, until: None })
        }
        What { .. } => each(
            &chosen,
            Effort { lock_kills_max: usize::MAX, kills_max: KILLS_MAX, recoveries: 1, until: None },
        ),
    }
}

/// Each of the mutations, in order.
fn each(chosen: &[&Mutation], effort: Effort) -> anyhow::Result<()> {
    let (mut random, mut total, began) = (Random::new(1), Tried::default(), Instant::now());
    heading();
    for mutation in chosen {
        let start = Instant::now();
        let tried = explore(mutation, effort, &mut random).with_context(|| mutation.name)?;
        row(mutation.name, &tried, start.elapsed());
        total = total.plus(tried);
    }
    row("all", &total, began.elapsed());
    Ok(())
}

/// Mutations in random order until the time is over, of each a random part.
fn sample(mut chosen: Vec<&Mutation>, time: Duration) -> anyhow::Result<()> {
    let (mut random, mut total, began) = (Random::new(random::seed()), Tried::default(), Instant::now());
    let until = began + time;
    heading();
    while !chosen.is_empty() && Instant::now() < until {
        let mutation = chosen.swap_remove(random.below(chosen.len() as u64) as usize);
        let (start, effort) =
            (Instant::now(), Effort { lock_kills_max: 5, kills_max: 5, recoveries: 20, until: Some(until) });
        let tried = explore(mutation, effort, &mut random).with_context(|| mutation.name)?;
        row(mutation.name, &tried, start.elapsed());
        total = total.plus(tried);
    }
    row("all", &total, began.elapsed());
    Ok(())
}

fn heading() {
    println!(
        "| mutation | points | images | kinds | points of recovery | images of recovery | kills | in lock or unlock | locks left held | other image | walked | seconds |"
    );
    println!("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|");
}

fn row(name: &str, tried: &Tried, took: Duration) {
    let Tried {
        points,
        images,
        kinds,
        recovery_points,
        recovery_images,
        kills,
        lock_kills,
        held,
        other,
        walked,
    } = tried;
    println!(
        "| {name} | {points} | {images} | {kinds} | {recovery_points} | {recovery_images} | {kills} | {lock_kills} | {held} | {other} | {walked} | {:.1} |",
        took.as_secs_f64()
    );
}
