//! From a backup file to a table. Any number of threads [apply](Loading::apply) blocks, in any order: each key's highest version
//! counts, and what was deleted is remembered until the end.
//!
//! The segment is new and marked as loading; killed on the way, the next start throws it away and loads again. When all is
//! there, every shard goes on with versions above all that the file has, because keys may be in other shards than before.
//!
//! Locks: one for the deleted keys of each shard, taken before the shard's own and held while a record is applied.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use super::BackupError;
use super::disk::{Disk, DiskFile};
use super::log::{Found, Mark};
use super::record::{ENTRIES_BYTES, FILE_HEADER_BYTES, Kind, RECORD_HEADER_BYTES};
use super::scan::{Bad, Block, Frames, Next, Sound, for_each_sound, judge};
use super::torn_path;
use crate::arena::block_list::BlockList;
use crate::segment::layout::WorkerSlot;
use crate::table::{KeyHash, Table, TableError};
use crate::transaction::Transaction;

/// Records whose buckets are brought near before the first is applied.
const LOOK_AHEAD: usize = 16;

/// Bytes at the end of a file that are searched for its last mark.
const LAST_BYTES: u64 = 4 << 20;

/// A load under way.
pub struct Loading {
    table: Table,
    seed: u32,
    deleted: Vec<Mutex<HashMap<Box<[u8]>, u64>>>,
    version_max: AtomicU64,
    records: AtomicU64,
    bad: AtomicU64,
}

impl Loading {
    /// Of the file of `found` into `table`, which is empty.
    pub fn new(table: &Table, found: &Found) -> Self {
        let shards = table.segment().regions().shard_count;
        Self {
            table: table.clone(),
            seed: found.header.checksum_seed(),
            deleted: (0..shards).map(|_| Mutex::default()).collect(),
            version_max: AtomicU64::new(0),
            records: AtomicU64::new(0),
            bad: AtomicU64::new(u64::MAX),
        }
    }

    /// Records applied so far.
    pub fn records(&self) -> u64 {
        self.records.load(Ordering::Relaxed)
    }

    /// The first record whose checksum did not fit, so far.
    pub fn bad(&self) -> Option<u64> {
        Some(self.bad.load(Ordering::Relaxed)).filter(|bad| *bad != u64::MAX)
    }

    /// Applies the records of `block`, in the log of `slot`, which is the calling thread's.
    ///
    /// # Errors
    /// [`TableError::Full`] when the segment has no room.
    pub fn apply(&self, slot: &WorkerSlot, block: &Block) -> Result<(), TableError> {
        let mut ahead = Vec::with_capacity(LOOK_AHEAD);
        let mut version_max = 0;
        for record in block.records(self.seed) {
            let record = match record {
                Ok(record) => record,
                Err(position) => {
                    self.bad.fetch_min(position, Ordering::Relaxed);
                    break;
                }
            };
            if record.header.kind == Kind::Synced {
                continue;
            }
            version_max = version_max.max(record.header.version);
            let hash = self.table.hash_of(record.key());
            self.table.prefetch_bucket(hash);
            ahead.push((hash, record));
            if ahead.len() == LOOK_AHEAD {
                self.apply_all(slot, &mut ahead)?;
            }
        }
        self.apply_all(slot, &mut ahead)?;
        self.version_max.fetch_max(version_max, Ordering::Relaxed);
        Ok(())
    }

    fn apply_all(&self, slot: &WorkerSlot, ahead: &mut Vec<(KeyHash, Sound<'_>)>) -> Result<(), TableError> {
        self.records.fetch_add(ahead.len() as u64, Ordering::Relaxed);
        ahead.iter().for_each(|(hash, _)| _ = self.table.prefetch_entry(*hash, true));
        ahead.drain(..).try_for_each(|(hash, record)| self.apply_one(slot, hash, &record))
    }

    fn apply_one(&self, slot: &WorkerSlot, hash: KeyHash, record: &Sound<'_>) -> Result<(), TableError> {
        let (key, value, version) = (record.key(), record.value(), record.header.version);
        let segment = self.table.segment();
        let shard = hash.shard(segment.regions().shard_count) as usize;
        let mut deleted = self.deleted[shard].lock().unwrap_or_else(PoisonError::into_inner);
        if !deleted.is_empty() {
            match deleted.get(key) {
                Some(later) if *later > version => return Ok(()),
                Some(_) => drop(deleted.remove(key)),
                None => {}
            }
        }
        let mut transaction = Transaction::begin(segment, slot);
        if record.header.kind == Kind::Delete {
            self.table.restore_delete(&mut transaction, hash, key, version)?;
            deleted.insert(key.into(), version);
        } else if Table::fits_inline(key.len(), value.len()) {
            self.table.restore(&mut transaction, hash, key, value, version)?;
        } else {
            drop(transaction);
            return self.apply_large(slot, hash, record);
        }
        transaction.commit()?;
        Ok(self.table.collect_garbage(slot)?)
    }

    fn apply_large(&self, slot: &WorkerSlot, hash: KeyHash, record: &Sound<'_>) -> Result<(), TableError> {
        let (key, segment) = (record.key(), self.table.segment());
        let padded = key.len().next_multiple_of(8);
        let length = (padded + record.value().len()) as u64;
        let list = BlockList::create(segment, slot, &slot.loading, length)?;
        let padding = &[0u8; 8][..padded - key.len()];
        for part in [key, padding, record.value()] {
            list.append(slot, part)?;
        }
        let mut transaction = Transaction::begin(segment, slot);
        let (owner, version) = (&slot.loading, record.header.version);
        if self.table.restore_assembled(&mut transaction, hash, key, &list, owner, version)? {
            transaction.commit()?;
        } else {
            drop(transaction);
            list.release(slot, owner)?;
        }
        Ok(self.table.collect_garbage(slot)?)
    }

    /// Gives the table the size that the file's last mark speaks of, so that it needn't grow all the way from the smallest. Without
    /// memory for that it grows as it always does.
    ///
    /// # Errors
    /// What the system says, and what the segment makes impossible.
    pub fn prepare(&self, path: &Path, found: &Found, slot: &WorkerSlot) -> Result<(), BackupError> {
        let entries = expected_entries(found).map_err(|error| BackupError::io(path, "read it", error))?;
        match self.table.presize(slot, entries) {
            Err(TableError::Full(_)) => Ok(()),
            done => Ok(done?),
        }
    }

    /// Ends the load when all that `frames` walked through is applied and `end` is how the walk ended. A torn end is cut off.
    ///
    /// # Errors
    /// [`BackupError::Damage`], or what the system says.
    pub fn conclude(
        &self,
        disk: &dyn Disk,
        path: &Path,
        found: &Found,
        frames: &Frames<'_>,
        end: Next,
    ) -> Result<Loaded, BackupError> {
        if let Some(position) = self.bad() {
            return Ok(Loaded::Again { torn: cut_torn(disk, path, found, position)? });
        }
        let torn = match end {
            Next::Bad(position) => Some(cut_torn(disk, path, found, position)?),
            Next::Block | Next::End => None,
        };
        self.finish(mark_of(found, frames))?;
        Ok(Loaded::Whole { torn })
    }

    /// The segment goes on where the file's history ended.
    fn finish(&self, mark: Mark) -> Result<(), BackupError> {
        let segment = self.table.segment();
        let (memory, header) = (segment.memory(), segment.header()?);
        let next_version = self.version_max.load(Ordering::Relaxed) + 1;
        for index in 0..segment.regions().shard_count {
            memory.store(&segment.shard(index)?.next_version, next_version);
        }
        memory.store(&header.backup.generation, mark.generation);
        memory.store(&header.backup.position, mark.position);
        memory.store(&header.backup.sequence, mark.sequence);
        memory.store(&header.backup.chain, u64::from(mark.chain));
        memory.store(&header.loading, 0);
        Ok(())
    }
}

/// How many entries the file has at least: as its last mark says, or as a file that isn't too long must have.
fn expected_entries(found: &Found) -> io::Result<u64> {
    let from = found.length.saturating_sub(LAST_BYTES).max(FILE_HEADER_BYTES as u64);
    let (mut last, mut records, mut bytes) = (0, 0, 0);
    for_each_sound(&*found.file, &found.header, (from, found.length), &mut |_, record| {
        if let Ok(entries) = <[u8; ENTRIES_BYTES]>::try_from(record.value())
            && record.header.kind == Kind::Synced
        {
            last = u64::from_le_bytes(entries);
        }
        records += 1;
        bytes += record.header.length as u64;
    })?;
    // A mark may say anything: there are no more entries than records of the shortest kind.
    let most = found.length / RECORD_HEADER_BYTES as u64;
    let least = if bytes == 0 { 0 } else { found.length / bytes.div_ceil(records) / 2 };
    Ok(last.max(least).min(most))
}

/// The end of a file that a power cut left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Torn {
    /// Where it was cut off.
    pub position: u64,
    /// Bytes that were behind.
    pub bytes: u64,
    /// Sound records among them.
    pub sound_behind: u64,
    /// Where they are kept.
    pub kept: PathBuf,
}

/// Cuts off what is behind `position`, where a bad record begins, if it is what a power cut left; keeps it aside.
///
/// # Errors
/// [`BackupError::Damage`] when it isn't, or what the system says.
fn cut_torn(disk: &dyn Disk, path: &Path, found: &Found, position: u64) -> Result<Torn, BackupError> {
    let error = |action| move |error: io::Error| BackupError::io(path, action, error);
    let judged = judge(&*found.file, &found.header, position, found.length);
    let sound_behind = match judged.map_err(error("read it"))? {
        Bad::Torn { sound_behind } => sound_behind,
        Bad::Damage { later } => {
            return Err(BackupError::Damage { path: path.to_path_buf(), offset: position, later });
        }
    };
    let kept = torn_path(path, position);
    copy_end(disk, &*found.file, position, found.length, &kept)
        .map_err(|error| BackupError::io(&kept, "keep the torn end of the backup file there", error))?;
    found.file.set_length(position).map_err(error("cut off its torn end"))?;
    found.file.sync().map_err(error("sync it"))?;
    Ok(Torn { position, bytes: found.length - position, sound_behind, kept })
}

fn copy_end(disk: &dyn Disk, file: &dyn DiskFile, from: u64, to: u64, kept: &Path) -> io::Result<()> {
    let target = disk.create(kept)?;
    let mut buffer = vec![0; 1 << 20];
    let mut at = from;
    while at < to {
        let count = file.read_at(&mut buffer, at)?;
        if count == 0 {
            break;
        }
        target.write_at(&buffer[..count], at - from)?;
        at += count as u64;
    }
    target.sync()?;
    disk.sync_directory(kept)
}

/// Loads all of `found` into the empty table with the calling thread alone, but for its torn end, if it has one, which is cut off.
///
/// # Errors
/// Every way in which a file can't be loaded: see [`BackupError`]. The segment is to be thrown away then.
pub fn load_alone(
    disk: &dyn Disk,
    path: &Path,
    found: &Found,
    table: &Table,
    slot: &WorkerSlot,
    end: u64,
) -> Result<Loaded, BackupError> {
    let loading = Loading::new(table, found);
    loading.prepare(path, found, slot)?;
    let mut frames = Frames::new(&*found.file, end);
    let mut block = Block::default();
    let reading = |error| BackupError::io(path, "read it", error);
    let mut next = frames.next_block(&mut block).map_err(reading)?;
    while next == Next::Block {
        loading.apply(slot, &block)?;
        if loading.bad().is_some() {
            break;
        }
        next = frames.next_block(&mut block).map_err(reading)?;
    }
    loading.conclude(disk, path, found, &frames, next)
}

/// Where the file that was walked through ends.
fn mark_of(found: &Found, frames: &Frames<'_>) -> Mark {
    let (position, sequence, chain) = frames.reached();
    Mark { generation: found.header.generation, position, sequence, chain }
}

/// How a load ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Loaded {
    /// Everything is there.
    Whole {
        /// What was cut off.
        torn: Option<Torn>,
    },
    /// Records behind the torn end were applied already: to be done again, up to where the file ends now.
    Again {
        /// What was cut off.
        torn: Torn,
    },
}
