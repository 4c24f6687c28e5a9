//! The pointer chase: two dependent random accesses per operation, in the memory that lookups of the table touch. What remains
//! of a lookup when everything is taken away but its misses.
//!
//! A random bucket in use, as a lookup chooses its home, then a random cache line of the extents in use, where the entries are. What the
//! first load gives is part of the second address, and what the second gives is part of the next operation's first address, by
//! way of a mask that is zero, which neither compiler nor processor knows before the load is done. Nothing is computed ahead
//! but where the buckets of each shard begin. [`Chase::overlapped`] leaves the link from one operation to the next away: the
//! processor may then begin an operation before the one before has its data, as it may with lookups of keys known beforehand.

use std::hint::black_box;
use std::sync::Arc;

use anyhow::{Result, ensure};
use kvs_core::segment::SegmentView;
use kvs_core::segment::layout::{BUCKET_BYTES, EXTENT_BYTES, Shard};
use kvs_core::sys::memory::Damaged;
use kvs_core::table::geometry::Geometry;

const LINE_BYTES: u64 = 64;
const PAGE_BYTES: u64 = 4096;

/// The homes of one shard.
#[derive(Clone, Copy)]
struct Homes {
    start: u64,
    count: u64,
}

/// A chase through one segment, of one thread.
pub struct Chase {
    segment: Arc<SegmentView>,
    shards: Vec<Homes>,
    entries_start: u64,
    entry_lines: u64,
    /// Zero.
    mask: u64,
    state: u64,
}

impl Chase {
    /// One through what is in use in `segment` now, which mustn't grow meanwhile.
    pub fn new(segment: &Arc<SegmentView>, seed: u64) -> Result<Self> {
        let (view, regions) = (segment.view(), segment.regions());
        let homes = |index| -> Result<Homes, Damaged> {
            let offset = regions.shard(index);
            let shard: &Shard = view.object(offset)?;
            let geometry =
                Geometry::decode(shard.geometry.load()).ok_or(Damaged { offset: offset.bytes() })?;
            Ok(Homes { start: regions.bucket_region(index), count: u64::from(geometry.homes) })
        };
        let shards = (0..regions.shard_count).map(homes).collect::<Result<_, _>>()?;
        let extents = segment.header()?.extents_reserved.load().min(regions.extent_count);
        ensure!(extents > 0, "there is nothing in the store");
        let entry_lines = extents * (EXTENT_BYTES / LINE_BYTES);
        Ok(Self {
            segment: Arc::clone(segment),
            shards,
            entries_start: regions.data,
            entry_lines,
            mask: black_box(0),
            state: seed,
        })
    }

    /// Touches every page of what is chased through, so that no first access is left to pay for.
    pub fn touch(&self) -> Result<()> {
        let touch = |start: u64, bytes: u64| {
            (start..start + bytes).step_by(PAGE_BYTES as usize).try_for_each(|offset| {
                black_box(self.segment.view().word(offset)?.load());
                Ok::<_, Damaged>(())
            })
        };
        for homes in &self.shards {
            touch(homes.start, homes.count * BUCKET_BYTES)?;
        }
        Ok(touch(self.entries_start, self.entry_lines * LINE_BYTES)?)
    }

    /// One operation, whose first access waits for the second of the one before.
    #[inline(always)]
    pub fn step(&mut self) -> Result<(), Damaged> {
        let last = self.access()?;
        self.state = self.state.wrapping_add(last & self.mask);
        Ok(())
    }

    /// One operation that waits for none before.
    #[inline(always)]
    pub fn overlapped(&mut self) -> Result<(), Damaged> {
        black_box(self.access()?);
        Ok(())
    }

    /// A bucket, then an entry.
    #[inline(always)]
    fn access(&mut self) -> Result<u64, Damaged> {
        let random = self.random();
        let shard = self.shards[random as usize & (self.shards.len() - 1)];
        let bucket = shard.start + part_of(random, shard.count) * BUCKET_BYTES;
        let word = self.segment.view().word(bucket)?.load();
        // Other bits than the bucket's, so that each bucket leads everywhere.
        let random = (random.rotate_left(32) ^ word & self.mask).wrapping_mul(MULTIPLIER);
        let line = self.entries_start + part_of(random, self.entry_lines) * LINE_BYTES;
        Ok(self.segment.view().word(line)?.load())
    }

    /// SplitMix64.
    #[inline(always)]
    fn random(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.state ^ self.state >> 30).wrapping_mul(MULTIPLIER);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }
}

const MULTIPLIER: u64 = 0xbf58_476d_1ce4_e5b9;

/// `random`, as a fraction of 2^64, of `count`.
#[inline(always)]
fn part_of(random: u64, count: u64) -> u64 {
    ((u128::from(random) * u128::from(count)) >> 64) as u64
}

#[cfg(test)]
mod tests {
    //! Goal: the chase goes through what is in use, and nowhere else, evenly. Method: a small table in this process's memory.

    use std::collections::HashSet;

    use kvs_core::segment::Segment;
    use kvs_core::segment::layout::WorkerSlot;
    use kvs_core::table::Table;
    use kvs_core::transaction::Transaction;
    use kvs_core::wire::SetCondition;

    use super::*;

    fn segment(entries: u32) -> Arc<SegmentView> {
        let segment = Segment::on_heap(64 << 20).expect("heap memory");
        let slot: &WorkerSlot = segment.memory().object(segment.regions().worker(0)).expect("there is one");
        let table = Table::new(&segment).expect("sound");
        for number in 0..entries {
            let key = number.to_le_bytes();
            let mut transaction = Transaction::begin(&segment, slot);
            let hash = table.hash_of(&key);
            table.set(&mut transaction, hash, &key, &[7; 32], SetCondition::Always).expect("room");
            transaction.commit().expect("small");
        }
        Arc::new(SegmentView::of(&segment))
    }

    #[test]
    fn chase_goes_on_from_what_it_reads_and_stays_inside() {
        let segment = segment(2000);
        let mut chase = Chase::new(&segment, 1).expect("something to chase through");
        chase.touch().expect("inside");
        let mut states = HashSet::new();
        for _ in 0..20_000 {
            chase.step().expect("inside");
            states.insert(chase.state);
        }
        assert_eq!(states.len(), 20_000, "it goes round in circles");
        (0..20_000).try_for_each(|_| chase.overlapped()).expect("inside");
    }

    #[test]
    fn chase_places_are_spread_evenly() {
        let mut chase = Chase::new(&segment(2000), 1).expect("something to chase through");
        let mut counts = [0u32; 16];
        for _ in 0..16_000 {
            let random = chase.random();
            counts[part_of(random, 16) as usize] += 1;
        }
        assert!(counts.iter().all(|count| (800..1200).contains(count)), "{counts:?}");
    }

    #[test]
    fn chase_through_nothing_is_refused() {
        assert!(Chase::new(&segment(0), 1).is_err());
    }
}
