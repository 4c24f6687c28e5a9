//! The canonical scenarios: what is measured, of whom, and what is promised of it.

use super::claim::Claim;
use super::in_process;
use super::stores::{KVS_TCP, KVS_UNIX, MEMCACHED, NULL_TCP, NULL_UNIX, REDIS_TCP, REDIS_UNIX};
use super::workload::{Distribution, Workload};

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

/// The scenarios over sockets.
const NETWORK: &[Scenario] = &[
    Scenario {
        name: "tcp",
        about: "50 TCP connections, no pipeline, 16-byte keys, 32-byte values, 90% reads",
        cases: tcp,
    },
    Scenario { name: "unix", about: "the same over the unix socket", cases: unix },
    Scenario { name: "tcp-pipeline-16", about: "as tcp, 16 requests at once", cases: tcp_pipeline_16 },
    Scenario { name: "tcp-pipeline-64", about: "as tcp, 64 requests at once", cases: tcp_pipeline_64 },
    Scenario {
        name: "values",
        about: "values of 1 KiB and 64 KiB, one and 16 requests at once",
        cases: values,
    },
    Scenario { name: "single", about: "one connection over the unix socket: latency", cases: single },
    Scenario { name: "writes-everysec", about: "writes only, on disk once a second", cases: writes_everysec },
    Scenario { name: "writes-always", about: "writes only, on disk before the answer", cases: writes_always },
    Scenario { name: "scale-entries", about: "a thousand to ten million entries", cases: scale_entries },
    Scenario { name: "scale-connections", about: "10 to 10,000 connections", cases: scale_connections },
];

/// All scenarios, in the order of `--scenario all`.
pub fn all() -> impl Iterator<Item = Scenario> {
    NETWORK.iter().chain(in_process::SCENARIOS).copied()
}

/// The workload that others differ from.
pub const WORKLOAD: Workload = Workload {
    keys: 1_000_000,
    key_bytes: 16,
    value_bytes: 32,
    read_share: 0.9,
    distribution: Distribution::Uniform,
    seed: 1,
};

/// The load that others differ from.
const LOAD: Load = Load { connections: 50, pipeline: 1, threads: None, rate: None };

/// A case over TCP, with nothing promised.
fn plain(name: &str) -> Case {
    Case {
        name: name.to_owned(),
        kind: Kind::Network,
        workload: WORKLOAD,
        load: LOAD,
        persistence: Persistence::Usual,
        targets: vec![KVS_TCP, REDIS_TCP, MEMCACHED, NULL_TCP],
        claims: Vec::new(),
    }
}

fn tcp() -> Vec<Case> {
    let claims = vec![
        Claim::faster(KVS_TCP, 0.95, NULL_TCP),
        Claim::faster(KVS_TCP, 1.0, REDIS_TCP),
        Claim::faster(KVS_TCP, 1.0, MEMCACHED),
    ];
    vec![Case { claims, ..plain("tcp") }]
}

fn unix() -> Vec<Case> {
    let targets = vec![KVS_UNIX, REDIS_UNIX, NULL_UNIX];
    let claims = vec![Claim::faster(KVS_UNIX, 0.95, NULL_UNIX), Claim::faster(KVS_UNIX, 1.2, REDIS_UNIX)];
    vec![Case { targets, claims, ..plain("unix") }]
}

fn tcp_pipeline_16() -> Vec<Case> {
    vec![pipelined("tcp-pipeline-16", 16, [3.0, 2.0, 0.8])]
}

fn tcp_pipeline_64() -> Vec<Case> {
    vec![pipelined("tcp-pipeline-64", 64, [6.0, 3.0, 0.6])]
}

/// With what is promised against Redis, memcached and the null server.
fn pipelined(name: &str, pipeline: usize, [redis, memcached, null]: [f64; 3]) -> Case {
    let claims = vec![
        Claim::faster(KVS_TCP, redis, REDIS_TCP),
        Claim::faster(KVS_TCP, memcached, MEMCACHED),
        Claim::faster(KVS_TCP, null, NULL_TCP),
    ];
    Case { load: Load { pipeline, ..LOAD }, claims, ..plain(name) }
}

fn values() -> Vec<Case> {
    let sizes = [("1KiB", 1 << 10, 100_000), ("64KiB", 64 << 10, 4_096)];
    let case = |(size, value_bytes, keys): (&str, usize, u64), pipeline: usize| Case {
        workload: Workload { keys, value_bytes, ..WORKLOAD },
        load: Load { pipeline, ..LOAD },
        claims: vec![Claim::faster(KVS_TCP, 1.3, REDIS_TCP)],
        ..plain(&format!("values-{size}-pipeline-{pipeline}"))
    };
    sizes.into_iter().flat_map(|size| [1, 16].map(|pipeline| case(size, pipeline))).collect()
}

fn single() -> Vec<Case> {
    let targets = vec![KVS_UNIX, REDIS_UNIX, NULL_UNIX];
    let claims = vec![Claim::sooner(KVS_UNIX, 50.0, REDIS_UNIX), Claim::sooner(KVS_UNIX, 99.0, REDIS_UNIX)];
    let load = Load { connections: 1, ..LOAD };
    vec![Case { load, targets, claims, ..plain("single") }]
}

fn writes_everysec() -> Vec<Case> {
    [1, 16].map(|pipeline| writes("writes-everysec", Persistence::EverySecond, pipeline)).into()
}

fn writes_always() -> Vec<Case> {
    [1, 16].map(|pipeline| writes("writes-always", Persistence::Always, pipeline)).into()
}

fn writes(scenario: &str, persistence: Persistence, pipeline: usize) -> Case {
    Case {
        workload: Workload { keys: 100_000, read_share: 0.0, ..WORKLOAD },
        load: Load { pipeline, ..LOAD },
        persistence,
        targets: vec![KVS_TCP, REDIS_TCP, NULL_TCP],
        claims: vec![Claim::faster(KVS_TCP, 2.0, REDIS_TCP)],
        ..plain(&format!("{scenario}-pipeline-{pipeline}"))
    }
}

fn scale_entries() -> Vec<Case> {
    let case = |keys: u64| Case {
        workload: Workload { keys, ..WORKLOAD },
        load: Load { pipeline: 16, ..LOAD },
        ..plain(&format!("scale-entries-{keys}"))
    };
    [1_000, 10_000, 100_000, 1_000_000, 10_000_000].map(case).into()
}

fn scale_connections() -> Vec<Case> {
    let case = |connections: usize| Case {
        load: Load { connections, ..LOAD },
        ..plain(&format!("scale-connections-{connections}"))
    };
    [10, 100, 1_000, 10_000].map(case).into()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn scenarios_have_names_of_their_own_and_claim_what_they_measure() {
        let mut names = HashSet::new();
        for scenario in all() {
            for case in (scenario.cases)() {
                assert!(case.name.starts_with(scenario.name), "{}", case.name);
                assert!(names.insert(case.name.clone()), "{} is there twice", case.name);
                for claim in &case.claims {
                    let named = std::iter::once(&claim.subject).chain(&claim.other);
                    named.for_each(|name| {
                        assert!(case.targets.contains(&name.as_str()), "{}: {name}", case.name)
                    });
                }
            }
        }
    }
}
