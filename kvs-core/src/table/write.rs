//! Changing the table, under the shard's lock and inside the caller's transaction.
//!
//! A change builds its entry in a free block and notes, in this order: the blocks it takes, the entry's version word,
//! the slot (the publish), the home's header, the shard's counters, the block it frees, the head of its worker's backup ring. It commits nothing: the
//! caller adds its own words, and one decision covers all. Growth that is due happens first, in steps that are
//! decisions of their own.
//!
//! Lock: the shard's, held by the transaction. A crash is the transaction's affair.

use std::fmt::Write as _;

use arrayvec::ArrayString;

use super::bucket::{BucketHeader, Buckets, Slot};
use super::entry::{self, Content, Entry};
use super::geometry::Geometry;
use super::hash::KeyHash;
use super::{Table, TableError};
use crate::arena::block_list::Chunk;
use crate::arena::{extents, size_class, slab};
use crate::backup::ring;
use crate::segment::OutOfMemory;
use crate::segment::layout::{BLOCK_BYTES, REACH_MAX, Shard};
use crate::sys::memory::{Damaged, Word};
use crate::transaction::Transaction;
use crate::wire::SetCondition;

/// Digits of the longest number of 64 bits, and its sign.
pub(crate) const DIGITS_MAX: usize = 20;

/// One shard, locked for a change.
pub(super) struct ShardWriter<'w, 's> {
    pub(super) table: &'w Table,
    pub(super) transaction: &'w mut Transaction<'s>,
    pub(super) shard: &'s Shard,
    pub(super) index: u64,
}

/// Where a key is, or may go.
struct Located<'w> {
    home: u64,
    header_word: &'w Word,
    header: BucketHeader,
    found: Option<Found<'w>>,
    free: Option<(u64, &'w Word)>,
}

struct Found<'w> {
    bucket: u64,
    slot: &'w Word,
    entry: Entry<'w>,
}

impl<'w, 's> ShardWriter<'w, 's> {
    /// Locks the shard of `hash`.
    pub(super) fn begin(
        table: &'w Table,
        transaction: &'w mut Transaction<'s>,
        hash: KeyHash,
    ) -> Result<Self, TableError> {
        let index = hash.shard(table.segment.regions().shard_count);
        let shard = transaction.lock_shard(index)?;
        if shard.quarantined.load() != 0 {
            return Err(TableError::Quarantined { shard: index });
        }
        Ok(Self { table, transaction, shard, index })
    }

    pub(super) fn geometry(&self) -> Result<Geometry, Damaged> {
        let damaged = Damaged { offset: self.table.segment.regions().shard(self.index).bytes() };
        Geometry::decode(self.shard.geometry.load()).ok_or(damaged)
    }

    fn locate(&self, hash: KeyHash, key: &[u8]) -> Result<Located<'w>, Damaged> {
        let buckets = Buckets::of(&self.table.segment, self.index);
        let home = self.geometry()?.home(hash.0);
        let header = buckets.header(home)?;
        let header_word = &buckets.get(home)?.header;
        let mut located = Located { home, header_word, header, found: None, free: None };
        for bucket in home..=home + REACH_MAX {
            let in_reach = bucket <= home + header.reach;
            if !in_reach && located.free.is_some() {
                break;
            }
            for word in &buckets.get(bucket)?.slots {
                match Slot::decode(word.load()) {
                    None => located.free = located.free.or(Some((bucket, word))),
                    Some(slot) if in_reach && slot.tag == hash.tag() => {
                        let entry = self.entry(slot.offset)?;
                        if entry.has_key(key)? {
                            located.found = Some(Found { bucket, slot: word, entry });
                            return Ok(located);
                        }
                    }
                    Some(_) => {}
                }
            }
        }
        Ok(located)
    }

    fn entry(&self, offset: u64) -> Result<Entry<'w>, Damaged> {
        Entry::load(self.table.segment.memory(), offset)?.ok_or(Damaged { offset })
    }

    /// Notes that `key` gets `content`; false when the condition forbids it.
    pub(super) fn set(
        mut self,
        hash: KeyHash,
        key: &[u8],
        content: &Content<'_>,
        condition: SetCondition,
    ) -> Result<bool, TableError> {
        self.check_backup(key, content.inline_length())?;
        let mut located = self.locate(hash, key)?;
        if located.found.is_some() && condition == SetCondition::IfAbsent {
            return Ok(false);
        }
        if located.found.is_none() {
            located = self.make_room(hash, key, located)?;
        }
        let version = self.shard.next_version.load();
        self.put(&located, hash, key, content, version)?;
        Ok(true)
    }

    /// Notes that `key` has had `content` since `version`, unless it has a later one; false then.
    pub(super) fn restore(
        mut self,
        hash: KeyHash,
        key: &[u8],
        content: &Content<'_>,
        version: u64,
    ) -> Result<bool, TableError> {
        let mut located = self.locate(hash, key)?;
        match &located.found {
            Some(found) if found.entry.version() >= version => return Ok(false),
            Some(_) => {}
            None => located = self.make_room(hash, key, located)?,
        }
        self.put(&located, hash, key, content, version)?;
        Ok(true)
    }

    /// Notes that `key` is gone unless it has a later version than `version`.
    pub(super) fn restore_delete(
        mut self,
        hash: KeyHash,
        key: &[u8],
        version: u64,
    ) -> Result<bool, TableError> {
        let located = self.locate(hash, key)?;
        match &located.found {
            Some(found) if found.entry.version() < version => self.remove(&located, found)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Whether the change can go to the backup file's ring, too.
    fn check_backup(&self, key: &[u8], value_length: usize) -> Result<(), TableError> {
        let needed = ring::bytes_needed(key.len(), value_length);
        if self.table.backed_up && !ring::has_room(self.transaction.worker(), needed) {
            return Err(TableError::BackupBehind);
        }
        Ok(())
    }

    /// Notes that the number under `key` grows by `by`, and returns the sum.
    pub(super) fn increment(mut self, hash: KeyHash, key: &[u8], by: i64) -> Result<i64, TableError> {
        self.check_backup(key, DIGITS_MAX)?;
        let mut located = self.locate(hash, key)?;
        let number = match &located.found {
            Some(found) => number_in(&found.entry)?,
            None => 0,
        };
        let sum = number.checked_add(by).ok_or(TableError::NumberRange)?;
        if located.found.is_none() {
            located = self.make_room(hash, key, located)?;
        }
        let mut value = ArrayString::<DIGITS_MAX>::new();
        // It has room for every number.
        let _ = write!(value, "{sum}");
        let version = self.shard.next_version.load();
        if Table::fits_inline(key.len(), value.len()) {
            self.put(&located, hash, key, &Content::Inline(value.as_bytes()), version)?;
        } else {
            let chunks = self.chunks_of(key, value.as_bytes())?;
            let content =
                Content::Chunked { chunks: &chunks, tail: (0, 0), value_length: value.len() as u64 };
            self.put(&located, hash, key, &content, version)?;
        }
        Ok(sum)
    }

    /// Puts a key that fills a block by itself, and its small value, into chunks.
    fn chunks_of(&mut self, key: &[u8], value: &[u8]) -> Result<Vec<Chunk>, TableError> {
        let memory = self.transaction.memory();
        let mut content = key.to_vec();
        content.resize(key.len().next_multiple_of(8), 0);
        content.extend_from_slice(value);
        let mut chunks = Vec::new();
        let mut rest = &content[..];
        while !rest.is_empty() {
            let order = (rest.len() as u64 / BLOCK_BYTES).checked_ilog2().unwrap_or(0) as usize;
            let offset = extents::allocate(self.transaction, order)?;
            let (now, later) = rest.split_at(rest.len().min(extents::block_bytes(order) as usize));
            memory.write_bytes(offset, now)?;
            chunks.push(Chunk { offset, order });
            rest = later;
        }
        Ok(chunks)
    }

    /// Notes that `key` is gone; false when it wasn't there.
    pub(super) fn delete(mut self, hash: KeyHash, key: &[u8]) -> Result<bool, TableError> {
        self.check_backup(key, 0)?;
        let located = self.locate(hash, key)?;
        let Some(found) = &located.found else { return Ok(false) };
        self.remove(&located, found)?;
        let version = self.shard.next_version.load();
        self.transaction.store(&self.shard.next_version, version.saturating_add(1));
        if self.table.backed_up {
            ring::append_delete(self.transaction, key, version)?;
        }
        Ok(true)
    }

    fn remove(&mut self, located: &Located<'_>, found: &Found<'_>) -> Result<(), TableError> {
        let reach = self.reach_without(located, found)?;
        self.transaction.store(found.slot, 0);
        self.transaction.store(located.header_word, located.header.changed(reach).word());
        self.count(&self.shard.entries, 1, 0);
        self.count(&self.shard.content_bytes, length_of(&found.entry), 0);
        self.retire(&found.entry)
    }

    /// Lets the shard grow as it should, and more than that when there is no free slot within reach.
    fn make_room(
        &mut self,
        hash: KeyHash,
        key: &[u8],
        located: Located<'w>,
    ) -> Result<Located<'w>, TableError> {
        let before = self.geometry()?;
        self.grow_a_little()?;
        let mut located = if self.geometry()? == before { located } else { self.locate(hash, key)? };
        // Every home moves at most once in a growth; a second whole growth without room would be a defect.
        let mut steps = 3 * u64::from(before.homes);
        while located.free.is_none() {
            steps = steps.checked_sub(1).ok_or(OutOfMemory)?;
            self.grow_now()?;
            located = self.locate(hash, key)?;
        }
        Ok(located)
    }

    fn put(
        &mut self,
        located: &Located<'_>,
        hash: KeyHash,
        key: &[u8],
        content: &Content<'_>,
        version: u64,
    ) -> Result<(), TableError> {
        let class = size_class::class_for(content.block_bytes(key)).ok_or(OutOfMemory)?;
        let (bucket, slot) = match &located.found {
            Some(found) => (found.bucket, found.slot),
            None => located.free.ok_or(OutOfMemory)?,
        };
        let memory = self.transaction.memory();
        let offset = slab::allocate(self.transaction, self.index, class)?;
        let word0 = entry::build(memory, offset, key, content, version)?;
        self.transaction.store(memory.word(offset)?, word0);
        self.transaction.store(slot, Slot::new(hash, offset).word());
        let reach = located.header.reach.max(bucket - located.home);
        self.transaction.store(located.header_word, located.header.changed(reach).word());
        let next_version = self.shard.next_version.load().max(version.saturating_add(1));
        self.transaction.store(&self.shard.next_version, next_version);
        let replaced = located.found.as_ref().map(|found| &found.entry);
        if replaced.is_none() {
            self.count(&self.shard.entries, 0, 1);
        }
        let length = key.len() as u64 + content.value_length();
        self.count(&self.shard.content_bytes, replaced.map_or(0, length_of), length);
        replaced.map_or(Ok(()), |entry| self.retire(entry))?;
        if self.table.backed_up {
            ring::append_set(self.transaction, key, content, version, offset)?;
            if matches!(content, Content::Chunked { .. }) {
                self.table.pins.add_waiting(offset, content.value_length());
            }
        }
        Ok(())
    }

    fn count(&mut self, counter: &Word, less: u64, more: u64) {
        let value = self.transaction.load(counter).wrapping_sub(less).wrapping_add(more);
        self.transaction.store(counter, value);
    }

    /// Gives the entry's block back, or hands it to the worker's garbage list when it has chunks: giving back those
    /// takes transactions of its own.
    fn retire(&mut self, entry: &Entry<'_>) -> Result<(), TableError> {
        if !entry.is_chunked() {
            return Ok(slab::free(self.transaction, entry.offset)?);
        }
        let garbage = &self.transaction.worker().garbage;
        let next = self.transaction.load(garbage);
        self.transaction.store(entry.garbage_word()?, next);
        self.transaction.store(garbage, entry.offset);
        Ok(())
    }

    /// The reach that the home needs without the entry in `found`. Only the farthest can shorten it.
    fn reach_without(&self, located: &Located<'_>, found: &Found<'_>) -> Result<u64, Damaged> {
        let reach = located.header.reach;
        if reach == 0 || found.bucket != located.home + reach {
            return Ok(reach);
        }
        let buckets = Buckets::of(&self.table.segment, self.index);
        let geometry = self.geometry()?;
        for distance in (1..=reach).rev() {
            for word in &buckets.get(located.home + distance)?.slots {
                let Some(slot) = Slot::decode(word.load()).filter(|_| !std::ptr::eq(word, found.slot)) else {
                    continue;
                };
                if geometry.home(self.entry(slot.offset)?.hash(self.table.seed)?.0) == located.home {
                    return Ok(distance);
                }
            }
        }
        Ok(0)
    }
}

fn length_of(entry: &Entry<'_>) -> u64 {
    entry.key_length() + entry.value_length()
}

/// The decimal number that is the entry's value.
fn number_in(entry: &Entry<'_>) -> Result<i64, TableError> {
    let mut digits = [0u8; DIGITS_MAX];
    let length = entry.value_length() as usize;
    let digits = digits.get_mut(..length).ok_or(TableError::NotANumber)?;
    entry.copy_value(0, digits)?;
    let text = std::str::from_utf8(digits).map_err(|_| TableError::NotANumber)?;
    // Rust reads "+1" as a number too; what this store writes never begins so.
    let text = Some(text).filter(|text| !text.starts_with('+')).ok_or(TableError::NotANumber)?;
    text.parse().map_err(|_| TableError::NotANumber)
}
