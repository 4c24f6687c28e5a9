//! Where the memory of a segment went.

use crate::arena::extents::{block_bytes, free_in_extent};
use crate::arena::size_class::{SIZES, blocks};
use crate::arena::slab::{Meta, SLAB_BYTES, Slab};
use crate::segment::layout::{EXTENT_BYTES, Extent, ORDERS, SIZE_CLASSES, Shard};
use crate::segment::{SegmentView, memory_bytes};
use crate::sys::memory::{Damaged, Offset};

/// Most slabs of one list that are looked at: a damaged list may have no end.
const SLABS_MAX: u64 = 1 << 24;

/// A size class over all shards, or over one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClassFigures {
    /// Size of its blocks, in bytes.
    pub block_bytes: u64,
    /// Its slabs.
    pub slabs: u64,
    /// Blocks in use.
    pub used: u64,
    /// Blocks that are free.
    pub free: u64,
}

/// Where the memory went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryFigures {
    /// Taken from the kernel, in bytes.
    pub reserved_bytes: u64,
    /// Of it, header, shards, free bits, worker and connection slots, backup rings, sessions.
    pub fixed_bytes: u64,
    /// Of it, buckets.
    pub bucket_bytes: u64,
    /// Of it, data extents.
    pub extent_bytes: u64,
    /// Of those, slabs.
    pub slab_bytes: u64,
    /// Of those, chunks of large values, buffers of connections and lists.
    pub block_bytes: u64,
    /// Of those, free.
    pub free_bytes: u64,
    /// Free blocks of each size, from 4 KiB to 2 MiB.
    pub free_blocks: [u64; ORDERS],
    /// Size classes with a slab, the smallest first.
    pub classes: Vec<ClassFigures>,
}

/// Where the memory of `view` went.
///
/// # Errors
/// [`Damaged`] when the header's counts can't be.
pub fn figures(view: &SegmentView) -> Result<MemoryFigures, Damaged> {
    let (header, regions) = (view.header()?, view.regions());
    let extents = header.extents_reserved.load().min(regions.extent_count);
    let mut free_blocks = [0u64; ORDERS];
    for index in 0..extents {
        let extent: &Extent = view.view().object(regions.extent(index))?;
        free_blocks.iter_mut().zip(free_in_extent(extent)).for_each(|(sum, count)| *sum += count);
    }
    let mut bucket_bytes: u64 = 0;
    let mut classes: Vec<ClassFigures> = Vec::new();
    for index in 0..regions.shard_count {
        let shard: &Shard = view.view().object(regions.shard(index))?;
        bucket_bytes = bucket_bytes.saturating_add(shard.reserved_bytes.load());
        for (sum, figures) in (0..).zip(classes_of(view, shard)) {
            match classes.get_mut(sum) {
                Some(class) => {
                    class.slabs = class.slabs.saturating_add(figures.slabs);
                    class.used = class.used.saturating_add(figures.used);
                    class.free = class.free.saturating_add(figures.free);
                }
                None => classes.push(figures),
            }
        }
    }
    classes.retain(|class| class.slabs > 0);
    let extent_bytes = extents * EXTENT_BYTES;
    let free_bytes = (0..).zip(free_blocks).map(|(order, count)| count * block_bytes(order)).sum();
    let slabs = classes.iter().fold(0u64, |sum, class| sum.saturating_add(class.slabs));
    let slab_bytes = slabs.saturating_mul(SLAB_BYTES);
    let reserved_bytes = memory_bytes(header);
    Ok(MemoryFigures {
        reserved_bytes,
        fixed_bytes: reserved_bytes.saturating_sub(bucket_bytes.saturating_add(extent_bytes)),
        bucket_bytes,
        extent_bytes,
        slab_bytes,
        block_bytes: extent_bytes.saturating_sub(slab_bytes.saturating_add(free_bytes)),
        free_bytes,
        free_blocks,
        classes,
    })
}

/// Every size class of one shard.
pub fn classes_of(view: &SegmentView, shard: &Shard) -> [ClassFigures; SIZE_CLASSES] {
    std::array::from_fn(|class| {
        let slabs = shard.slabs[class].load();
        let free = free_blocks_of(view, shard.partial[class].load(), slabs);
        let used = slabs.saturating_mul(blocks(class)).saturating_sub(free);
        ClassFigures { block_bytes: SIZES[class], slabs, used, free }
    })
}

/// Free blocks of the slabs on a partial list, which has `slabs` at most.
fn free_blocks_of(view: &SegmentView, first: u64, slabs: u64) -> u64 {
    let (mut offset, mut free) = (first, 0);
    for _ in 0..slabs.min(SLABS_MAX) {
        if offset == 0 {
            break;
        }
        let Ok(slab) = view.view().object::<Slab>(Offset::new(offset)) else { break };
        let Some(meta) = Meta::decode(slab.meta.load()) else { break };
        free += blocks(meta.class).saturating_sub(meta.used);
        offset = slab.next.load();
    }
    free
}
