//! Targets inside this process: no socket and no server between the reader and the memory. Memory per entry and the making of
//! connections are measured here too.
//!
//! | module | what it is |
//! |---|---|
//! | [`scenarios`] | the canonical cases, and what is promised of them |
//! | [`reads`] | threads that look keys up |
//! | [`lookups`] | what they look up in: the segment, LMDB, memory alone, nothing |
//! | [`chase`] | two dependent random accesses, what no lookup in two steps can be faster than |
//! | [`lmdb`], [`lmdb_environment`] | LMDB |
//! | [`store`] | a running store with all keys, whose segment is read |
//! | [`writer`], [`cores`] | a writer beside the readers, and who runs where then |
//! | [`memory`] | memory an entry takes |
//! | [`setup`] | making connections |

mod chase;
mod cores;
mod lmdb;
mod lmdb_environment;
mod lookups;
mod memory;
mod reads;
mod scenarios;
mod setup;
mod store;
mod writer;

use std::sync::Arc;

use anyhow::{Result, ensure};
use kvs_core::segment::SegmentView;

use super::scenario::{Case, Kind};
use super::stores::Settings;
use super::target::{Interrupted, Ready, Target};
use super::workload::{Workload, key};
use lmdb::Lmdb;
use lookups::{Baseline, Chasing, LmdbOneByOne, Local, Many, OneByOne};
use reads::{ReadTarget, Reader as _};
use store::LocalStore;

pub use scenarios::SCENARIOS;

/// Through `LocalReader`.
pub const LOCAL: &str = "local";
/// The same while a writer changes the keys.
pub const LOCAL_BESIDE_WRITER: &str = "local-beside-writer";
/// LMDB.
pub const LMDB: &str = "lmdb";
/// Two dependent random accesses, one operation after the other.
pub const CHASE: &str = "chase";
/// The same, but an operation doesn't wait for the one before.
pub const CHASE_OVERLAPPED: &str = "chase-overlapped";
/// The load without any lookup.
pub const BASELINE: &str = "baseline";

/// A key, of the only length that is measured here.
type Key = [u8; 16];

/// How a case reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reads {
    /// Threads that read.
    pub threads: usize,
    /// Keys asked for at once.
    pub batch: usize,
    /// Whether a writer changes the same keys meanwhile.
    pub with_writer: bool,
}

/// The targets of a case of another kind than [`Kind::Network`], ready to be measured.
///
/// # Errors
/// When one that is here can't be made ready.
pub fn ready(case: &Case, settings: &Settings) -> Result<Ready> {
    let mut missing = Vec::new();
    let targets = match case.kind {
        Kind::Memory => memory::targets(case, settings, &mut missing)?,
        Kind::Setup => setup::targets(case, settings, &mut missing)?,
        Kind::InProcess(reads) => reading(case, reads, settings, &mut missing)?,
        Kind::Network => Vec::new(),
    };
    Ok(Ready { targets, missing })
}

fn reading(
    case: &Case,
    reads: Reads,
    settings: &Settings,
    missing: &mut Vec<String>,
) -> Result<Vec<Box<dyn Target>>> {
    let key_bytes = size_of::<Key>();
    ensure!(
        case.workload.key_bytes == key_bytes,
        "{} has keys of {key_bytes} bytes and no others",
        case.name
    );
    match LocalStore::start(case, settings, reads.with_writer, missing)? {
        None => Ok(Vec::new()),
        Some(store) if reads.with_writer => beside_writer(case, reads, store),
        Some(store) => readers(case, reads, settings, store),
    }
}

fn beside_writer(case: &Case, reads: Reads, store: LocalStore) -> Result<Vec<Box<dyn Target>>> {
    let store = std::rc::Rc::new(store);
    let target = |name: &&'static str| -> Result<Box<dyn Target>> {
        let has_writer = *name == LOCAL_BESIDE_WRITER;
        Ok(Box::new(cores::Beside::new(name, &case.workload, reads, &store, has_writer)?))
    };
    case.targets.iter().map(target).collect()
}

/// Targets that share a store, and read without anybody writing.
fn readers(
    case: &Case,
    reads: Reads,
    settings: &Settings,
    store: LocalStore,
) -> Result<Vec<Box<dyn Target>>> {
    let (workload, interrupted, path) = (&case.workload, &settings.interrupted, store.segment_path());
    let store = std::rc::Rc::new(store);
    let segment = Arc::new(SegmentView::open(&path)?);
    let mut targets: Vec<Box<dyn Target>> = Vec::new();
    for name in &case.targets {
        let kept = std::rc::Rc::clone(&store);
        targets.push(match *name {
            LOCAL if reads.batch == 1 => Box::new(ReadTarget::new(name, workload, reads, kept, |_| {
                Local::open(&path)?.verify(entries(workload, interrupted)).map(OneByOne)
            })?),
            LOCAL => Box::new(ReadTarget::new(name, workload, reads, kept, |_| {
                Local::open(&path)?.verify(entries(workload, interrupted)).map(Many)
            })?),
            LMDB => Box::new(lmdb(name, workload, reads, interrupted)?),
            CHASE | CHASE_OVERLAPPED => {
                let is_overlapped = *name == CHASE_OVERLAPPED;
                let seed = |thread| workload.seed.wrapping_add(thread as u64) << 32;
                let chasing = |thread| Chasing::new(&segment, seed(thread), is_overlapped);
                Box::new(ReadTarget::new(name, workload, reads, kept, chasing)?)
            }
            _ => Box::new(ReadTarget::new(name, workload, reads, kept, |_| Ok(Baseline))?),
        });
    }
    Ok(targets)
}

fn lmdb(
    name: &str,
    workload: &Workload,
    reads: Reads,
    interrupted: &Interrupted,
) -> Result<ReadTarget<LmdbOneByOne>> {
    let entry_bytes = workload.key_bytes + workload.value_bytes;
    let lmdb = Arc::new(Lmdb::load(workload.keys as usize, entry_bytes, entries(workload, interrupted))?);
    LmdbOneByOne(Arc::clone(&lmdb)).begin()?.verify(entries(workload, interrupted))?;
    // It asks for one key at a time, whatever the others do.
    ReadTarget::new(name, workload, Reads { batch: 1, ..reads }, (), |_| Ok(LmdbOneByOne(Arc::clone(&lmdb))))
}

/// All entries, in the order of their keys; fewer when the user wants the end.
fn entries(workload: &Workload, interrupted: &Interrupted) -> impl Iterator<Item = (Key, Vec<u8>)> + use<> {
    let (values, interrupted) = (workload.values(), interrupted.clone());
    let numbers = (0..workload.keys).take_while(move |_| !interrupted.is_set());
    numbers.map(move |number| (key(number), values.of(number).to_vec()))
}
