//! The canonical scenarios: what is measured, of whom, and what is promised of it.

use super::claim::Claim;
use super::in_process;
use super::workload::Workload;

/// A named set of cases.
#[derive(Debug, Clone, Copy)]
pub struct Scenario {
    /// What `--scenario` calls it.
    pub name: &'static str,
    /// A line about it.
    pub about: &'static str,
    /// What is measured.
    pub cases: fn() -> Vec<Case>,
}

/// One comparison: the same load for all its targets.
#[derive(Debug, Clone)]
pub struct Case {
    /// Name for tables and files, that of the scenario first.
    pub name: String,
    /// How it is measured.
    pub kind: Kind,
    /// What is asked.
    pub workload: Workload,
    /// How it is asked.
    pub load: Load,
    /// How servers keep what they store.
    pub persistence: Persistence,
    /// Names of the targets.
    pub targets: Vec<&'static str>,
    /// What is promised.
    pub claims: Vec<Claim>,
}

/// How a case is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Requests over sockets.
    Network,
    /// Reads from inside this process.
    InProcess(in_process::Reads),
    /// Memory an entry takes.
    Memory,
    /// Making connections.
    Setup,
}

/// How a load generator asks over sockets.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Load {
    /// Connections, over all threads.
    pub connections: usize,
    /// Requests sent on a connection before their answers are waited for.
    pub pipeline: usize,
    /// Threads that ask; as many as suit the machine when None.
    pub threads: Option<usize>,
    /// Requests a second in an open loop; None is a closed loop, as fast as answers come.
    pub rate: Option<f64>,
}

/// How servers keep what they store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Persistence {
    /// As they come: kvs with its backup file once a second, Redis with nothing.
    Usual,
    /// Each on disk once a second.
    EverySecond,
    /// Each on disk before it answers.
    Always,
}
