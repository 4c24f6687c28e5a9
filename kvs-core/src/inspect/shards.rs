//! Fill and probe lengths of shards.

use super::memory::{ClassFigures, classes_of};
use crate::segment::SegmentView;
use crate::segment::layout::{BUCKET_SLOTS, REACH_MAX, Shard};
use crate::sys::memory::Damaged;
use crate::table::bucket::Buckets;
use crate::table::geometry::Geometry;

/// A shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardFigures {
    /// Which one.
    pub index: u64,
    /// Live entries.
    pub entries: u64,
    /// Bytes of their keys and values.
    pub content_bytes: u64,
    /// Home buckets.
    pub homes: u64,
    /// Of a growth under way, how much is done, in percent.
    pub growing_percent: Option<u64>,
    /// Memory of its buckets, in bytes.
    pub bucket_bytes: u64,
    /// Entries that lie so many buckets behind their home at most, by home: how many homes have which reach.
    pub reaches: Vec<u64>,
    /// How many buckets have how many slots in use.
    pub occupancy: [u64; BUCKET_SLOTS + 1],
    /// Version that the next change gets.
    pub next_version: u64,
    /// It was found damaged and is set aside.
    pub quarantined: bool,
}

impl ShardFigures {
    /// Slots of its homes that are in use, in percent.
    pub fn fill_percent(&self) -> f64 {
        let slots = self.homes.max(1) * BUCKET_SLOTS as u64;
        self.entries as f64 * 100.0 / slots as f64
    }

    /// Buckets that the longest lookup looks at, its home included.
    pub fn longest_probe(&self) -> u64 {
        self.reaches.iter().rposition(|&homes| homes > 0).map_or(1, |reach| reach as u64 + 1)
    }
}

/// Shard `index`.
///
/// # Errors
/// [`Damaged`] when there is none, or its geometry can't be.
pub fn figures(view: &SegmentView, index: u64) -> Result<ShardFigures, Damaged> {
    let (shard, geometry) = shard_of(view, index)?;
    let mut reaches = vec![0; REACH_MAX as usize + 1];
    let mut occupancy = [0; BUCKET_SLOTS + 1];
    let buckets = Buckets::new(view.view(), view.regions(), index);
    for number in 0..geometry
        .buckets()
        .min(shard.reserved_bytes.load() / size_of::<crate::table::bucket::Bucket>() as u64)
    {
        let used = buckets.get(number)?.slots.iter().filter(|slot| slot.load() != 0).count();
        occupancy[used] += 1;
        if let Ok(header) = buckets.header(number) {
            reaches[header.reach as usize] += 1;
        }
    }
    let homes = u64::from(if geometry.is_growing() { geometry.next_homes() } else { geometry.homes });
    let moved = u64::from(geometry.homes - geometry.frontier);
    Ok(ShardFigures {
        index,
        entries: shard.entries.load(),
        content_bytes: shard.content_bytes.load(),
        homes,
        growing_percent: geometry.is_growing().then(|| moved * 100 / u64::from(geometry.homes)),
        bucket_bytes: shard.reserved_bytes.load(),
        reaches,
        occupancy,
        next_version: shard.next_version.load(),
        quarantined: shard.quarantined.load() != 0,
    })
}

/// The size classes of shard `index` that have a slab.
///
/// # Errors
/// [`Damaged`] when there is no such shard.
pub fn classes(view: &SegmentView, index: u64) -> Result<Vec<ClassFigures>, Damaged> {
    let shard: &Shard = view.view().object(view.regions().shard(index))?;
    Ok(classes_of(view, shard).into_iter().filter(|class| class.slabs > 0).collect())
}

fn shard_of(view: &SegmentView, index: u64) -> Result<(&Shard, Geometry), Damaged> {
    let offset = view.regions().shard(index);
    let damaged = Damaged { offset: offset.bytes() };
    if index >= view.regions().shard_count {
        return Err(damaged);
    }
    let shard: &Shard = view.view().object(offset)?;
    Ok((shard, Geometry::decode(shard.geometry.load()).ok_or(damaged)?))
}
