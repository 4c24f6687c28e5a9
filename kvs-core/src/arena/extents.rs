//! Power-of-two blocks of 4 KiB to 2 MiB: a buddy allocator whose whole state is bits.
//!
//! ```text
//! extent (2 MiB):  order 9  ........................................  1 bit
//!                  order 8  ....................  ....................  2 bits
//!                  ...
//!                  order 0  512 blocks of 4 KiB                        512 bits
//! free map of an order: one bit an extent: "has a free block of this order"
//! ```
//!
//! Invariants
//! - A bit is set exactly when that block is free as a whole and no larger free block contains it.
//! - A free map's bit is set exactly when the extent has a bit of that order.
//! - Two buddies are never both free: freeing the second joins them.
//! - Extents at or beyond `extents_reserved` have no memory and no bits.
//!
//! Lock: the arena's, taken by the transaction, after a shard's. A crash is the transaction's affair; the only
//! thing done outside of it is reserving an extent's memory, which is done again without harm.

use crate::segment::layout::{BLOCK_BYTES, EXTENT_BYTES, Extent, ORDERS, WorkerSlot};
use crate::segment::{OutOfMemory, Segment};
use crate::sys::memory::{Damaged, Word};
use crate::transaction::{Transaction, TransactionError};

/// Why no block could be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AllocateError {
    /// None is free and no more memory is to be had.
    #[error(transparent)]
    OutOfMemory(#[from] OutOfMemory),
    /// The transaction can't go on.
    #[error(transparent)]
    Transaction(#[from] TransactionError),
}

impl From<Damaged> for AllocateError {
    fn from(damaged: Damaged) -> Self {
        Self::Transaction(damaged.into())
    }
}

/// Size of a block of `order`, in bytes.
pub const fn block_bytes(order: usize) -> u64 {
    BLOCK_BYTES << order
}

/// The smallest order whose blocks hold `bytes`.
pub const fn order_for(bytes: u64) -> usize {
    let blocks = bytes.div_ceil(BLOCK_BYTES).next_power_of_two();
    blocks.trailing_zeros() as usize
}

/// Blocks of `order` in an extent.
pub const fn blocks_per_extent(order: usize) -> u64 {
    1 << (ORDERS - 1 - order)
}

/// Which word of an extent's free bits, and which bit of it, stands for block `index` of `order`.
const fn position(order: usize, index: u64) -> (usize, u32) {
    match order {
        0 => ((index / 64) as usize, (index % 64) as u32),
        1 => (8 + (index / 64) as usize, (index % 64) as u32),
        2 => (12 + (index / 64) as usize, (index % 64) as u32),
        3 => (14, index as u32),
        // Order 4 has bits 0 to 31 of the last word, order 5 bits 32 to 47, and so on.
        _ => (15, (64 - (64 >> (order - 4)) + index) as u32),
    }
}

/// Words of an extent that hold bits of `order`, with the mask of those bits.
fn words_of(order: usize) -> (std::ops::Range<usize>, u64) {
    let (first, bit) = position(order, 0);
    let (last, _) = position(order, blocks_per_extent(order) - 1);
    let mask = if order <= 3 { u64::MAX } else { ((1 << blocks_per_extent(order)) - 1) << bit };
    (first..last + 1, mask)
}

fn free_map(segment: &Segment, order: usize, extent: u64) -> Result<(&Word, u64), Damaged> {
    let word = segment.memory().word(segment.regions().free_map(order, extent / 64))?;
    Ok((word, 1 << (extent % 64)))
}

fn extent_of(segment: &Segment, index: u64) -> Result<&Extent, Damaged> {
    segment.memory().object(segment.regions().extent(index))
}

/// Takes a block of `order`, from the lowest extent that has a fitting one.
///
/// # Errors
/// [`AllocateError::OutOfMemory`] when nothing that large is free and no extent can be added.
pub fn allocate(transaction: &mut Transaction<'_>, order: usize) -> Result<u64, AllocateError> {
    transaction.lock_arena()?;
    let (found, extent) = match find(transaction, order)? {
        Some(found) => found,
        None => (ORDERS - 1, add_extent(transaction)?),
    };
    let mut index = lowest_free(transaction, extent, found)?
        .ok_or(Damaged { offset: transaction.segment().regions().extent(extent).bytes() })?;
    set(transaction, extent, found, index, false)?;
    for smaller in (order..found).rev() {
        index *= 2;
        set(transaction, extent, smaller, index + 1, true)?;
    }
    Ok(transaction.segment().regions().data + extent * EXTENT_BYTES + index * block_bytes(order))
}

/// Gives the block of `order` at `offset` back, joining it with its buddies.
///
/// # Errors
/// [`TransactionError`] when the arena's lock can't be had or the block is free already.
pub fn free(transaction: &mut Transaction<'_>, offset: u64, order: usize) -> Result<(), TransactionError> {
    transaction.lock_arena()?;
    let regions = transaction.segment().regions();
    if order >= ORDERS || !regions.in_data(offset, block_bytes(order)) {
        return Err(Damaged { offset }.into());
    }
    let extent = (offset - regions.data) / EXTENT_BYTES;
    let (mut order, mut index) = (order, (offset - regions.data) % EXTENT_BYTES / block_bytes(order));
    if is_free(transaction, extent, order, index)? {
        return Err(Damaged { offset }.into());
    }
    while order + 1 < ORDERS && is_free(transaction, extent, order, index ^ 1)? {
        set(transaction, extent, order, index ^ 1, false)?;
        order += 1;
        index /= 2;
    }
    set(transaction, extent, order, index, true)?;
    Ok(())
}

/// The smallest order from `order` up that has a free block, and the lowest extent with one.
fn find(transaction: &Transaction<'_>, order: usize) -> Result<Option<(usize, u64)>, Damaged> {
    let segment = transaction.segment();
    for candidate in order..ORDERS {
        for word in 0..segment.regions().free_map_words {
            let bits = transaction.load(segment.memory().word(segment.regions().free_map(candidate, word))?);
            if bits != 0 {
                return Ok(Some((candidate, word * 64 + u64::from(bits.trailing_zeros()))));
            }
        }
    }
    Ok(None)
}

fn lowest_free(transaction: &Transaction<'_>, extent: u64, order: usize) -> Result<Option<u64>, Damaged> {
    let free = &extent_of(transaction.segment(), extent)?.free;
    let (words, mask) = words_of(order);
    let first = position(order, 0);
    for word in words {
        let bits = transaction.load(&free[word]) & mask;
        if bits != 0 {
            let bit = u64::from(bits.trailing_zeros());
            return Ok(Some((word - first.0) as u64 * 64 + bit - u64::from(first.1)));
        }
    }
    Ok(None)
}

fn is_free(transaction: &Transaction<'_>, extent: u64, order: usize, index: u64) -> Result<bool, Damaged> {
    let (word, bit) = position(order, index);
    Ok(transaction.load(&extent_of(transaction.segment(), extent)?.free[word]) >> bit & 1 == 1)
}

/// Sets or clears one free bit and keeps the order's free map in step.
fn set(
    transaction: &mut Transaction<'_>,
    extent: u64,
    order: usize,
    index: u64,
    free: bool,
) -> Result<(), Damaged> {
    let segment = transaction.segment();
    let (word, bit) = position(order, index);
    let word = &extent_of(segment, extent)?.free[word];
    let bits = transaction.load(word);
    transaction.store(word, if free { bits | 1 << bit } else { bits & !(1 << bit) });
    let any = free || lowest_free(transaction, extent, order)?.is_some();
    let (map, mask) = free_map(segment, order, extent)?;
    let bits = transaction.load(map);
    if any != (bits & mask != 0) {
        transaction.store(map, bits ^ mask);
    }
    Ok(())
}

/// Reserves the next extent and makes it free as a whole.
fn add_extent(transaction: &mut Transaction<'_>) -> Result<u64, AllocateError> {
    let segment = transaction.segment();
    let (header, regions) = (segment.header()?, segment.regions());
    let extent = transaction.load(&header.extents_reserved);
    if extent >= regions.extent_count {
        return Err(OutOfMemory.into());
    }
    reserve(transaction, regions.data + extent * EXTENT_BYTES, EXTENT_BYTES)?;
    transaction.store(&header.extents_reserved, extent + 1);
    set(transaction, extent, ORDERS - 1, 0, true)?;
    Ok(extent)
}

/// Takes memory for `bytes` bytes from `offset` from the kernel, if the capacity allows it, and notes that it did.
///
/// # Errors
/// [`AllocateError::OutOfMemory`] when the capacity is reached or the kernel has none; nothing is noted.
pub fn reserve(transaction: &mut Transaction<'_>, offset: u64, bytes: u64) -> Result<(), AllocateError> {
    transaction.lock_arena()?;
    let segment = transaction.segment();
    let header = segment.header()?;
    let reserved = transaction.load(&header.reserved_bytes).saturating_add(bytes);
    if reserved > segment.regions().capacity_bytes {
        return Err(OutOfMemory.into());
    }
    segment.reserve(offset, bytes)?;
    transaction.store(&header.reserved_bytes, reserved);
    Ok(())
}

/// Reserves one extent ahead of need unless a block of `order` or larger is free; true when it did. For a housekeeping
/// thread, so that no request waits for the kernel to clear two megabytes: that happens before any lock is taken. So does what is to be
/// prepared of it, which begins at the given offset.
///
/// # Errors
/// [`AllocateError`] when the capacity is reached or the transaction can't go on.
pub fn reserve_ahead(
    segment: &Segment,
    slot: &WorkerSlot,
    order: usize,
    prepare: impl FnOnce(u64),
) -> Result<bool, AllocateError> {
    let (header, regions) = (segment.header()?, segment.regions());
    let mut transaction = Transaction::begin(segment, slot);
    let next = header.extents_reserved.load();
    let full = next >= regions.extent_count
        || header.reserved_bytes.load().saturating_add(EXTENT_BYTES) > regions.capacity_bytes;
    if full || find(&transaction, order)?.is_some() {
        return Ok(false);
    }
    // What another thread adds meanwhile is this very extent: its memory is taken once, whoever asks.
    let offset = regions.data + next * EXTENT_BYTES;
    segment.reserve(offset, EXTENT_BYTES)?;
    prepare(offset);
    transaction.lock_arena()?;
    if header.extents_reserved.load() != next {
        return Ok(false);
    }
    add_extent(&mut transaction)?;
    transaction.commit()?;
    Ok(true)
}

/// Takes memory for the extent that is added `ahead` extents after the next one, if the capacity has room for all of them, and
/// tells which that is and where it begins. Nobody knows of it yet, and workers add the next one first: so what takes long can be
/// done with it. It counts as reserved when it is added.
///
/// # Errors
/// [`OutOfMemory`] when `/dev/shm` is full.
pub fn prepare_ahead(segment: &Segment, ahead: u64) -> Result<Option<(u64, u64)>, AllocateError> {
    let (header, regions) = (segment.header()?, segment.regions());
    let extent = header.extents_reserved.load().saturating_add(ahead);
    let bytes = header.reserved_bytes.load().saturating_add((ahead + 1) * EXTENT_BYTES);
    if extent >= regions.extent_count || bytes > regions.capacity_bytes {
        return Ok(None);
    }
    let offset = regions.data + extent * EXTENT_BYTES;
    segment.reserve(offset, EXTENT_BYTES)?;
    Ok(Some((extent, offset)))
}

/// Free blocks of every order in one extent, as read without any lock: for inspection.
pub fn free_in_extent(extent: &Extent) -> [u64; ORDERS] {
    std::array::from_fn(|order| {
        let (words, mask) = words_of(order);
        extent.free[words].iter().map(|word| u64::from((word.load() & mask).count_ones())).sum()
    })
}

/// Whether block `index` of `order` of `extent` is marked free: for `check`.
pub fn marked_free(extent: &Extent, order: usize, index: u64) -> bool {
    let (word, bit) = position(order, index);
    extent.free[word].load() >> bit & 1 == 1
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use crate::limits::CAPACITY_BYTES_MIN;
    use proptest::prelude::*;

    fn slot(segment: &Segment) -> &WorkerSlot {
        segment.memory().object(segment.regions().worker(0)).expect("worker slots exist")
    }

    #[test]
    fn positions_are_all_different() {
        let mut seen = std::collections::HashSet::new();
        for order in 0..ORDERS {
            for index in 0..blocks_per_extent(order) {
                assert!(seen.insert(position(order, index)), "order {order} index {index}");
            }
        }
        assert_eq!(seen.len(), 1023);
    }

    #[test]
    fn extents_all_blocks_freed_join_to_whole_extents() {
        let segment = Segment::on_heap(CAPACITY_BYTES_MIN).expect("heap memory");
        let mut taken = Vec::new();
        loop {
            let mut transaction = Transaction::begin(&segment, slot(&segment));
            match allocate(&mut transaction, taken.len() % 4) {
                Ok(offset) => taken.push((offset, taken.len() % 4)),
                Err(AllocateError::OutOfMemory(_)) => break,
                Err(error) => panic!("{error}"),
            }
            transaction.commit().expect("small");
        }
        assert!(taken.len() > 500);
        for (offset, order) in taken {
            let mut transaction = Transaction::begin(&segment, slot(&segment));
            free(&mut transaction, offset, order).expect("owned");
            transaction.commit().expect("small");
        }
        let reserved = segment.header().expect("mapped").extents_reserved.load();
        for extent in 0..reserved {
            let counts = free_in_extent(extent_of(&segment, extent).expect("in range"));
            assert_eq!(counts, [0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        }
    }

    #[test]
    fn extents_free_twice_is_refused() {
        let segment = Segment::on_heap(CAPACITY_BYTES_MIN).expect("heap memory");
        let mut transaction = Transaction::begin(&segment, slot(&segment));
        let offset = allocate(&mut transaction, 2).expect("room");
        free(&mut transaction, offset, 2).expect("owned");
        assert!(free(&mut transaction, offset, 9).is_err());
        assert!(free(&mut transaction, u64::MAX - 5, 2).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn extents_blocks_never_overlap(orders in proptest::collection::vec((0usize..ORDERS, any::<bool>()), 1..200)) {
            let segment = Segment::on_heap(CAPACITY_BYTES_MIN).expect("heap memory");
            let mut taken: Vec<(u64, usize)> = Vec::new();
            for (order, give_back) in orders {
                let mut transaction = Transaction::begin(&segment, slot(&segment));
                if give_back && !taken.is_empty() {
                    let (offset, order) = taken.swap_remove(order % taken.len());
                    free(&mut transaction, offset, order).expect("owned");
                } else if let Ok(offset) = allocate(&mut transaction, order) {
                    let end = offset + block_bytes(order);
                    prop_assert!(taken.iter().all(|&(other, o)| end <= other || other + block_bytes(o) <= offset));
                    taken.push((offset, order));
                }
                transaction.commit().expect("small");
            }
        }
    }
}
