//! Slabs: sixteen KiB of blocks of one size class, belonging to one shard.
//!
//! ```text
//! 0    meta       mark, shard, class, blocks in use
//! 8    next       next slab of this class and shard that has a free block; 0 at the end
//! 16   previous   the one before; 0 at the head
//! 24   reserved
//! 32   bitmap     a bit for each block, set when it is free
//! 128  blocks
//! ```
//!
//! Invariants
//! - A slab is on its shard's partial list exactly when it has a free block.
//! - `meta`'s count plus the set bits are the number of blocks of the class.
//! - A slab without a block in use goes back to the extents, unless it is the last partial one of its class.
//!
//! Lock: the shard's. A fresh slab's header is written while its memory is still free, before the decision.

use super::extents::{self, AllocateError};
use super::size_class::{self, BLOCKS_MAX, SIZES};
use crate::segment::layout::{BLOCK_BYTES, SIZE_CLASSES, Shard};
use crate::shared_struct;
use crate::sys::memory::{Damaged, Offset, Word};
use crate::transaction::{Transaction, TransactionError};

/// Order of the extents' block that a slab is.
pub const SLAB_ORDER: usize = 2;
/// Size of a slab, in bytes; slabs are aligned to it.
pub const SLAB_BYTES: u64 = BLOCK_BYTES << SLAB_ORDER;
/// Size of a slab's header, in bytes.
pub const SLAB_HEADER_BYTES: u64 = 128;

const BITMAP_WORDS: usize = 8;
const MARK: u64 = 0x51ab;

const _: () = assert!(BLOCKS_MAX <= BITMAP_WORDS as u64 * 64);

shared_struct! {
    /// First bytes of a slab.
    pub struct Slab, 128, {
        /// Mark (16 bits), shard (16), class (16), blocks in use (16), from the highest bits down.
        meta: Word,
        /// Next partial slab.
        next: Word,
        /// Previous partial slab.
        previous: Word,
        /// Fills up to 32 bytes.
        reserved: Word,
        /// Bit set: that block is free.
        bitmap: [Word; BITMAP_WORDS],
        /// Fills up to two cache lines.
        spare: [Word; 4],
    }
}

/// What a slab's `meta` word says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Meta {
    /// The shard it belongs to.
    pub shard: u64,
    /// Its size class.
    pub class: usize,
    /// Blocks in use.
    pub used: u64,
}

impl Meta {
    /// Reads a `meta` word; None when it isn't one.
    #[inline]
    pub fn decode(word: u64) -> Option<Self> {
        let meta =
            Self { shard: word >> 32 & 0xffff, class: (word >> 16 & 0xffff) as usize, used: word & 0xffff };
        (word >> 48 == MARK && meta.class < SIZE_CLASSES).then_some(meta)
    }

    #[inline]
    fn encode(self) -> u64 {
        MARK << 48 | self.shard << 32 | (self.class as u64) << 16 | self.used
    }
}

/// The slab that the block at `offset` lies in.
#[inline]
pub const fn slab_of(offset: u64) -> u64 {
    offset & !(SLAB_BYTES - 1)
}

/// Which block of its slab the one at `offset` is; None when it isn't the beginning of one.
#[inline]
pub fn block_index(offset: u64, class: usize) -> Option<u64> {
    let within = (offset - slab_of(offset)).checked_sub(SLAB_HEADER_BYTES)?;
    let index = within / SIZES[class];
    (within.is_multiple_of(SIZES[class]) && index < size_class::blocks(class)).then_some(index)
}

fn slab_at<'s>(transaction: &Transaction<'s>, offset: u64) -> Result<&'s Slab, Damaged> {
    let segment = transaction.segment();
    if !segment.regions().in_data(offset, SLAB_BYTES) || !offset.is_multiple_of(SLAB_BYTES) {
        return Err(Damaged { offset });
    }
    segment.memory().object(Offset::new(offset))
}

fn meta_of(transaction: &Transaction<'_>, slab: &Slab, offset: u64) -> Result<Meta, Damaged> {
    Meta::decode(transaction.load(&slab.meta)).ok_or(Damaged { offset })
}

/// Takes a block of `class` for shard `index`, whose lock the transaction takes if it hasn't yet.
///
/// # Errors
/// [`AllocateError::OutOfMemory`] when no slab has one and no more memory is to be had.
pub fn allocate(transaction: &mut Transaction<'_>, index: u64, class: usize) -> Result<u64, AllocateError> {
    let shard = transaction.lock_shard(index)?;
    let mut offset = transaction.load(&shard.partial[class]);
    if offset == 0 {
        offset = add_slab(transaction, shard, index, class)?;
    }
    let slab = slab_at(transaction, offset)?;
    let meta = meta_of(transaction, slab, offset)?;
    for word in &slab.bitmap {
        let bits = transaction.load(word);
        if bits != 0 {
            let block = std::ptr::from_ref(word) as usize - std::ptr::from_ref(&slab.bitmap) as usize;
            let block = block as u64 * 8 + u64::from(bits.trailing_zeros());
            transaction.store(word, bits & (bits - 1));
            take_one(transaction, shard, slab, meta)?;
            return Ok(offset + SLAB_HEADER_BYTES + block * SIZES[class]);
        }
    }
    Err(Damaged { offset }.into())
}

/// Counts one more block of the head slab as used, and takes the slab off the list when that was its last.
fn take_one(
    transaction: &mut Transaction<'_>,
    shard: &Shard,
    slab: &Slab,
    meta: Meta,
) -> Result<(), Damaged> {
    let used = meta.used + 1;
    transaction.store(&slab.meta, Meta { used, ..meta }.encode());
    if used == size_class::blocks(meta.class) {
        let next = transaction.load(&slab.next);
        transaction.store(&shard.partial[meta.class], next);
        if next != 0 {
            transaction.store(&slab_at(transaction, next)?.previous, 0);
        }
    }
    Ok(())
}

/// Makes a new slab of `class` the head of the partial list.
fn add_slab(
    transaction: &mut Transaction<'_>,
    shard: &Shard,
    index: u64,
    class: usize,
) -> Result<u64, AllocateError> {
    let offset = extents::allocate(transaction, SLAB_ORDER)?;
    let (slab, memory) = (slab_at(transaction, offset)?, transaction.memory());
    // Direct stores: the memory is free until the transaction decides, and the arena's lock is held until then.
    memory.store(&slab.meta, Meta { shard: index, class, used: 0 }.encode());
    memory.store(&slab.next, 0);
    memory.store(&slab.previous, 0);
    let blocks = size_class::blocks(class);
    for (word, bitmap) in slab.bitmap.iter().enumerate() {
        let here = blocks.saturating_sub(word as u64 * 64).min(64);
        memory.store(bitmap, if here == 64 { u64::MAX } else { (1 << here) - 1 });
    }
    transaction.store(&shard.partial[class], offset);
    let slabs = transaction.load(&shard.slabs[class]);
    transaction.store(&shard.slabs[class], slabs.wrapping_add(1));
    Ok(offset)
}

/// Takes the lock of the shard that the block at `offset` belongs to: for a transaction that frees it after something
/// of the arena, because a shard's lock comes before the arena's.
///
/// # Errors
/// [`TransactionError`] when the block isn't one.
pub fn lock_shard_of(transaction: &mut Transaction<'_>, offset: u64) -> Result<(), TransactionError> {
    let slab_offset = slab_of(offset);
    let slab = slab_at(transaction, slab_offset)?;
    // The class and the shard of a slab in use never change, so this may be read before the lock is had.
    let shard = meta_of(transaction, slab, slab_offset)?.shard;
    transaction.lock_shard(shard).map(|_| ())
}

/// Gives the block at `offset` back to its slab, and an empty slab back to the extents.
///
/// # Errors
/// [`TransactionError`] when the block isn't one, or is free already.
pub fn free(transaction: &mut Transaction<'_>, offset: u64) -> Result<(), TransactionError> {
    let slab_offset = slab_of(offset);
    let slab = slab_at(transaction, slab_offset)?;
    // The class and the shard of a slab in use never change, so this may be read before the lock is had.
    let shard_index = meta_of(transaction, slab, slab_offset)?.shard;
    let shard = transaction.lock_shard(shard_index)?;
    let meta = meta_of(transaction, slab, slab_offset)?;
    let block = block_index(offset, meta.class).ok_or(Damaged { offset })?;
    let word = &slab.bitmap[(block / 64) as usize];
    let (bits, bit) = (transaction.load(word), 1 << (block % 64));
    if bits & bit != 0 || meta.used == 0 {
        return Err(Damaged { offset }.into());
    }
    transaction.store(word, bits | bit);
    let freed = Meta { used: meta.used - 1, ..meta };
    transaction.store(&slab.meta, freed.encode());
    if meta.used == size_class::blocks(meta.class) {
        return Ok(link(transaction, shard, slab, slab_offset, meta.class)?);
    }
    let alone = transaction.load(&slab.next) == 0 && transaction.load(&slab.previous) == 0;
    if freed.used == 0 && !alone {
        unlink(transaction, shard, slab, meta.class)?;
        extents::free(transaction, slab_offset, SLAB_ORDER)?;
    }
    Ok(())
}

/// Puts a slab that was full at the head of the partial list.
fn link(
    transaction: &mut Transaction<'_>,
    shard: &Shard,
    slab: &Slab,
    offset: u64,
    class: usize,
) -> Result<(), Damaged> {
    let next = transaction.load(&shard.partial[class]);
    transaction.store(&slab.next, next);
    transaction.store(&slab.previous, 0);
    if next != 0 {
        transaction.store(&slab_at(transaction, next)?.previous, offset);
    }
    transaction.store(&shard.partial[class], offset);
    Ok(())
}

/// Takes an empty slab out of the partial list and out of the shard's count.
fn unlink(
    transaction: &mut Transaction<'_>,
    shard: &Shard,
    slab: &Slab,
    class: usize,
) -> Result<(), Damaged> {
    let (next, previous) = (transaction.load(&slab.next), transaction.load(&slab.previous));
    if previous == 0 {
        transaction.store(&shard.partial[class], next);
    } else {
        transaction.store(&slab_at(transaction, previous)?.next, next);
    }
    if next != 0 {
        transaction.store(&slab_at(transaction, next)?.previous, previous);
    }
    let slabs = transaction.load(&shard.slabs[class]);
    transaction.store(&shard.slabs[class], slabs.saturating_sub(1));
    Ok(())
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use crate::limits::CAPACITY_BYTES_MIN;
    use crate::segment::Segment;
    use crate::segment::layout::{ORDERS, WorkerSlot};
    use proptest::prelude::*;

    fn slot(segment: &Segment) -> &WorkerSlot {
        segment.memory().object(segment.regions().worker(0)).expect("worker slots exist")
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn slab_blocks_never_overlap_and_empty_slabs_return(
            steps in proptest::collection::vec((0usize..SIZE_CLASSES, any::<u16>(), any::<bool>()), 1..600)
        ) {
            let segment = Segment::on_heap(CAPACITY_BYTES_MIN).expect("heap memory");
            let mut taken = std::collections::BTreeMap::new();
            for (class, pick, give_back) in steps {
                let mut transaction = Transaction::begin(&segment, slot(&segment));
                if give_back && !taken.is_empty() {
                    let offset = *taken.keys().nth(usize::from(pick) % taken.len()).expect("in range");
                    taken.remove(&offset);
                    free(&mut transaction, offset).expect("owned");
                } else {
                    let offset = allocate(&mut transaction, u64::from(pick) % 4, class).expect("room");
                    let end = offset + SIZES[class];
                    prop_assert!(taken.range(..end).next_back().is_none_or(|(other, size)| other + size <= offset));
                    taken.insert(offset, SIZES[class]);
                }
                transaction.commit().expect("small");
            }
            for offset in taken.into_keys() {
                let mut transaction = Transaction::begin(&segment, slot(&segment));
                free(&mut transaction, offset).expect("owned");
                prop_assert!(free(&mut transaction, offset).is_err(), "freed twice");
                transaction.commit().expect("small");
            }
            for shard in 0..4 {
                for class in 0..SIZE_CLASSES {
                    prop_assert!(segment.shard(shard).expect("exists").slabs[class].load() <= 1);
                }
            }
            const { assert!(ORDERS == 10) };
        }
    }
}
