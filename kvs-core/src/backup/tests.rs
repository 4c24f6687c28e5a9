//! Goal: what was changed comes back from the file, whatever is drained, rewritten or cut off on the way. Method: random changes
//! of a table against a map, on a disk in memory.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::disk::{Disk, DiskFile, FileIdentity};
use super::load::{Loaded, load_alone};
use super::writer::Writer;
use super::{BackupError, log, ring};
use crate::limits::CAPACITY_BYTES_MIN;
use crate::segment::Segment;
use crate::segment::layout::WorkerSlot;
use crate::table::tests::{Step, get, step};
use crate::table::{Table, TableError};
use crate::transaction::Transaction;
use crate::wire::SetCondition;

type Bytes = Arc<Mutex<Vec<u8>>>;

/// A disk in memory.
#[derive(Default)]
struct MemoryDisk {
    files: Mutex<BTreeMap<PathBuf, Bytes>>,
}

struct MemoryFile(Bytes);

impl Disk for MemoryDisk {
    fn open(&self, path: &Path) -> io::Result<Option<Box<dyn DiskFile>>> {
        let files = self.files.lock().expect("unpoisoned");
        Ok(files.get(path).map(|bytes| Box::new(MemoryFile(Arc::clone(bytes))) as Box<dyn DiskFile>))
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let bytes = Bytes::default();
        self.files.lock().expect("unpoisoned").insert(path.to_path_buf(), Arc::clone(&bytes));
        Ok(Box::new(MemoryFile(bytes)))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut files = self.files.lock().expect("unpoisoned");
        let bytes = files.remove(from).ok_or(io::ErrorKind::NotFound)?;
        files.insert(to.to_path_buf(), bytes);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.files.lock().expect("unpoisoned").remove(path);
        Ok(())
    }

    fn sync_directory(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn identity(&self, path: &Path) -> io::Result<Option<FileIdentity>> {
        let files = self.files.lock().expect("unpoisoned");
        Ok(files.get(path).map(|bytes| (0, Arc::as_ptr(bytes) as u64)))
    }
}

impl DiskFile for MemoryFile {
    fn lock(&self) -> io::Result<bool> {
        Ok(true)
    }

    fn identity(&self) -> io::Result<FileIdentity> {
        Ok((0, Arc::as_ptr(&self.0) as u64))
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.0.lock().expect("unpoisoned").len() as u64)
    }

    fn read_at(&self, target: &mut [u8], position: u64) -> io::Result<usize> {
        let bytes = self.0.lock().expect("unpoisoned");
        let rest = bytes.get(position as usize..).unwrap_or(&[]);
        let count = rest.len().min(target.len());
        target[..count].copy_from_slice(&rest[..count]);
        Ok(count)
    }

    fn write_at(&self, source: &[u8], position: u64) -> io::Result<()> {
        let mut bytes = self.0.lock().expect("unpoisoned");
        let end = position as usize + source.len();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[position as usize..end].copy_from_slice(source);
        Ok(())
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.0.lock().expect("unpoisoned").resize(length as usize, 0);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

const PATH: &str = "/backup";
const CAPACITY: u64 = 4 * CAPACITY_BYTES_MIN;

/// A segment of one worker with a ring, and the slot of the backup thread.
fn segment() -> Segment {
    let segment = Segment::on_heap(CAPACITY).expect("heap memory");
    segment.claim_worker(1).expect("heap memory");
    segment.claim_ring(0).expect("heap memory");
    segment
}

fn slot(segment: &Segment, index: u64) -> &WorkerSlot {
    segment.memory().object(segment.regions().worker(index)).expect("a slot")
}

fn open<'s>(disk: &'s MemoryDisk, table: &'s Table) -> Writer<'s> {
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
                return set_large(table, worker, &key, &value, condition);
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

fn set_large(
    table: &Table,
    worker: &WorkerSlot,
    key: &[u8],
    value: &[u8],
    condition: SetCondition,
) -> Result<(), TableError> {
    use crate::arena::block_list::BlockList;
    let segment = table.segment();
    let mut content = key.to_vec();
    content.resize(key.len().next_multiple_of(8), 0);
    content.extend_from_slice(value);
    let list = BlockList::create(segment, worker, &worker.loading, content.len() as u64)?;
    super::load::push(segment, worker, &list, &content)?;
    let mut transaction = Transaction::begin(segment, worker);
    let set =
        table.set_assembled(&mut transaction, table.hash_of(key), key, &list, &worker.loading, condition)?;
    if set {
        transaction.commit()?;
    } else {
        drop(transaction);
        list.release(worker, &worker.loading)?;
    }
    Ok(table.collect_garbage(worker)?)
}

fn key_of(key: u16) -> Vec<u8> {
    format!("key {key}").into_bytes()
}

/// Everything in the file, in a table of its own.
fn load(disk: &MemoryDisk) -> Result<Segment, BackupError> {
    let mut end = None;
    loop {
        let segment = segment();
        let table = Table::new(&segment)?;
        let found = log::open(disk, Path::new(PATH))?.expect("a file");
        let limit = end.unwrap_or(found.length);
        let loaded = load_alone(disk, Path::new(PATH), &found, &table, slot(&segment, 0), limit)?;
        match loaded {
            Loaded::Whole { .. } => return Ok(segment),
            Loaded::Again { end: reached } => end = Some(reached),
        }
    }
}

fn contents(table: &Table) -> HashMap<Vec<u8>, Vec<u8>> {
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
fn live(disk: &MemoryDisk, segment: &Segment, steps: &[(Step, Between)]) -> usize {
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
        let (disk, segment) = (MemoryDisk::default(), segment());
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
