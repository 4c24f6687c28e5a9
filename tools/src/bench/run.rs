//! A run: the cases that were measured, and all that is known about how.

use std::time::Duration;

use super::claim::Verdict;
use super::results::Series;
use super::scenario::{Case, Kind, Persistence};
use crate::figures;

/// A run.
pub struct Run {
    /// The command that repeats it.
    pub command: String,
    /// When it began, in seconds since 1970.
    pub begun: u64,
    /// Rounds of each case.
    pub rounds: usize,
    /// Time measured in each.
    pub duration: Duration,
    /// Time before that.
    pub warm_up: Duration,
    /// What was found.
    pub cases: Vec<Measured>,
}

/// A case that was measured.
pub struct Measured {
    /// The case, as the options changed it.
    pub case: Case,
    /// Its targets.
    pub series: Vec<Series>,
    /// Its promises.
    pub verdicts: Vec<Verdict>,
    /// What was not here, and why.
    pub missing: Vec<String>,
}

impl Case {
    /// What is done, in a line.
    pub fn describe(&self) -> String {
        let workload = &self.workload;
        let keys = figures::counted(workload.keys, "key", "keys");
        let what = format!(
            "{keys} of {} B, values of {}, {:.0}% reads, {}",
            workload.key_bytes,
            figures::rounded(workload.value_bytes as u64),
            workload.read_share * 100.0,
            workload.distribution
        );
        match self.kind {
            Kind::Network => format!("{}; {what}", self.describe_load()),
            Kind::InProcess(_) | Kind::Setup => format!("{}; {what}", self.describe_threads()),
            Kind::Memory => what,
        }
    }

    /// Threads that ask, read or connect.
    pub fn thread_count(&self) -> usize {
        match self.kind {
            Kind::InProcess(reads) => reads.threads,
            _ => self.load.thread_count(),
        }
    }

    fn describe_threads(&self) -> String {
        let threads = figures::counted(self.thread_count() as u64, "thread", "threads");
        match self.kind {
            Kind::InProcess(reads) => {
                let keys = figures::counted(reads.batch as u64, "key", "keys");
                let writer = if reads.with_writer { ", a writer beside" } else { "" };
                format!("{threads}, {keys} at once{writer}")
            }
            _ => threads,
        }
    }

    fn describe_load(&self) -> String {
        let load = &self.load;
        let connections = figures::counted(load.connections as u64, "connection", "connections");
        let threads = self.describe_threads();
        let pace = match load.rate {
            Some(rate) => format!(", {} requests/s", figures::grouped(rate as u64)),
            None => String::new(),
        };
        let disk = match self.persistence {
            Persistence::Usual => "",
            Persistence::EverySecond => ", on disk once a second",
            Persistence::Always => ", on disk before the answer",
        };
        format!("{connections} from {threads}, pipeline {}{pace}{disk}", load.pipeline)
    }
}

impl Measured {
    /// What the others are held against: the first target.
    pub fn subject(&self) -> Option<&Series> {
        self.series.first()
    }
}
