//! A worker's backup ring: its changes, in order, on their way to the backup file.
//!
//! ```text
//! tail ── taken out by the backup thread          head ── put in by the worker
//!   │ record │ record │ record …                    │ free
//! record: 0   length (32) │ kind (8) │ 0 (8) │ key length (16)
//!         8   version
//!         16  value length            or, for a chunked value, where its entry is
//!         24  key, value, zeros up to a multiple of 8
//! ```
//!
//! Invariants
//! - A record's bytes are written while they are free, behind the head; the head moves in the transaction of the change. So a
//!   change that happened is in the ring, and one that did not isn't, whatever instruction the process died at.
//! - The head has one writer, its worker; the tail has one, the backup thread. Both only go up.
//! - The entry of a chunked value that a record names is pinned until the record is taken out; see [`pin_all`].
//!
//! No lock. A crash leaves head and tail as the last transactions left them, and the next data server goes on.

use super::record::Kind;
use crate::segment::Segment;
use crate::segment::layout::{BACKUP_RING_BYTES, WorkerSlot};
use crate::sys::memory::{Damaged, Memory};
use crate::table::Table;
use crate::table::entry::Content;
use crate::transaction::Transaction;

const RECORD_HEADER_BYTES: u64 = 24;
const LENGTH_BITS: u64 = 0xffff_ffff;
const KIND_SHIFT: u32 = 32;
const KEY_SHIFT: u32 = 48;

const KIND_SET: u64 = 1;
const KIND_DELETE: u64 = 2;
const KIND_CHUNKED: u64 = 3;

/// Room that a change of a key and an inline value of these lengths needs.
#[inline(always)]
pub const fn bytes_needed(key_length: usize, value_length: usize) -> u64 {
    RECORD_HEADER_BYTES + ((key_length + value_length) as u64).next_multiple_of(8)
}

/// Whether the ring of `slot` has room for `bytes` more.
#[inline(always)]
pub fn has_room(slot: &WorkerSlot, bytes: u64) -> bool {
    BACKUP_RING_BYTES - used(slot) >= bytes
}

/// Bytes in the ring of `slot`.
#[inline(always)]
pub fn used(slot: &WorkerSlot) -> u64 {
    slot.ring_head.load().wrapping_sub(slot.ring_tail.load()).min(BACKUP_RING_BYTES)
}

/// Where the ring of `slot` begins.
fn start_of(segment: &Segment, slot: &WorkerSlot) -> Result<u64, Damaged> {
    let first = segment.regions().worker(0).bytes();
    let offset = segment.memory().offset_of(&slot.intent).ok_or(Damaged { offset: 0 })?;
    Ok(segment.regions().ring((offset - first) / size_of::<WorkerSlot>() as u64))
}

/// Notes that `key` got `content`, the entry at `offset`; the transaction's worker has room for it.
#[inline]
pub(crate) fn append_set(
    transaction: &mut Transaction<'_>,
    key: &[u8],
    content: &Content<'_>,
    version: u64,
    offset: u64,
) -> Result<(), Damaged> {
    match content {
        Content::Inline(value) => append(transaction, KIND_SET, version, value.len() as u64, (key, value)),
        Content::Chunked { .. } => append(transaction, KIND_CHUNKED, version, offset, (b"", b"")),
    }
}

/// Notes that `key` is gone since `version`.
pub(crate) fn append_delete(
    transaction: &mut Transaction<'_>,
    key: &[u8],
    version: u64,
) -> Result<(), Damaged> {
    append(transaction, KIND_DELETE, version, 0, (key, b""))
}

fn append(
    transaction: &mut Transaction<'_>,
    kind: u64,
    version: u64,
    last: u64,
    (key, value): (&[u8], &[u8]),
) -> Result<(), Damaged> {
    let (memory, slot) = (transaction.memory(), transaction.worker());
    let start = start_of(transaction.segment(), slot)?;
    let head = slot.ring_head.load();
    let bytes = bytes_needed(key.len(), value.len());
    debug_assert!(has_room(slot, bytes));
    let word0 = (key.len() as u64) << KEY_SHIFT | kind << KIND_SHIFT | bytes;
    for (index, word) in [word0, version, last].into_iter().enumerate() {
        memory.store(memory.word(start + (head + index as u64 * 8) % BACKUP_RING_BYTES)?, word);
    }
    let at = head + RECORD_HEADER_BYTES;
    write(memory, start, at, key)?;
    write(memory, start, at + key.len() as u64, value)?;
    transaction.store(&slot.ring_head, head + bytes);
    Ok(())
}

fn write(memory: &Memory, start: u64, at: u64, bytes: &[u8]) -> Result<(), Damaged> {
    let within = at % BACKUP_RING_BYTES;
    let (first, second) = bytes.split_at(bytes.len().min((BACKUP_RING_BYTES - within) as usize));
    memory.write_bytes(start + within, first)?;
    memory.write_bytes(start, second)
}

/// A change on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// What it says of the key.
    pub kind: Kind,
    /// The key's version from then on.
    pub version: u64,
    /// Bytes of the key.
    pub key_length: usize,
    /// Bytes of the value.
    pub value_length: usize,
    /// Where the entry is whose chunks hold key and value; 0 when they are in the ring.
    pub entry: u64,
    /// Bytes it takes in the ring.
    pub bytes: u64,
    at: u64,
}

/// One ring, to be read.
pub struct Ring<'s> {
    memory: &'s Memory,
    start: u64,
}

impl<'s> Ring<'s> {
    /// The ring of `slot`.
    ///
    /// # Errors
    /// [`Damaged`] when the slot isn't one of the segment's.
    pub fn of(segment: &'s Segment, slot: &WorkerSlot) -> Result<Self, Damaged> {
        Ok(Self { memory: segment.memory(), start: start_of(segment, slot)? })
    }

    /// The record at position `at`, below the head `head`.
    ///
    /// # Errors
    /// [`Damaged`] when there can be none.
    pub fn record(&self, at: u64, head: u64) -> Result<Record, Damaged> {
        let damaged = Damaged { offset: self.start + at % BACKUP_RING_BYTES };
        let word = |index: u64| {
            self.memory.word(self.start + (at + index * 8) % BACKUP_RING_BYTES).map(|word| word.load())
        };
        let (word0, version, last) = (word(0)?, word(1)?, word(2)?);
        let bytes = word0 & LENGTH_BITS;
        let key_length = (word0 >> KEY_SHIFT) as usize;
        let (kind, value_length, entry) = match word0 >> KIND_SHIFT & 0xff {
            KIND_SET => (Kind::Set, last, 0),
            KIND_DELETE => (Kind::Delete, 0, 0),
            KIND_CHUNKED => (Kind::Set, 0, last),
            _ => return Err(damaged),
        };
        let fits = value_length < BACKUP_RING_BYTES
            && bytes == bytes_needed(key_length, value_length as usize)
            && bytes <= head.wrapping_sub(at);
        if !fits {
            return Err(damaged);
        }
        Ok(Record { kind, version, key_length, value_length: value_length as usize, entry, bytes, at })
    }

    /// Appends the key and the value of `record` to `target`.
    ///
    /// # Errors
    /// [`Damaged`] never, for a record that was read.
    pub fn copy(&self, record: &Record, target: &mut Vec<u8>) -> Result<(), Damaged> {
        let from = target.len();
        target.resize(from + record.key_length + record.value_length, 0);
        let target = &mut target[from..];
        let within = (record.at + RECORD_HEADER_BYTES) % BACKUP_RING_BYTES;
        let in_first = target.len().min((BACKUP_RING_BYTES - within) as usize);
        let (first, second) = target.split_at_mut(in_first);
        self.memory.read_bytes(self.start + within, first)?;
        self.memory.read_bytes(self.start, second)
    }
}

/// Pins every large value that waits in the ring of `slot`, as the worker had: called before anything is freed, by a data
/// server whose predecessor died.
///
/// # Errors
/// [`Damaged`] when the ring contradicts itself.
pub fn pin_all(table: &Table, slot: &WorkerSlot) -> Result<(), Damaged> {
    let ring = Ring::of(table.segment(), slot)?;
    let (mut at, head) = (slot.ring_tail.load(), slot.ring_head.load());
    if head.wrapping_sub(at) > BACKUP_RING_BYTES {
        return Err(Damaged { offset: ring.start });
    }
    while at < head {
        let record = ring.record(at, head)?;
        if record.entry != 0 {
            table.pin_entry(record.entry)?;
        }
        at += record.bytes;
    }
    Ok(())
}
