//! The command line of `bench`.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::Args;
use kvs_core::instance::{ByteSize, parse_duration};
use kvs_core::limits::{KEY_BYTES_MAX, VALUE_BYTES_MAX_DEFAULT};

use super::scenario::{Case, Kind};
use super::workload::{Distribution, KEY_BYTES_MIN, KEYS_MAX};

/// Exponent of a zipfian distribution that isn't told another.
const ZIPF_EXPONENT: f64 = 0.99;
/// The most keys of a quick run.
const QUICK_KEYS_MAX: u64 = 100_000;

/// What to measure, how, and what to write about it.
#[derive(Debug, Clone, Args)]
pub struct BenchOptions {
    /// Canonical scenarios to measure, separated by commas, or `all`
    ///
    /// --list-scenarios tells which there are. Options below change parts of them; the promises are then held against
    /// something else than they were made for.
    #[arg(long, value_name = "NAME", default_value = "tcp", value_delimiter = ',', help_heading = "What")]
    pub scenario: Vec<String>,

    /// List the scenarios, their targets and promises, and do nothing else
    #[arg(long, help_heading = "What")]
    pub list_scenarios: bool,

    /// Only these targets of the scenarios, separated by commas, such as kvs-tcp,null-tcp
    #[arg(long, value_name = "NAMES", value_delimiter = ',', help_heading = "What")]
    pub targets: Vec<String>,

    /// Short rounds and at most 100,000 keys: to see whether it works, not for figures
    #[arg(long, help_heading = "What")]
    pub quick: bool,

    /// Connections, 1 to 60000
    #[arg(long, value_name = "N", help_heading = "Load", value_parser = clap::value_parser!(u32).range(1..=60_000))]
    pub connections: Option<u32>,

    /// Requests sent on a connection before their answers are waited for, 1 to 10000
    #[arg(long, value_name = "N", help_heading = "Load", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub pipeline: Option<u32>,

    /// Threads that ask, 1 to 64 [default: 2, or fewer cores]
    #[arg(long, value_name = "N", help_heading = "Load", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub threads: Option<u32>,

    /// Requests a second, at fixed times (open loop) [default: as fast as answers come (closed loop)]
    ///
    /// A request that can't be sent in its time counts from that time on, so that a server's pause shows in the latency of all
    /// requests it delayed.
    #[arg(long, value_name = "PER_SECOND", help_heading = "Load", value_parser = clap::value_parser!(u32).range(1..=100_000_000))]
    pub rate: Option<u32>,

    /// Number of keys; all are stored before anything is measured
    #[arg(long, value_name = "N", help_heading = "Load", value_parser = clap::value_parser!(u64).range(1..=KEYS_MAX))]
    pub keys: Option<u64>,

    /// Bytes of a key, 10 to 65535
    #[arg(long, value_name = "N", help_heading = "Load",
        value_parser = clap::value_parser!(u32).range(KEY_BYTES_MIN as i64..=KEY_BYTES_MAX as i64))]
    pub key_bytes: Option<u32>,

    /// Size of a value, such as 32, 1KiB or 64KiB, up to 16MiB
    #[arg(long, value_name = "SIZE", help_heading = "Load", value_parser = parse_value_bytes)]
    pub value_bytes: Option<usize>,

    /// Part of the requests that read, 0 to 1; the others store
    #[arg(long, value_name = "SHARE", help_heading = "Load", value_parser = parse_share)]
    pub read_share: Option<f64>,

    /// How often which key is asked for: uniform, zipfian (0.99) or zipfian=EXPONENT
    #[arg(long, value_name = "HOW", help_heading = "Load")]
    pub distribution: Option<Distribution>,

    /// Where randomness begins; the same seed asks the same
    #[arg(long, value_name = "N", help_heading = "Load")]
    pub seed: Option<u64>,

    /// Rounds, in each of which every target is measured once [default: 5]
    #[arg(long, value_name = "N", help_heading = "Measuring", value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pub rounds: Option<u32>,

    /// Time measured of a target in a round, such as 3s or 100ms [default: 3s]
    #[arg(long, value_name = "DURATION", help_heading = "Measuring", value_parser = parse_span)]
    pub duration: Option<Duration>,

    /// Time before that in which nothing counts [default: 500ms]
    #[arg(long, value_name = "DURATION", help_heading = "Measuring", value_parser = parse_span)]
    pub warm_up: Option<Duration>,

    /// Worker threads of kvs, of the null server and of memcached [default: number of cores]
    #[arg(long, value_name = "N", help_heading = "Servers", value_parser = clap::value_parser!(u32).range(1..=62))]
    pub workers: Option<u32>,

    /// --durability of kvs, another than the scenario says
    #[arg(long, value_name = "MODE", help_heading = "Servers")]
    pub durability: Option<String>,

    /// Write each round's figure to a file
    #[arg(long, value_name = "FILE", help_heading = "Results")]
    pub csv: Option<PathBuf>,

    /// Draw the latencies as SVG
    #[arg(long, value_name = "FILE", help_heading = "Results")]
    pub picture: Option<PathBuf>,

    /// Keep the run as a new folder: command, machine, versions, results, raw data, picture, and a page about it
    #[arg(long, value_name = "DIR", help_heading = "Results")]
    pub output: Option<PathBuf>,
}

impl BenchOptions {
    /// Rounds to measure.
    pub fn round_count(&self) -> usize {
        self.rounds.map_or(if self.quick { 3 } else { 5 }, |rounds| rounds as usize)
    }

    /// Time that counts in a round.
    pub fn duration(&self) -> Duration {
        self.duration.unwrap_or(Duration::from_millis(if self.quick { 300 } else { 3_000 }))
    }

    /// Time before it.
    pub fn warm_up(&self) -> Duration {
        self.warm_up.unwrap_or(Duration::from_millis(if self.quick { 100 } else { 500 }))
    }

    /// The case as the options want it. It may have no target left.
    pub fn change(&self, case: &mut Case) {
        let (workload, load) = (&mut case.workload, &mut case.load);
        if self.quick {
            workload.keys = workload.keys.min(QUICK_KEYS_MAX);
        }
        set(&mut workload.keys, self.keys);
        set(&mut workload.key_bytes, self.key_bytes.map(|bytes| bytes as usize));
        set(&mut workload.value_bytes, self.value_bytes);
        set(&mut workload.read_share, self.read_share);
        set(&mut workload.distribution, self.distribution);
        set(&mut workload.seed, self.seed);
        set(&mut load.connections, self.connections.map(|count| count as usize));
        set(&mut load.pipeline, self.pipeline.map(|count| count as usize));
        load.threads = self.threads.map(|count| count as usize).or(load.threads);
        if let (Kind::InProcess(reads), Some(threads)) = (&mut case.kind, self.threads) {
            reads.threads = threads as usize;
        }
        load.rate = self.rate.map(f64::from).or(load.rate);
        if !self.targets.is_empty() {
            case.targets.retain(|name| self.targets.iter().any(|wanted| wanted == name));
            let has = |name: &String| case.targets.contains(&name.as_str());
            case.claims.retain(|claim| has(&claim.subject) && claim.other.iter().all(has));
        }
    }
}

fn set<T>(place: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *place = value;
    }
}

fn parse_span(text: &str) -> Result<Duration, String> {
    parse_duration(text).map_err(|error| error.to_string())
}

fn parse_value_bytes(text: &str) -> Result<usize, String> {
    let ByteSize(bytes) = text.parse::<ByteSize>().map_err(|error| error.to_string())?;
    if bytes <= VALUE_BYTES_MAX_DEFAULT {
        Ok(bytes as usize)
    } else {
        Err("values have up to 16MiB here".into())
    }
}

fn parse_share(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|share| (0.0..=1.0).contains(share));
    share.ok_or_else(|| "write a number from 0 (writes only) to 1 (reads only)".into())
}

impl FromStr for Distribution {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let exponent = match text {
            "uniform" => return Ok(Self::Uniform),
            "zipfian" => Some(ZIPF_EXPONENT),
            _ => text.strip_prefix("zipfian=").and_then(|exponent| exponent.parse().ok()),
        };
        let sound = exponent.filter(|exponent| *exponent > 0.0 && *exponent <= 10.0);
        sound.map(Self::Zipfian).ok_or_else(|| "write uniform, zipfian or zipfian=EXPONENT (up to 10)".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_distributions_and_shares_are_read() {
        assert_eq!("uniform".parse(), Ok(Distribution::Uniform));
        assert_eq!("zipfian".parse(), Ok(Distribution::Zipfian(0.99)));
        assert_eq!("zipfian=1.2".parse(), Ok(Distribution::Zipfian(1.2)));
        for bad in ["", "zipf", "zipfian=", "zipfian=0", "zipfian=-1", "zipfian=nan", "zipfian=99"] {
            assert!(bad.parse::<Distribution>().is_err(), "{bad}");
        }
        assert_eq!(parse_share("0.9"), Ok(0.9));
        assert!(["", "-0.1", "1.1", "nan", "x"].iter().all(|bad| parse_share(bad).is_err()));
        assert_eq!(parse_value_bytes("64KiB"), Ok(64 << 10));
        assert!(parse_value_bytes("17MiB").is_err());
    }
}
