//! What lock-free readers rely on.
//!
//! One that reads an image as it stands finds every key. For one that is in the midst of a read, each home says by its sequence
//! that a slot of one of its entries changed: after the change, and before the memory of the entry can be another's.

use std::mem::offset_of;

use kvs_core::arena::slab::{Meta, Slab, block_index, slab_of};
use kvs_core::segment::Segment;
use kvs_core::segment::layout::{BUCKET_BYTES, Shard};
use kvs_core::sys::memory::Offset;
use kvs_core::table::bucket::{BucketHeader, Buckets, Slot};
use kvs_core::table::entry::Entry;
use kvs_core::table::geometry::Geometry;

use crate::image::{Image, is_held};
use crate::pages::{Change, Pages};
use crate::store::{Expected, look_up};
use crate::violation::{demand, must, violation};

/// Looks every key up; how many requests a reader has seen happen, `seen` of which it saw before.
///
/// # Errors
/// A violation.
pub fn find_everything(image: &Image, expected: &Expected, mut seen: usize) -> anyhow::Result<usize> {
    for key in &expected.keys {
        let found = must("a reader is told", look_up(&image.table, key))?;
        let mut possible = seen..expected.models.len();
        seen = possible.find(|&done| expected.models[done].get(key) == found.as_ref()).ok_or_else(|| {
            let key = String::from_utf8_lossy(key);
            violation(format!("a reader finds {key:?} as it can't be, or as it was before it was changed"))
        })?;
    }
    Ok(seen)
}

/// Demands that in `after`, of each slot that isn't as it was `before`, the home has another sequence.
///
/// # Errors
/// A violation.
pub fn sequences_went_up(pages: &Pages, before: &Image, after: &Image) -> anyhow::Result<()> {
    for change in slots_changed(pages, before, after)? {
        for home in [home_of(before, change.offset, change.old)?, home_of(after, change.offset, change.new)?]
        {
            let Some(home) = home else { continue };
            let (was, now) = (header(before, change.offset, home)?, header(after, change.offset, home)?);
            demand!(was.sequence != now.sequence, "a slot of home {home} changed, its sequence did not");
        }
    }
    Ok(())
}

/// Demands that in the `image` no memory of an entry can be another's whose home doesn't say that it was replaced.
///
/// # Errors
/// A violation.
pub fn nothing_freed_unsaid(pages: &Pages, before: &Image, image: &Image) -> anyhow::Result<()> {
    for change in slots_changed(pages, before, image)? {
        let Some(slot) = Slot::decode(change.old) else { continue };
        let Some(home) = home_of(before, change.offset, change.old)? else { continue };
        // While the shard is locked, nobody takes a free block.
        let locked = is_held(&image.segment, &image.segment.shard(shard_of(image, change.offset))?.lock)?;
        if !locked && is_free(&image.segment, slot.offset)? {
            let (was, now) = (header(before, change.offset, home)?, header(image, change.offset, home)?);
            demand!(
                was.sequence != now.sequence,
                "the entry at {:#x} can be another's before the sequence of its home says that it was replaced",
                slot.offset
            );
        }
    }
    Ok(())
}

/// Watches the order of changes for readers that were in the midst of a read: each slot that changes, the sequence of its home
/// does afterwards, and before the shard's lock is free.
#[derive(Default)]
pub struct Order {
    /// Shards, and their headers that are still to change.
    awaited: Vec<(u64, u64)>,
    /// A growth step has another order: readers notice the geometry.
    grows: bool,
}

impl Order {
    /// These words have changed, and what came of it is `image`.
    ///
    /// # Errors
    /// A violation.
    pub fn follow(&mut self, image: &Image, changes: &[Change]) -> anyhow::Result<()> {
        let regions = image.segment.regions();
        let is_geometry = |change: &Change| {
            let at = offset_of!(Shard, geometry) as u64;
            (0..regions.shard_count).any(|index| regions.shard(index).bytes() + at == change.offset)
        };
        self.grows |= changes.iter().any(is_geometry);
        for change in changes.iter().filter(|change| (regions.buckets..regions.data).contains(&change.offset))
        {
            if (change.offset - regions.buckets).is_multiple_of(BUCKET_BYTES) {
                self.awaited.retain(|(_, header)| *header != change.offset);
                continue;
            }
            let shard = shard_of(image, change.offset);
            for word in [change.old, change.new] {
                let home = home_of(image, change.offset, word)?;
                let header = home.map(|home| regions.bucket_region(shard) + home * BUCKET_BYTES);
                self.awaited.extend(header.map(|header| (shard, header)));
            }
        }
        for (shard, header) in self.awaited.iter().filter(|_| !self.grows) {
            demand!(
                is_held(&image.segment, &image.segment.shard(*shard)?.lock)?,
                "shard {shard} is unlocked, and the header at {header:#x} did not change after a slot of its home"
            );
        }
        Ok(())
    }
}

/// Slots that differ.
fn slots_changed(pages: &Pages, before: &Image, after: &Image) -> anyhow::Result<Vec<Change>> {
    let regions = before.segment.regions();
    let mut changes = pages.differences(before.segment.memory(), after.segment.memory())?;
    changes.retain(|change| {
        (regions.buckets..regions.data).contains(&change.offset)
            && !(change.offset - regions.buckets).is_multiple_of(BUCKET_BYTES)
    });
    Ok(changes)
}

/// The shard that the bucket slot at `offset` belongs to.
fn shard_of(image: &Image, offset: u64) -> u64 {
    let regions = image.segment.regions();
    (offset - regions.buckets) / regions.bucket_region_bytes
}

/// The home of the entry that the slot at `offset`, whose word is `word`, names, if there is one.
fn home_of(image: &Image, offset: u64, word: u64) -> anyhow::Result<Option<u64>> {
    let Some(slot) = Slot::decode(word) else { return Ok(None) };
    let Some(entry) = Entry::load(image.segment.memory(), slot.offset)? else { return Ok(None) };
    let mut key = Vec::new();
    entry.copy_key(&mut key)?;
    let hash = image.table.hash_of(&key);
    let shard = image.segment.shard(shard_of(image, offset))?;
    Ok(Geometry::decode(shard.geometry.load()).map(|geometry| geometry.home(hash.0)))
}

/// The header of bucket `home` of the shard that the slot at `offset` belongs to.
fn header(image: &Image, offset: u64, home: u64) -> anyhow::Result<BucketHeader> {
    Ok(Buckets::of(&image.segment, shard_of(image, offset)).header(home)?)
}

/// Whether the block of an entry is marked free in its slab, or the slab is gone.
fn is_free(segment: &Segment, offset: u64) -> anyhow::Result<bool> {
    let slab: &Slab = segment.memory().object(Offset::new(slab_of(offset)))?;
    let Some(meta) = Meta::decode(slab.meta.load()) else { return Ok(true) };
    let Some(block) = block_index(offset, meta.class) else { return Ok(true) };
    Ok(slab.bitmap[(block / 64) as usize].load() >> (block % 64) & 1 == 1)
}
