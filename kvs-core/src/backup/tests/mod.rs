//! Goal: what was changed comes back from the file, whatever is drained, rewritten or cut off on the way. Method: random changes
//! of a table against a map, on a disk in memory.
//!
//! | module | what is tried |
//! |---|---|
//! | [`history`] | what the others do: lives of a store, and a ledger of them |
//! | [`power_cut`] | power cuts at every point of such lives |
//! | [`damage`] | bits that flip |
//! | [`faults`] | everything that a disk can refuse, and files that don't belong there |

mod damage;
mod faults;
mod history;
mod power_cut;

use std::collections::BTreeMap;
use std::path::Path;

use proptest::prelude::*;

use super::load::{Loaded, load_alone};
use super::simulate::SimulatedDisk;
use super::writer::Writer;
use super::{BackupError, log, ring};
use crate::limits::CAPACITY_BYTES_MIN;
use crate::segment::Segment;
use crate::segment::layout::WorkerSlot;
use crate::table::tests::{Step, get, set_large, step};
use crate::table::{Table, TableError};
use crate::transaction::Transaction;
use crate::wire::SetCondition;

const PATH: &str = "/backup";
/// What no client knows.
const ID: [u64; 2] = [0x7d3c_91e5_20fb_a648, 0x1b86_f02d_c57e_4a93];
const CAPACITY: u64 = 4 * CAPACITY_BYTES_MIN;

/// A segment of one worker with a ring, and the slot of the backup thread.
fn segment() -> Segment {
    segment_of(1)
}

/// A segment of so many workers with rings, and the slot of the backup thread behind theirs.
fn segment_of(workers: u64) -> Segment {
    let segment = Segment::on_heap(CAPACITY).expect("heap memory");
    segment.claim_worker(workers).expect("heap memory");
    segment.claim_ring(workers - 1).expect("heap memory");
    let words = &segment.header().expect("just made").backup_id;
    words.iter().zip(ID).for_each(|(word, half)| segment.memory().store(word, half));
    segment
}

fn slot(segment: &Segment, index: u64) -> &WorkerSlot {
    segment.memory().object(segment.regions().worker(index)).expect("a slot")
}

fn open<'s>(disk: &'s SimulatedDisk, table: &'s Table) -> Writer<'s> {
    let path = Path::new(PATH);
    let found = log::open(disk, path).expect("a sound file");
    let mut writer =
        Writer::open(disk, path, found, table, slot(table.segment(), 1)).expect("a fitting file");
    if !writer.has_file() {
        rewrite(&mut writer);
    }
    writer
}

fn rewrite(writer: &mut Writer<'_>) {
    writer.begin_rewrite().expect("room");
    while !writer.copy_some().expect("room") {}
    let file = writer.next_file().expect("a file");
    writer.next_synced(file.sync()).expect("synced");
    assert!(writer.is_next_ready());
    writer.install_next().expect("room");
}

/// Does one change, or finds the ring full.
fn change(table: &Table, worker: &WorkerSlot, step: &Step) -> Result<(), TableError> {
    let mut transaction = Transaction::begin(table.segment(), worker);
    match step {
        Step::Get { .. } => return Ok(()),
        Step::Set { key, length, if_absent } => {
            let key = key_of(*key);
            let value = vec![*length as u8; *length];
            let condition = if *if_absent { SetCondition::IfAbsent } else { SetCondition::Always };
            if !Table::fits_inline(key.len(), value.len()) {
                return set_large(table, worker, &key, &value, condition).map(drop);
            }
            table.set(&mut transaction, table.hash_of(&key), &key, &value, condition)?;
        }
        Step::Delete { key } => {
            let key = key_of(*key);
            table.delete(&mut transaction, table.hash_of(&key), &key)?;
        }
        Step::Increment { key, by } => {
            let key = key_of(*key);
            match table.increment(&mut transaction, table.hash_of(&key), &key, *by) {
                Err(TableError::NotANumber | TableError::NumberRange) => return Ok(()),
                other => other?,
            };
        }
    }
    transaction.commit()?;
    Ok(table.collect_garbage(worker)?)
}

fn key_of(key: u16) -> Vec<u8> {
    format!("key {key}").into_bytes()
}

/// Everything in the file, in a table of its own.
fn load(disk: &SimulatedDisk) -> Result<Segment, BackupError> {
    Ok(load_or_empty(disk, 1)?.segment)
}

/// What came of loading.
struct LoadedStore {
    segment: Segment,
    /// Something was cut off; the load had to begin again for it.
    torn: bool,
    again: bool,
}

/// A segment of so many workers with everything that is in the file, if there is one.
fn load_or_empty(disk: &SimulatedDisk, workers: u64) -> Result<LoadedStore, BackupError> {
    let (mut end, mut again) = (None, false);
    loop {
        let segment = segment_of(workers);
        let Some(found) = log::open(disk, Path::new(PATH))? else {
            return Ok(LoadedStore { segment, torn: false, again });
        };
        let table = Table::new(&segment)?;
        let limit = end.unwrap_or(found.length);
        match load_alone(disk, Path::new(PATH), &found, &table, slot(&segment, 0), limit)? {
            Loaded::Whole { torn } => {
                let torn = again || torn.is_some();
                return Ok(LoadedStore { segment, torn, again });
            }
            Loaded::Again { torn } => (end, again) = (Some(torn.position), true),
        }
    }
}

fn contents(table: &Table) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut keys = Vec::new();
    let mut cursor = Some(0);
    while let Some(at) = cursor {
        cursor = table.scan(at, 16, &mut |key| keys.push(key.to_vec())).expect("sound");
    }
    keys.into_iter().map(|key| (key.clone(), get(table, &key).expect("a value"))).collect()
}

/// What becomes of the file between two changes.
#[derive(Debug, Clone, Copy)]
enum Between {
    Nothing,
    Drain,
    Sync,
    Rewrite,
    /// The data server dies, and another goes on.
    Die,
}

fn between() -> impl Strategy<Value = Between> {
    prop_oneof![
        20 => Just(Between::Nothing),
        10 => Just(Between::Drain),
        2 => Just(Between::Sync),
        1 => Just(Between::Rewrite),
        2 => Just(Between::Die),
    ]
}

/// Serves until it dies, or ends in order; returns how many steps it took.
fn live(disk: &SimulatedDisk, segment: &Segment, steps: &[(Step, Between)]) -> usize {
    let plain = Table::new(segment).expect("sound");
    let worker = slot(segment, 0);
    ring::pin_all(&plain, worker).expect("sound");
    let table = plain.backed_up();
    let mut writer = open(disk, &plain);
    for (index, (step, between)) in steps.iter().enumerate() {
        while let Err(error) = change(&table, worker, step) {
            assert!(matches!(error, TableError::BackupBehind), "{error}");
            assert!(writer.drain().expect("room") > 0);
        }
        match between {
            Between::Nothing => {}
            Between::Drain => drop(writer.drain().expect("room")),
            Between::Sync => {
                if let Some(ticket) = writer.sync_ticket().expect("sound") {
                    writer.synced(&ticket, ticket.sync()).expect("synced");
                }
            }
            Between::Rewrite => rewrite(&mut writer),
            Between::Die => return index + 1,
        }
    }
    writer.end().expect("room");
    steps.len()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn backup_has_what_the_table_has(steps in prop::collection::vec((step(), between()), 1..400)) {
        let (disk, segment) = (SimulatedDisk::default(), segment());
        let mut rest = &steps[..];
        while !rest.is_empty() {
            rest = &rest[live(&disk, &segment, rest)..];
        }
        live(&disk, &segment, &[]);
        let loaded = load(&disk).expect("a sound file");
        let (expected, found) = (Table::new(&segment).expect("sound"), Table::new(&loaded).expect("sound"));
        prop_assert_eq!(contents(&found), contents(&expected));
        prop_assert_eq!(found.totals(), expected.totals());
    }
}

#[test]
fn backup_value_overtaken_by_its_delete_stays_out_of_a_new_file() {
    let (disk, segment) = (SimulatedDisk::default(), segment_of(2));
    let plain = Table::new(&segment).expect("sound");
    let table = plain.backed_up();
    let path = Path::new(PATH);
    let mut writer = Writer::open(&disk, path, None, &plain, slot(&segment, 2)).expect("no file");
    rewrite(&mut writer);
    let set = |worker, key| {
        let step = Step::Set { key, length: 1_000, if_absent: false };
        change(&table, slot(&segment, worker), &step).expect("room in the ring");
    };
    // The second ring has the value, the first one its delete, and then so much that a batch ends before the second.
    set(1, 7);
    change(&table, slot(&segment, 0), &Step::Delete { key: 7 }).expect("room in the ring");
    (100..120).for_each(|key| set(0, key));
    assert!(writer.drain().expect("room") > 0);
    assert!(ring::used(slot(&segment, 1)) > 0, "the value waits");
    rewrite(&mut writer);
    writer.end().expect("room");
    drop(writer);
    let found = contents(&Table::new(&load(&disk).expect("a sound file")).expect("sound"));
    assert!(!found.contains_key(&key_of(7)));
    assert_eq!(found.len(), 20);
}
