//! The canonical cases of what is measured in this process, and what is promised of them.

use super::memory::{self, REDIS_USED};
use super::setup::KVS_AT_ONCE;
use super::{BASELINE, CHASE, CHASE_OVERLAPPED, LMDB, LOCAL, LOCAL_BESIDE_WRITER, Reads};
use crate::bench::claim::Claim;
use crate::bench::scenario::{Case, Kind, Load, Persistence, Scenario, WORKLOAD};
use crate::bench::stores::{KVS_TCP, MEMCACHED, REDIS_TCP};
use crate::bench::workload::{Distribution, Workload};

/// The scenarios measured here.
pub const SCENARIOS: &[Scenario] = &[
    Scenario { name: "local", about: "reads from shared memory, one key at a time", cases: local },
    Scenario { name: "local-many", about: "the same, 16 and 64 keys at once", cases: local_many },
    Scenario {
        name: "local-zipfian",
        about: "the same, one key at a time, some keys often",
        cases: local_zipfian,
    },
    Scenario {
        name: "local-writer",
        about: "the same, while a writer changes the keys",
        cases: local_writer,
    },
    Scenario { name: "memory", about: "memory an entry of 16 + 32 bytes takes", cases: memory },
    Scenario { name: "setup", about: "making connections", cases: setup },
];

/// Reads alone.
const READS: Workload = Workload { read_share: 1.0, ..WORKLOAD };
/// No connections.
const LOAD: Load = Load { connections: 1, pipeline: 1, threads: None, rate: None };
/// Numbers of keys, as names have them.
const SIZES: [(&str, u64); 2] = [("1M", 1_000_000), ("10M", 10_000_000)];

/// How fast a lookup is at least, in times of two dependent random accesses: it may take 1.3 times as long.
const CHASE_FACTOR: f64 = 0.77;

fn case(name: String, kind: Kind, workload: Workload, targets: &[&'static str], claims: Vec<Claim>) -> Case {
    let targets = targets.to_vec();
    Case { name, kind, workload, load: LOAD, persistence: Persistence::Usual, targets, claims }
}

fn reads(threads: usize, batch: usize) -> Kind {
    Kind::InProcess(Reads { threads, batch, with_writer: false })
}

fn threads_named(threads: usize) -> String {
    if threads == 1 { "1-thread".into() } else { format!("{threads}-threads") }
}

fn local() -> Vec<Case> {
    let one = |(size, keys): (&str, u64), threads: usize| {
        let claims = vec![Claim::faster(LOCAL, 3.0, LMDB), Claim::faster(LOCAL, CHASE_FACTOR, CHASE)];
        let targets = [LOCAL, LMDB, CHASE, CHASE_OVERLAPPED, BASELINE];
        let name = format!("local-{size}-{}", threads_named(threads));
        case(name, reads(threads, 1), Workload { keys, ..READS }, &targets, claims)
    };
    SIZES.into_iter().flat_map(|size| [1, 2].map(|threads| one(size, threads))).collect()
}

fn local_many() -> Vec<Case> {
    let many = |(size, keys): (&str, u64), threads: usize, batch: usize| {
        let name = format!("local-many-{batch}-{size}-{}", threads_named(threads));
        let claims = vec![Claim::faster(LOCAL, 8.0, LMDB)];
        case(name, reads(threads, batch), Workload { keys, ..READS }, &[LOCAL, LMDB], claims)
    };
    let sizes = SIZES.into_iter().flat_map(|size| [1, 2].map(|threads| (size, threads)));
    sizes.flat_map(|(size, threads)| [16, 64].map(|batch| many(size, threads, batch))).collect()
}

fn local_zipfian() -> Vec<Case> {
    let zipfian = |threads: usize| {
        let workload = Workload { distribution: Distribution::Zipfian(0.99), ..READS };
        let name = format!("local-zipfian-{}", threads_named(threads));
        let claims = vec![Claim::faster(LOCAL, 4.0, LMDB)];
        case(name, reads(threads, 1), workload, &[LOCAL, LMDB, BASELINE], claims)
    };
    [1, 2].map(zipfian).into()
}

/// Many keys, which the writer seldom changes just when they are read, and few, which it does.
fn local_writer() -> Vec<Case> {
    let beside = |(size, keys): (&str, u64)| {
        let kind = Kind::InProcess(Reads { threads: 1, batch: 1, with_writer: true });
        let claims = vec![Claim::faster(LOCAL_BESIDE_WRITER, 0.7, LOCAL)];
        let targets = [LOCAL_BESIDE_WRITER, LOCAL];
        case(format!("local-writer-{size}"), kind, Workload { keys, ..READS }, &targets, claims)
    };
    [("1M", 1_000_000), ("1K", 1_000)].map(beside).into()
}

fn memory() -> Vec<Case> {
    let claims = vec![
        Claim::smaller(memory::KVS, 1.0, memory::MEMCACHED),
        Claim::smaller(memory::KVS, 0.7, memory::REDIS),
        Claim::smaller(memory::KVS, 0.7, REDIS_USED),
    ];
    let targets = [memory::KVS, memory::MEMCACHED, memory::REDIS, REDIS_USED];
    let workload = Workload { keys: 10_000_000, ..READS };
    vec![case("memory-10M".into(), Kind::Memory, workload, &targets, claims)]
}

fn setup() -> Vec<Case> {
    let claims = vec![Claim::at_least(KVS_TCP, 20_000.0), Claim::faster(KVS_TCP, 1.0, REDIS_TCP)];
    let targets = [KVS_TCP, KVS_AT_ONCE, REDIS_TCP, MEMCACHED];
    let cases = [1, 2].map(|threads| {
        // The servers may have some that they don't know yet to be closed.
        let load = Load { connections: 1_000, threads: Some(threads), ..LOAD };
        let workload = Workload { keys: 1_000, ..READS };
        let name = format!("setup-{}", threads_named(threads));
        Case { load, ..case(name, Kind::Setup, workload, &targets, claims.clone()) }
    });
    cases.into()
}
