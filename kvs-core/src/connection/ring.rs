//! Ring buffers of connections, and the bytes of their block lists, as slices for the kernel to fill and to take.
//!
//! A ring is a block of the arena that the connection's slot names, so it outlives the process. Stream positions say where a byte is:
//! counted from the ring's base, modulo its size. Whenever nothing is in the ring, its base is moved up to where the stream is, so
//! a client that waits for its answers has the same few cache lines served again and again. When the arena has no block left, the ring is memory of this process
//! instead: a store that is full of data can still be read and tidied up, and only a restart would cost such a
//! connection.
//!
//! Invariants
//! - Each ring has one owner, the connection, and each connection one worker: nobody else touches the bytes.
//! - The slot's word names the block from the transaction that takes it to the one that gives it back.
//! - The base moves only while nothing is in the ring, so it needs no transaction: whoever finds the old or the new one finds no byte.
#![allow(unsafe_code)]

use crate::arena::block_list::{BlockList, Chunk};
use crate::arena::extents::{self, AllocateError, block_bytes};
use crate::segment::Segment;
use crate::segment::layout::{RingPlace, WorkerSlot};
use crate::sys::memory::{Damaged, Memory};
use crate::transaction::{Transaction, TransactionError};

/// Order of a ring as connections begin with: 32 KiB.
pub const RING_ORDER: usize = 3;
/// Order of an input ring that holds any request but a set: 128 KiB.
pub const RING_ORDER_MAX: usize = 5;

enum Place {
    Segment(u64),
    Process(Box<[u8]>),
}

/// A ring buffer.
pub struct Ring {
    place: Place,
    order: usize,
    /// Stream position of its first byte.
    base: u64,
}

impl Ring {
    /// Takes a ring of `order` and names it in `owner`.
    ///
    /// # Errors
    /// [`TransactionError`] when the transaction can't go on.
    pub fn take(
        segment: &Segment,
        slot: &WorkerSlot,
        owner: &RingPlace,
        order: usize,
    ) -> Result<Self, TransactionError> {
        let mut transaction = Transaction::begin(segment, slot);
        let ring = Self::allocate(&mut transaction, order, owner.base.load())?;
        transaction.store(&owner.block, ring.word());
        transaction.commit()?;
        Ok(ring)
    }

    /// The ring that a slot names; None when it names none.
    ///
    /// # Errors
    /// [`Damaged`] when there can't be one.
    pub fn named(segment: &Segment, owner: &RingPlace) -> Result<Option<Self>, Damaged> {
        let word = owner.block.load();
        if word == 0 {
            return Ok(None);
        }
        let chunk =
            Chunk::decode(word).filter(|chunk| segment.regions().in_data(chunk.offset, chunk.bytes()));
        let Chunk { offset, order } = chunk.ok_or(Damaged { offset: word })?;
        Ok(Some(Self { place: Place::Segment(offset), order, base: owner.base.load() }))
    }

    /// Gives it back and clears `owner`.
    ///
    /// # Errors
    /// [`TransactionError`] when the transaction can't go on.
    pub fn give_back(
        self,
        segment: &Segment,
        slot: &WorkerSlot,
        owner: &RingPlace,
    ) -> Result<(), TransactionError> {
        match self.place {
            Place::Process(_) => Ok(()),
            Place::Segment(_) => give_back_named(segment, slot, owner),
        }
    }

    /// Takes a larger ring that holds the bytes from stream position `from` to `to`, in place of this one and in one
    /// transaction: whenever it is interrupted, `owner` names a ring with these bytes in it.
    ///
    /// # Errors
    /// [`TransactionError`] when the transaction can't go on.
    pub fn enlarge(
        self,
        segment: &Segment,
        slot: &WorkerSlot,
        owner: &RingPlace,
        (from, to): (u64, u64),
    ) -> Result<Self, TransactionError> {
        let memory = segment.memory();
        let mut transaction = Transaction::begin(segment, slot);
        let mut larger = Self::allocate(&mut transaction, RING_ORDER_MAX, self.base)?;
        let (first, second) = self.parts(memory, from, to)?;
        larger.write(memory, from, first)?;
        larger.write(memory, from + first.len() as u64, second)?;
        if let Place::Segment(offset) = self.place {
            extents::free(&mut transaction, offset, self.order)?;
        }
        transaction.store(&owner.block, larger.word());
        transaction.commit()?;
        Ok(larger)
    }

    /// A ring of `order` whose block is taken by `transaction`; of this process's memory when there is none. Until the
    /// transaction ends the arena's lock keeps others from the block.
    fn allocate(
        transaction: &mut Transaction<'_>,
        order: usize,
        base: u64,
    ) -> Result<Self, TransactionError> {
        match extents::allocate(transaction, order) {
            Ok(offset) => Ok(Self { place: Place::Segment(offset), order, base }),
            Err(AllocateError::OutOfMemory(_)) => {
                let bytes = vec![0; block_bytes(order) as usize].into_boxed_slice();
                Ok(Self { place: Place::Process(bytes), order, base })
            }
            Err(AllocateError::Transaction(error)) => Err(error),
        }
    }

    /// What the slot's word says of it.
    fn word(&self) -> u64 {
        match self.place {
            Place::Segment(offset) => Chunk { offset, order: self.order }.word(),
            Place::Process(_) => 0,
        }
    }

    /// Its order.
    pub fn order(&self) -> usize {
        self.order
    }

    /// Has stream position `at` lie in the byte that is `color` bytes behind its first, while nothing is in it.
    #[inline]
    pub fn rebase(&mut self, memory: &Memory, owner: &RingPlace, at: u64, color: u64) {
        self.base = at.wrapping_sub(color);
        memory.store(&owner.base, self.base);
    }

    /// Where in it the byte of stream position `at` is.
    #[inline(always)]
    fn start(&self, at: u64) -> u64 {
        at.wrapping_sub(self.base) % self.capacity()
    }

    /// Its size, in bytes.
    #[inline(always)]
    pub fn capacity(&self) -> u64 {
        block_bytes(self.order)
    }

    /// The bytes from stream position `from` to `to`, at most its size apart; the second part is what wrapped around.
    ///
    /// # Errors
    /// [`Damaged`] when its block lies outside of the segment.
    #[inline]
    pub fn parts_mut<'r>(
        &'r mut self,
        memory: &'r Memory,
        from: u64,
        to: u64,
    ) -> Result<(&'r mut [u8], &'r mut [u8]), Damaged> {
        let capacity = self.capacity();
        let length = (to - from).min(capacity);
        let start = self.start(from);
        let first = length.min(capacity - start);
        match &mut self.place {
            // SAFETY: the block is this ring's own, named by the slot of a connection that has one worker; the two
            // ranges don't overlap, and `&mut self` keeps other slices of it away.
            Place::Segment(offset) => unsafe {
                Ok((memory.bytes_mut(*offset + start, first)?, memory.bytes_mut(*offset, length - first)?))
            },
            Place::Process(bytes) => {
                let (before, after) = bytes.split_at_mut(start as usize);
                Ok((&mut after[..first as usize], &mut before[..(length - first) as usize]))
            }
        }
    }

    /// Writes `bytes`, at most its size, at stream position `at`.
    ///
    /// # Errors
    /// [`Damaged`] when its block lies outside of the segment.
    #[inline]
    pub fn write(&mut self, memory: &Memory, at: u64, bytes: &[u8]) -> Result<(), Damaged> {
        let (first, second) = self.parts_mut(memory, at, at + bytes.len() as u64)?;
        let (head, tail) = bytes.split_at(first.len());
        first.copy_from_slice(head);
        second.copy_from_slice(tail);
        Ok(())
    }

    /// As [`Ring::parts_mut`], to look at only.
    ///
    /// # Errors
    /// [`Damaged`] when its block lies outside of the segment.
    #[inline]
    pub fn parts<'r>(
        &'r self,
        memory: &'r Memory,
        from: u64,
        to: u64,
    ) -> Result<(&'r [u8], &'r [u8]), Damaged> {
        let capacity = self.capacity();
        let length = (to - from).min(capacity);
        let start = self.start(from);
        let first = length.min(capacity - start);
        match &self.place {
            // SAFETY: as in `parts_mut`; `&self` keeps mutable slices of it away.
            Place::Segment(offset) => unsafe {
                Ok((
                    &*memory.bytes_mut(*offset + start, first)?,
                    &*memory.bytes_mut(*offset, length - first)?,
                ))
            },
            Place::Process(bytes) => {
                let (before, after) = bytes.split_at(start as usize);
                Ok((&after[..first as usize], &before[..(length - first) as usize]))
            }
        }
    }
}

/// Gives the block back that a slot's `owner` names, if any, and clears the word that names it.
///
/// # Errors
/// [`TransactionError`] when the transaction can't go on or the word can't be one.
pub fn give_back_named(
    segment: &Segment,
    slot: &WorkerSlot,
    owner: &RingPlace,
) -> Result<(), TransactionError> {
    let word = owner.block.load();
    if word == 0 {
        return Ok(());
    }
    let chunk = Chunk::decode(word).ok_or(Damaged { offset: word })?;
    let mut transaction = Transaction::begin(segment, slot);
    extents::free(&mut transaction, chunk.offset, chunk.order)?;
    transaction.store(&owner.block, 0);
    transaction.commit()
}

/// Bytes of a block list of a connection, for its worker.
///
/// # Errors
/// [`Damaged`] when they lie outside of the segment.
pub fn list_bytes(memory: &Memory, (offset, length): (u64, u64)) -> Result<&[u8], Damaged> {
    // SAFETY: the list is named by the slot of a connection that has one worker, the caller; it writes no byte of it
    // while it looks at them.
    unsafe { memory.bytes_mut(offset, length).map(|bytes| &*bytes) }
}

/// Room of a block list of a connection, as [`BlockList::space`] said it, for the kernel to fill.
///
/// # Errors
/// [`Damaged`] when it lies outside of the segment.
pub fn list_room<'l>(
    memory: &'l Memory,
    _list: &'l mut BlockList,
    (offset, length): (u64, u64),
) -> Result<&'l mut [u8], Damaged> {
    // SAFETY: as in `list_bytes`; nothing of the list is read that isn't filled, and `&mut` keeps other slices of its room away.
    unsafe { memory.bytes_mut(offset, length) }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use crate::limits::CAPACITY_BYTES_MIN;

    #[test]
    fn ring_bytes_survive_wrapping_and_enlarging() {
        let segment = Segment::on_heap(CAPACITY_BYTES_MIN).expect("heap memory");
        let slot: &WorkerSlot = segment.memory().object(segment.regions().worker(0)).expect("exists");
        let place = crate::sys::memory::Offset::new(segment.regions().worker(1).bytes());
        let owner: &RingPlace = segment.memory().object(place).expect("exists");
        let mut ring = Ring::take(&segment, slot, owner, RING_ORDER).expect("room");
        assert_ne!(owner.block.load(), 0);
        ring.rebase(segment.memory(), owner, 1000, 1000);
        let (from, to) = (32_000, 32_000 + 5_000);
        let bytes: Vec<u8> = (0..5_000u32).map(|at| at as u8).collect();
        let (first, second) = ring.parts_mut(segment.memory(), from, to).expect("in bounds");
        assert_eq!((first.len(), second.len()), (768, 4_232));
        first.copy_from_slice(&bytes[..768]);
        second.copy_from_slice(&bytes[768..]);
        let ring = ring.enlarge(&segment, slot, owner, (from, to)).expect("room");
        assert_eq!(ring.order(), RING_ORDER_MAX);
        let (first, second) = ring.parts(segment.memory(), from, to).expect("in bounds");
        assert_eq!([first, second].concat(), bytes);
        ring.give_back(&segment, slot, owner).expect("owned");
        assert_eq!(owner.block.load(), 0);
        give_back_named(&segment, slot, owner).expect("nothing to do");
    }
}
