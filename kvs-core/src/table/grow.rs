//! Growth: an eighth more homes, one home at a time, each step a transaction of its own.
//!
//! A step moves the entries of the highest old home that is still in use to where the larger number of homes wants
//! them, always upward or not at all. Its words are noted, and so stored, in the order that lock-free readers need:
//! 1. the entries' slots at their new places;
//! 2. the headers of the new homes, whose reach covers those;
//! 3. the geometry, which sends readers there;
//! 4. the old slots, now empty;
//! 5. the old home's header.
//!
//! An insert takes a few steps along while its shard grows, so growth ends long before the next one is due. Memory is
//! reserved a little with each insert beforehand: no request waits for the kernel to clear megabytes.
//!
//! Lock: the shard's. A crash completes the step or finds it not begun.

use arrayvec::ArrayVec;

use super::bucket::{BucketHeader, Buckets, Slot};
use super::entry::Entry;
use super::geometry::Geometry;
use super::hash::KeyHash;
use super::write::ShardWriter;
use super::{Table, TableError};
use crate::arena::extents;
use crate::segment::OutOfMemory;
use crate::segment::layout::{
    BUCKET_RESERVE_BYTES, BUCKET_SLOTS, MOVES_MAX, REACH_MAX, WorkerSlot, round_up,
};
use crate::sys::memory::{Damaged, Word};
use crate::transaction::Transaction;

/// Entries per hundred slots at which a shard begins to grow.
const FILL_PERCENT_MAX: u64 = 82;
/// Entries per hundred slots at which memory for growing is reserved.
const FILL_PERCENT_RESERVE: u64 = 81;
/// Steps an insert takes along.
const STEPS_PER_INSERT: usize = 8;
/// Most bucket memory that one insert reserves, in bytes.
const RESERVE_AT_ONCE: u64 = 16 * BUCKET_RESERVE_BYTES;

/// Entries per hundred slots of a shard that is made for them.
const FILL_PERCENT_PRESIZED: u64 = 80;

impl Table {
    /// Gives every shard of a table that is still empty, and nobody else uses, the size for its part of `entries`.
    ///
    /// # Errors
    /// [`TableError::Full`] when there is no memory for that many; some shards may have theirs.
    pub fn presize(&self, slot: &WorkerSlot, entries: u64) -> Result<(), TableError> {
        let shard_count = self.segment.regions().shard_count;
        let slots = entries as f64 / shard_count as f64 * 100.0 / FILL_PERCENT_PRESIZED as f64;
        for index in 0..shard_count {
            let geometry = Geometry::for_homes(slots / BUCKET_SLOTS as f64, index, shard_count);
            let shard = self.segment.shard(index)?;
            let mut transaction = Transaction::begin(&self.segment, slot);
            transaction.lock_shard(index)?;
            let reserved = shard.reserved_bytes.load();
            let wanted = round_up(geometry.bytes(), BUCKET_RESERVE_BYTES).max(reserved);
            if wanted > self.segment.regions().bucket_region_bytes {
                return Err(OutOfMemory.into());
            }
            if shard.entries.load() == 0 && wanted > reserved {
                let start = self.segment.regions().bucket_region(index) + reserved;
                extents::reserve(&mut transaction, start, wanted - reserved)?;
                transaction.store(&shard.reserved_bytes, wanted);
                transaction.store(&shard.geometry, geometry.word());
                transaction.commit()?;
            }
        }
        // Nobody uses them yet, so nobody waits.
        for page in self.segment.huge_pages()? {
            if let Err(error) = self.segment.collapse(page) {
                log::debug!("buckets stay in small pages: {error}");
                break;
            }
        }
        Ok(())
    }
}

/// An entry that a step looks at.
struct Moving<'v> {
    bucket: u64,
    slot: &'v Word,
    hash: KeyHash,
}

impl ShardWriter<'_, '_> {
    /// Does an insert's share of the growth that is due, if any. Failing to get memory is no failure: the shard gets
    /// fuller, and is tried again with the next insert.
    pub(super) fn grow_a_little(&mut self) -> Result<(), TableError> {
        let geometry = self.geometry()?;
        let slots = u64::from(geometry.homes) * BUCKET_SLOTS as u64;
        let filled = self.shard.entries.load().saturating_mul(100);
        if !geometry.is_growing() && filled < slots * FILL_PERCENT_RESERVE {
            return Ok(());
        }
        if self.shard.reserved_bytes.load() < geometry.next_bytes() {
            return match self.reserve_buckets(geometry) {
                Err(TableError::Full(_)) => Ok(()),
                done => done,
            };
        }
        if !geometry.is_growing() && filled < slots * FILL_PERCENT_MAX {
            return Ok(());
        }
        for _ in 0..STEPS_PER_INSERT {
            if !self.step()? || !self.geometry()?.is_growing() {
                break;
            }
        }
        Ok(())
    }

    /// Grows until there may be room where there was none; an error when that can't be.
    pub(super) fn grow_now(&mut self) -> Result<(), TableError> {
        while self.shard.reserved_bytes.load() < self.geometry()?.next_bytes() {
            self.reserve_buckets(self.geometry()?)?;
        }
        if self.step()? { Ok(()) } else { Err(OutOfMemory.into()) }
    }

    fn reserve_buckets(&mut self, geometry: Geometry) -> Result<(), TableError> {
        let reserved = self.shard.reserved_bytes.load();
        let wanted = round_up(geometry.next_bytes(), BUCKET_RESERVE_BYTES).saturating_sub(reserved);
        let bytes = wanted.min(RESERVE_AT_ONCE);
        let regions = self.table.segment.regions();
        if reserved + bytes > regions.bucket_region_bytes {
            return Err(OutOfMemory.into());
        }
        extents::reserve(self.transaction, regions.bucket_region(self.index) + reserved, bytes)?;
        self.transaction.store(&self.shard.reserved_bytes, reserved + bytes);
        Ok(self.transaction.checkpoint()?)
    }

    /// Moves one home; false when there is no room for its entries where they belong.
    fn step(&mut self) -> Result<bool, TableError> {
        let geometry = self.geometry()?;
        let home = geometry.frontier - 1;
        let buckets = Buckets::of(&self.table.segment, self.index);
        let Some(moving) = self.entries_of_old_home(buckets, geometry, home)? else { return Ok(false) };
        let mut headers = NewHeaders::default();
        let mut taken = ArrayVec::<_, MOVES_MAX>::new();
        for entry in &moving {
            let new_home = geometry.new_home(entry.hash.0);
            let bucket = if entry.bucket >= new_home {
                entry.bucket
            } else {
                let Some((bucket, slot)) = free_slot(buckets, new_home, &taken)? else { return Ok(false) };
                taken.push((entry.slot, slot));
                bucket
            };
            headers.reach(new_home, bucket - new_home);
        }
        for (from, to) in &taken {
            self.transaction.store_first(to, from.load());
        }
        self.note_headers(buckets, u64::from(home), &headers)?;
        self.transaction.store_first(&self.shard.geometry, geometry.after_step().word());
        for (from, _) in taken {
            self.transaction.store_first(from, 0);
        }
        if !headers.contains(u64::from(home)) {
            let old = buckets.header(u64::from(home))?;
            self.transaction.store_first(&buckets.get(u64::from(home))?.header, old.changed(0).word());
        }
        self.transaction.checkpoint()?;
        Ok(true)
    }

    /// The entries within reach of old home `home` that are at home there; None when they are more than a step moves.
    fn entries_of_old_home<'v>(
        &self,
        buckets: Buckets<'v>,
        geometry: Geometry,
        home: u32,
    ) -> Result<Option<ArrayVec<Moving<'v>, MOVES_MAX>>, Damaged> {
        let view = self.table.segment.memory();
        let first = u64::from(home);
        let within = first..=first + buckets.header(first)?.reach;
        for bucket in within.clone() {
            let slots = &buckets.get(bucket)?.slots;
            slots
                .iter()
                .filter_map(|word| Slot::decode(word.load()))
                .for_each(|slot| Entry::prefetch(view, slot.offset));
        }
        let mut moving = ArrayVec::new();
        for bucket in within {
            for word in &buckets.get(bucket)?.slots {
                let Some(slot) = Slot::decode(word.load()) else { continue };
                let entry = Entry::load(view, slot.offset)?.ok_or(Damaged { offset: slot.offset })?;
                let hash = entry.hash(self.table.seed)?;
                if geometry.is_old_home(hash.0, home)
                    && moving.try_push(Moving { bucket, slot: word, hash }).is_err()
                {
                    return Ok(None);
                }
            }
        }
        Ok(Some(moving))
    }

    fn note_headers(
        &mut self,
        buckets: Buckets<'_>,
        old_home: u64,
        headers: &NewHeaders,
    ) -> Result<(), Damaged> {
        for &(home, reach) in &headers.homes {
            let header: BucketHeader = buckets.header(home)?;
            // A home that entries lead to already keeps them in reach; the old home is one of those until the
            // geometry says otherwise.
            debug_assert!(home >= old_home);
            self.transaction
                .store(&buckets.get(home)?.header, header.changed(reach.max(header.reach)).word());
        }
        Ok(())
    }
}

/// A free slot within reach of `home` that is not taken yet; None when there is none. A slot that this step empties is
/// not free: readers may still come to it for what was there.
fn free_slot<'v>(
    buckets: Buckets<'v>,
    home: u64,
    taken: &[(&'v Word, &'v Word)],
) -> Result<Option<(u64, &'v Word)>, Damaged> {
    for bucket in home..=home + REACH_MAX {
        for slot in &buckets.get(bucket)?.slots {
            if slot.load() == 0 && !taken.iter().any(|(_, other)| std::ptr::eq(*other, slot)) {
                return Ok(Some((bucket, slot)));
            }
        }
    }
    Ok(None)
}

/// New homes of one step, with the reach their entries need. A step has one or two of them, three at most.
#[derive(Default)]
struct NewHeaders {
    homes: ArrayVec<(u64, u64), MOVES_MAX>,
}

impl NewHeaders {
    fn reach(&mut self, home: u64, reach: u64) {
        match self.homes.iter_mut().find(|(known, _)| *known == home) {
            Some((_, known)) => *known = (*known).max(reach),
            None => self.homes.push((home, reach)),
        }
    }

    fn contains(&self, home: u64) -> bool {
        self.homes.iter().any(|(known, _)| *known == home)
    }
}
