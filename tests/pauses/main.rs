//! The pause that a client sees when a server is killed, beside what clients of Redis and of memcached suffer.
//!
//! A client that was connected before asks in a closed loop over TCP; what counts is its longest gap between two right answers, in the tenth
//! of a second from each `kill -9` on (longer if the gap is). Beside it stands the longest of those gaps that began in the first
//! millisecond: the take-over itself. Later ones come of what is done behind the scenes, above all of making the next standby ready.
//! All other connections are idle. As many tenths of a second without a kill tell what the machine adds by itself. Redis (append-only
//! file, rewritten before, so that it loads fast) and memcached are killed with the same signal and started again at once; their
//! client connects again as fast as it can. memcached keeps nothing: its client's gap ends with the answer that the key is gone.
//!
//! ```text
//! cargo run --release -p kvs-harness --bin pauses -- --quick
//! cargo run --release -p kvs-harness --bin pauses -- --csv pauses.csv
//! cargo run --release -p kvs-harness --bin pauses -- --picture report/pauses.svg
//! ```
//!
//! | module | what it is |
//! |---|---|
//! | [`measure`] | one situation after the other |
//! | [`watch`] | the client that notes its longest gaps |
//! | [`speak`] | the three protocols |
//! | [`stores`], [`peers`] | who is started and killed |
//! | [`figures`] | table and CSV |
//! | [`picture`] | latency over time, as SVG |
//! | [`recording`] | a client that says what it sees, for the README |
#![forbid(unsafe_code)]

mod figures;
mod measure;
mod peers;
mod picture;
mod recording;
mod speak;
mod stores;
mod watch;

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use clap::Parser;
use figures::Row;
use kvs_harness::binaries;
use peers::Peer;
use speak::Speak;
use stores::{Kvs, Victim};

/// Measures the pause that a client sees when a server is killed.
#[derive(Parser)]
struct Options {
    /// Few kills, few entries, few connections.
    #[arg(long)]
    quick: bool,
    /// Kills in each situation; the peers get fewer where they take long [default: 100, quick: 10].
    #[arg(long, value_name = "N")]
    kills: Option<usize>,
    /// Numbers of entries [default: 10000,10000000, quick: 10000].
    #[arg(long, value_name = "N", value_delimiter = ',')]
    entries: Vec<u64>,
    /// Numbers of connections [default: 10,1000,10000, quick: 10,1000].
    #[arg(long, value_name = "N", value_delimiter = ',')]
    connections: Vec<usize>,
    /// Only stores whose name contains this: kvs, redis, memcached.
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// Only kills of those whose name contains this: data server, front server, both.
    #[arg(long, value_name = "TEXT", default_value = "")]
    killed: String,
    /// Only with a standby, or only without.
    #[arg(long, value_name = "on|off", value_parser = ["on", "off"])]
    standby: Option<String>,
    /// Every sample goes here.
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Draws latency over time instead, ours and that of Redis.
    #[arg(long, value_name = "FILE")]
    picture: Option<PathBuf>,
    /// Is a client of the store at this address instead, and says every second what it sees.
    #[arg(long, value_name = "ADDRESS")]
    client: Option<SocketAddr>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let done = match (&options.client, &options.picture) {
        (Some(address), _) => recording::run(*address),
        (None, Some(file)) => picture::draw(file, options.entries.first().copied().unwrap_or(1_000_000)),
        (None, None) => measure_all(&options),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pauses: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether `kvs-front` has the option.
fn front_knows(option: &str) -> bool {
    let help = Command::new(binaries::program("kvs-front")).arg("--help").output();
    help.is_ok_and(|help| String::from_utf8_lossy(&help.stdout).contains(option))
}

/// With and without a standby, where there can be one.
fn standbys() -> Vec<Option<bool>> {
    if front_knows("--standby") { vec![Some(true), Some(false)] } else { vec![None] }
}

fn measure_all(options: &Options) -> anyhow::Result<()> {
    let kills = options.kills.unwrap_or(if options.quick { 10 } else { 100 });
    let or = |given: &[u64], quick: &[u64], full: &[u64]| match (given, options.quick) {
        ([], true) => quick.to_vec(),
        ([], false) => full.to_vec(),
        (given, _) => given.to_vec(),
    };
    let connections: Vec<u64> = options.connections.iter().map(|count| *count as u64).collect();
    let connections = or(&connections, &[10, 1_000], &[10, 1_000, 10_000]);
    let mut table = Table::new();
    for entries in or(&options.entries, &[10_000], &[10_000, 10_000_000]) {
        if "kvs".contains(&options.only) {
            measure_ours(&mut table, entries, &connections, kills, options)?;
        }
        for (speak, name, most) in [(Speak::Redis, "redis", 20), (Speak::Memcached, "memcached", 20)] {
            if name.contains(&options.only) {
                let most = if entries > 1_000_000 { 3 } else { most };
                measure_peer(&mut table, speak, name, entries, kills.min(most))?;
            }
        }
    }
    table.write(options)
}

fn measure_ours(
    table: &mut Table,
    entries: u64,
    connections: &[u64],
    kills: usize,
    options: &Options,
) -> anyhow::Result<()> {
    let mut standbys = standbys();
    if let Some(wanted) = &options.standby {
        standbys.retain(|standby| *standby == Some(wanted == "on"));
    }
    for standby in standbys {
        let mut kvs = Kvs::start(standby, entries)?;
        let mut victims = vec![Victim::Data, Victim::Front];
        victims.extend(kvs.has_standby.then_some(Victim::Both));
        victims.retain(|victim| victim.name().contains(&options.killed));
        for victim in victims {
            for connections in connections {
                table.add(measure::ours(&mut kvs, victim, entries, *connections as usize, kills)?);
            }
        }
    }
    Ok(())
}

fn measure_peer(
    table: &mut Table,
    speak: Speak,
    name: &str,
    entries: u64,
    kills: usize,
) -> anyhow::Result<()> {
    if !peers::is_installed(speak) {
        eprintln!("pauses: {name} is not installed, and not measured");
        return Ok(());
    }
    let mut peer = Peer::start(speak, entries)?;
    table.add(measure::peer(&mut peer, name, entries, kills)?);
    Ok(())
}

/// The table, printed as it grows.
struct Table(Vec<Row>);

impl Table {
    fn new() -> Self {
        println!("{}", figures::heading());
        Self(Vec::new())
    }

    fn add(&mut self, row: Row) {
        println!("{}", row.line());
        self.0.push(row);
    }

    fn write(&self, options: &Options) -> anyhow::Result<()> {
        let Some(file) = &options.csv else { return Ok(()) };
        let samples: String = self.0.iter().map(Row::csv).collect();
        fs::write(file, format!("{}{samples}", figures::CSV_HEADING))?;
        Ok(())
    }
}
