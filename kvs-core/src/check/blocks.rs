//! Ownership of the extents' memory, in units of 4 KiB.

use std::fmt;

use super::Walk;
use crate::arena::extents::{block_bytes, blocks_per_extent, free_in_extent, marked_free};
use crate::segment::layout::{BLOCK_BYTES, EXTENT_BYTES, Extent, ORDERS, Regions};
use crate::sys::memory::Damaged;

/// Who has a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    Nobody,
    Free,
    Slab,
    Value,
    Ring,
    List,
}

impl fmt::Display for Owner {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Nobody => "nobody's",
            Self::Free => "free",
            Self::Slab => "a slab",
            Self::Value => "part of a value",
            Self::Ring => "a connection's buffer",
            Self::List => "part of a list",
        })
    }
}

/// Who has each block.
pub struct Blocks {
    data: u64,
    owners: Vec<Owner>,
}

impl Blocks {
    /// Of `extents` extents, as yet nobody's.
    pub fn new(regions: &Regions, extents: u64) -> Self {
        let count = extents * (EXTENT_BYTES / BLOCK_BYTES);
        Self { data: regions.data, owners: vec![Owner::Nobody; count as usize] }
    }

    /// Gives the block of `order` at `offset` to `owner`.
    ///
    /// # Errors
    /// What it says of this block, when there is no such block or it has an owner.
    pub fn claim(&mut self, offset: u64, order: usize, owner: Owner) -> Result<(), String> {
        let bytes = block_bytes(order.min(ORDERS - 1));
        let place = offset.checked_sub(self.data).filter(|within| within.is_multiple_of(bytes));
        let first = place.map(|within| (within / BLOCK_BYTES) as usize);
        let count = (bytes / BLOCK_BYTES) as usize;
        let blocks = first.and_then(|first| self.owners.get_mut(first..first.checked_add(count)?));
        let Some(blocks) = blocks.filter(|_| order < ORDERS) else {
            return Err(format!("{offset:#x}, {owner}, is no block of order {order}"));
        };
        if let Some(other) = blocks.iter().find(|other| **other != Owner::Nobody) {
            return Err(format!("the block of {bytes} bytes at {offset:#x}, {owner}, is {other} too"));
        }
        blocks.fill(owner);
        Ok(())
    }

    /// Ranges that nobody has: offset and length, in bytes.
    fn leaked(&self) -> Vec<(u64, u64)> {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for (index, owner) in self.owners.iter().enumerate() {
            if *owner != Owner::Nobody {
                continue;
            }
            let offset = self.data + index as u64 * BLOCK_BYTES;
            match ranges.last_mut() {
                Some((start, length)) if *start + *length == offset => *length += BLOCK_BYTES,
                _ => ranges.push((offset, BLOCK_BYTES)),
            }
        }
        ranges
    }
}

impl Walk<'_> {
    /// Claims what the free bits say is free, and holds the free maps against them.
    pub(super) fn free_blocks(&mut self) -> Result<(), Damaged> {
        let regions = self.view.regions();
        for index in 0..regions.extent_count {
            let extent: &Extent = self.view.view().object(regions.extent(index))?;
            let free = free_in_extent(extent);
            for (order, count) in free.into_iter().enumerate() {
                let map = self.view.view().word(regions.free_map(order, index / 64))?.load();
                if (map >> (index % 64) & 1 == 1) != (count > 0) {
                    self.report
                        .fault(format!("extent {index}: the free map of order {order} is out of step"));
                }
            }
            if index >= self.report.extents && free.iter().any(|&count| count > 0) {
                self.report.fault(format!("extent {index} has free blocks, but no memory"));
            } else if index < self.report.extents {
                self.free_blocks_of(index, extent);
            }
        }
        Ok(())
    }

    fn free_blocks_of(&mut self, index: u64, extent: &Extent) {
        let start = self.view.regions().data + index * EXTENT_BYTES;
        for order in 0..ORDERS {
            for block in 0..blocks_per_extent(order) {
                if !marked_free(extent, order, block) {
                    continue;
                }
                let claimed = self.blocks.claim(start + block * block_bytes(order), order, Owner::Free);
                self.report.sound(claimed);
                if order + 1 < ORDERS && block % 2 == 0 && marked_free(extent, order, block + 1) {
                    let both = format!("extent {index}: blocks {block} and {} of order {order}", block + 1);
                    self.report.fault(both + " are both free and not joined");
                }
            }
        }
    }

    /// Tells what nobody has claimed.
    pub(super) fn finish_blocks(&mut self) {
        for (offset, length) in self.blocks.leaked() {
            self.report.fault(format!("{length} bytes at {offset:#x} are neither free nor anybody's"));
        }
    }
}
