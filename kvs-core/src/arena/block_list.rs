//! Many blocks strung together, for what is larger than one: a value on its way in, an answer on its way out.
//!
//! ```text
//! head block (8 KiB)                        chunks, 4 KiB to 256 KiB each
//! 0     length    bytes it will hold         ┌────────────┐
//! 8     filled    bytes it holds       ┌────►│ bytes 0 …  │
//! 16    count     chunks               │     └────────────┘
//! 64    table     offset | order ──────┘     ┌──────┐
//!                 offset | order ───────────►│ …    │
//! 3904  tail      the bytes that are left    └──────┘
//! ```
//!
//! Chunks are taken as they are needed, the largest first that the rest fills; where none of that size is free, a
//! smaller one does. What is left at the end and is small enough goes into the tail, so that hardly a byte is wasted.
//!
//! Invariants
//! - `filled` never exceeds `length`; the chunks before the current one are full.
//! - The list is named by exactly one *owner word* from the transaction that makes it to the one that ends it.
//! - Its bytes have one reader and writer, whoever owns the word.
//!
//! Lock: none of its own; taking and giving back chunks takes the arena's. A crash leaves the owner word and so the
//! whole list to be found; releasing goes chunk by chunk in transactions of their own and is taken up where it ended.

use super::extents::{self, AllocateError, block_bytes};
use super::size_class::SIZE_MAX;
use crate::segment::layout::{BLOCK_BYTES, ORDERS, WorkerSlot};
use crate::segment::{OutOfMemory, Segment};
use crate::shared_struct;
use crate::sys::memory::{Damaged, Offset, View, Word};
use crate::transaction::{Transaction, TransactionError};

/// Most chunks of a list.
pub const CHUNKS_MAX: usize = 480;
/// Order of the largest chunk: 256 KiB.
pub const CHUNK_ORDER_MAX: usize = 6;
/// Order of the head block: 8 KiB.
pub const HEAD_ORDER: usize = 1;
/// Room an entry's head keeps beside its chunk table and tail; see `table::entry`.
const ENTRY_HEAD_BYTES: u64 = 48;
/// Chunks given back in one transaction.
const RELEASE_AT_ONCE: usize = 8;

const TAIL_WORDS: usize = SIZE_MAX as usize / 8;

shared_struct! {
    /// Head block of a list.
    pub struct ListHead, 7968, {
        /// Bytes it will hold.
        length: Word,
        /// Bytes it holds.
        filled: Word,
        /// Number of chunks.
        chunk_count: Word,
        /// Fills up to a cache line.
        reserved: [Word; 5],
        /// The chunks, each its offset with its order in the low bits.
        chunks: [Word; CHUNKS_MAX],
        /// What didn't fill a chunk.
        tail: [Word; TAIL_WORDS],
    }
}

const TAIL_START: u64 = std::mem::offset_of!(ListHead, tail) as u64;
const _: () = assert!(size_of::<ListHead>() as u64 <= block_bytes(HEAD_ORDER));
const _: () = assert!(CHUNKS_MAX as u64 * 8 + ENTRY_HEAD_BYTES < SIZE_MAX);

/// A chunk: a block of the extents, in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// Where it begins.
    pub offset: u64,
    /// Its order.
    pub order: usize,
}

impl Chunk {
    /// Reads a word; None when it can't be one.
    pub const fn decode(word: u64) -> Option<Self> {
        let order = (word % BLOCK_BYTES) as usize;
        if order < ORDERS { Some(Self { offset: word - order as u64, order }) } else { None }
    }

    /// The word.
    pub const fn word(self) -> u64 {
        self.offset | self.order as u64
    }

    /// Its size, in bytes.
    pub const fn bytes(self) -> u64 {
        block_bytes(self.order)
    }
}

/// Bytes that may be left for the tail beside `chunks` chunks, so that all of it fits the head of an entry.
pub const fn tail_bytes_max(chunks: usize) -> u64 {
    SIZE_MAX - ENTRY_HEAD_BYTES - chunks as u64 * 8
}

/// A list, by its place in the segment. It is worth what its owner word is worth.
#[derive(Clone)]
pub struct BlockList {
    segment: Segment,
    offset: u64,
}

impl BlockList {
    /// Makes an empty list for `length` bytes and names it in `owner`, in one transaction.
    ///
    /// # Errors
    /// [`AllocateError::OutOfMemory`] when there is no block for its head.
    pub fn create(
        segment: &Segment,
        slot: &WorkerSlot,
        owner: &Word,
        length: u64,
    ) -> Result<Self, AllocateError> {
        let mut transaction = Transaction::begin(segment, slot);
        let offset = extents::allocate(&mut transaction, HEAD_ORDER)?;
        let list = Self { segment: segment.clone(), offset };
        let (head, memory) = (list.head()?, segment.memory());
        // Direct stores: the block is free until the transaction decides, and the arena's lock is held until then.
        memory.store(&head.length, length);
        memory.store(&head.filled, 0);
        memory.store(&head.chunk_count, 0);
        transaction.store(owner, offset);
        transaction.commit()?;
        Ok(list)
    }

    /// The list that an owner word names.
    ///
    /// # Errors
    /// [`Damaged`] when there can be none.
    pub fn open(segment: &Segment, offset: u64) -> Result<Self, Damaged> {
        let list = Self { segment: segment.clone(), offset };
        let damaged = Damaged { offset };
        if !segment.regions().in_data(offset, block_bytes(HEAD_ORDER)) || !offset.is_multiple_of(BLOCK_BYTES)
        {
            return Err(damaged);
        }
        let head = list.head()?;
        let sound = head.filled.load() <= head.length.load() && head.chunk_count.load() <= CHUNKS_MAX as u64;
        if sound { Ok(list) } else { Err(damaged) }
    }

    fn head(&self) -> Result<&ListHead, Damaged> {
        self.segment.memory().object(Offset::new(self.offset))
    }

    /// Where its head block is.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes it will hold.
    ///
    /// # Errors
    /// [`Damaged`] never: opening checked it.
    pub fn length(&self) -> Result<u64, Damaged> {
        Ok(self.head()?.length.load())
    }

    /// Bytes it holds.
    ///
    /// # Errors
    /// [`Damaged`] never: opening checked it.
    pub fn filled(&self) -> Result<u64, Damaged> {
        Ok(self.head()?.filled.load())
    }

    /// Its chunks, in order.
    ///
    /// # Errors
    /// [`Damaged`] when one can't be.
    pub fn chunks(&self) -> Result<Vec<Chunk>, Damaged> {
        let head = self.head()?;
        let count = (head.chunk_count.load() as usize).min(CHUNKS_MAX);
        let damaged = Damaged { offset: self.offset };
        head.chunks[..count].iter().map(|word| Chunk::decode(word.load()).ok_or(damaged)).collect()
    }

    /// The memory that takes the next bytes: its offset and length, with a new chunk under it when the last is full.
    /// The length is 0 when the list is full.
    ///
    /// # Errors
    /// [`AllocateError::OutOfMemory`] when there is no block or the list has no room for another; nothing has changed.
    pub fn space(&self, slot: &WorkerSlot) -> Result<(u64, u64), AllocateError> {
        let (filled, length) = (self.filled()?, self.length()?);
        let (capacity, count) = self.capacity()?;
        if filled < capacity || filled == length || length - capacity <= tail_bytes_max(count) {
            return Ok(self.piece_up_to(filled, length)?);
        }
        if count == CHUNKS_MAX {
            return Err(OutOfMemory.into());
        }
        let wanted = ((length - filled) / BLOCK_BYTES).checked_ilog2().unwrap_or(0) as usize;
        self.add_chunk(slot, count, wanted.min(CHUNK_ORDER_MAX))?;
        Ok(self.piece_up_to(filled, length)?)
    }

    /// Bytes all chunks hold, and how many there are.
    fn capacity(&self) -> Result<(u64, usize), Damaged> {
        let chunks = self.chunks()?;
        Ok((chunks.iter().map(|chunk| chunk.bytes()).sum(), chunks.len()))
    }

    fn add_chunk(&self, slot: &WorkerSlot, count: usize, wanted: usize) -> Result<(), AllocateError> {
        let head = self.head()?;
        let mut transaction = Transaction::begin(&self.segment, slot);
        for order in (0..=wanted).rev() {
            match extents::allocate(&mut transaction, order) {
                Ok(offset) => {
                    transaction.store(&head.chunks[count], Chunk { offset, order }.word());
                    transaction.store(&head.chunk_count, count as u64 + 1);
                    return Ok(transaction.commit()?);
                }
                Err(AllocateError::OutOfMemory(_)) if order > 0 => {}
                Err(error) => return Err(error),
            }
        }
        Err(OutOfMemory.into())
    }

    /// Notes that `count` more bytes are in it.
    ///
    /// # Errors
    /// [`Damaged`] never: opening checked it.
    pub fn fill(&self, transaction: &mut Transaction<'_>, count: u64) -> Result<(), Damaged> {
        let filled = &self.head()?.filled;
        let value = transaction.load(filled).wrapping_add(count);
        transaction.store(filled, value);
        Ok(())
    }

    /// Appends `bytes`, in as many transactions as it takes.
    ///
    /// # Errors
    /// As [`BlockList::space`]; some of the bytes may be in it then.
    pub fn append(&self, slot: &WorkerSlot, mut bytes: &[u8]) -> Result<(), AllocateError> {
        while !bytes.is_empty() {
            let (offset, room) = self.space(slot)?;
            let (now, later) = bytes.split_at(bytes.len().min(room as usize));
            if now.is_empty() {
                return Err(Damaged { offset }.into());
            }
            self.segment.memory().write_bytes(offset, now)?;
            let mut transaction = Transaction::begin(&self.segment, slot);
            self.fill(&mut transaction, now.len() as u64)?;
            transaction.commit()?;
            bytes = later;
        }
        Ok(())
    }

    /// The contiguous memory that holds the bytes from stream position `from` on: its offset and length; length 0 at
    /// the end of what is filled.
    ///
    /// # Errors
    /// [`Damaged`] when a chunk can't be.
    pub fn piece(&self, from: u64) -> Result<(u64, u64), Damaged> {
        self.piece_up_to(from, self.filled()?)
    }

    fn piece_up_to(&self, from: u64, end: u64) -> Result<(u64, u64), Damaged> {
        let mut start = 0;
        for chunk in self.chunks()? {
            if from < start + chunk.bytes() {
                let within = from - start;
                return Ok((chunk.offset + within, (chunk.bytes() - within).min(end.saturating_sub(from))));
            }
            start += chunk.bytes();
        }
        let within = from - start;
        let room = (TAIL_WORDS as u64 * 8).saturating_sub(within);
        Ok((self.offset + TAIL_START + within, room.min(end.saturating_sub(from))))
    }

    /// Gives everything back and clears `owner`. Killed on the way, what is left is still named by `owner`.
    ///
    /// # Errors
    /// [`TransactionError`] when a transaction can't go on.
    pub fn release(self, slot: &WorkerSlot, owner: &Word) -> Result<(), TransactionError> {
        let head = self.head()?;
        loop {
            let mut transaction = Transaction::begin(&self.segment, slot);
            if give_back_chunks(&mut transaction, &head.chunk_count, &head.chunks)? {
                extents::free(&mut transaction, self.offset, HEAD_ORDER)?;
                transaction.store(owner, 0);
                return transaction.commit();
            }
            transaction.commit()?;
        }
    }

    /// Gives back the head block only, its chunks being another's from now on, and clears `owner`.
    ///
    /// # Errors
    /// [`TransactionError`] when the transaction can't go on.
    pub fn dissolve(&self, transaction: &mut Transaction<'_>, owner: &Word) -> Result<(), TransactionError> {
        extents::free(transaction, self.offset, HEAD_ORDER)?;
        transaction.store(owner, 0);
        Ok(())
    }

    /// The bytes after the last chunk: where they are and how many.
    ///
    /// # Errors
    /// [`Damaged`] when a chunk can't be, or more bytes are left than a tail may have.
    pub fn tail(&self) -> Result<(u64, u64), Damaged> {
        let (capacity, count) = self.capacity()?;
        let bytes = self.length()?.saturating_sub(capacity);
        if bytes > tail_bytes_max(count) {
            return Err(Damaged { offset: self.offset });
        }
        Ok((self.offset + TAIL_START, bytes))
    }
}

/// Gives back some of the last of `chunks`; true when none is left. For lists and for entries.
///
/// # Errors
/// [`TransactionError`] when the transaction can't go on or a chunk can't be.
pub fn give_back_chunks(
    transaction: &mut Transaction<'_>,
    chunk_count: &Word,
    chunks: &[Word],
) -> Result<bool, TransactionError> {
    let count = (transaction.load(chunk_count) as usize).min(chunks.len());
    let kept = count.saturating_sub(RELEASE_AT_ONCE);
    for word in &chunks[kept..count] {
        let word = word.load();
        let chunk = Chunk::decode(word).ok_or(Damaged { offset: word })?;
        extents::free(transaction, chunk.offset, chunk.order)?;
    }
    transaction.store(chunk_count, kept as u64);
    Ok(kept == 0)
}

/// What a reader of the segment sees of a list: bytes to hold, bytes held, chunks. Trusts nothing.
///
/// # Errors
/// [`Damaged`] when it lies outside.
pub fn describe(view: &View, offset: u64) -> Result<(u64, u64, Vec<Option<Chunk>>), Damaged> {
    let head: &ListHead = view.object(Offset::new(offset))?;
    let count = (head.chunk_count.load() as usize).min(CHUNKS_MAX);
    let chunks = head.chunks[..count].iter().map(|word| Chunk::decode(word.load())).collect();
    Ok((head.length.load(), head.filled.load(), chunks))
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use crate::limits::CAPACITY_BYTES_MIN;
    use proptest::prelude::*;

    fn whole_extents_free(segment: &Segment) -> bool {
        let reserved = segment.header().expect("mapped").extents_reserved.load();
        (0..reserved).all(|index| {
            let extent = segment.memory().object(segment.regions().extent(index)).expect("in range");
            extents::free_in_extent(extent)[ORDERS - 1] == 1
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn block_list_bytes_come_back_and_blocks_too(length in 0u64..3_000_000, step in 1u64..200_000) {
            let segment = Segment::on_heap(CAPACITY_BYTES_MIN).expect("heap memory");
            let memory = segment.memory();
            let slot: &WorkerSlot = memory.object(segment.regions().worker(0)).expect("exists");
            let owner = memory.word(segment.regions().worker(1).bytes()).expect("exists");
            let list = BlockList::create(&segment, slot, owner, length).expect("room");
            prop_assert_eq!(owner.load(), list.offset());
            while list.filled().expect("sound") < length {
                let filled = list.filled().expect("sound");
                let (offset, room) = list.space(slot).expect("room");
                let bytes: Vec<u8> = (filled..filled + room.min(step)).map(|at| (at % 251) as u8).collect();
                memory.write_bytes(offset, &bytes).expect("in bounds");
                let mut transaction = Transaction::begin(&segment, slot);
                list.fill(&mut transaction, bytes.len() as u64).expect("sound");
                transaction.commit().expect("small");
            }
            prop_assert_eq!(list.space(slot).expect("sound").1, 0);
            let mut at = 0;
            while at < length {
                let (offset, room) = list.piece(at).expect("sound");
                let mut bytes = vec![0; room as usize];
                memory.read_bytes(offset, &mut bytes).expect("in bounds");
                prop_assert!(bytes.iter().zip(at..).all(|(&byte, at)| byte == (at % 251) as u8));
                at += room;
            }
            prop_assert!(list.tail().is_ok());
            list.release(slot, owner).expect("owned");
            prop_assert_eq!(owner.load(), 0);
            prop_assert!(whole_extents_free(&segment));
        }
    }

    #[test]
    fn block_list_without_memory_says_so_and_gives_all_back() {
        let segment = Segment::on_heap(CAPACITY_BYTES_MIN).expect("heap memory");
        let slot: &WorkerSlot = segment.memory().object(segment.regions().worker(0)).expect("exists");
        let owner = segment.memory().word(segment.regions().worker(1).bytes()).expect("exists");
        let list = BlockList::create(&segment, slot, owner, 64 << 20).expect("room");
        let refused = loop {
            match list.space(slot) {
                Err(error) => break error,
                Ok((_, room)) => {
                    let mut transaction = Transaction::begin(&segment, slot);
                    list.fill(&mut transaction, room).expect("sound");
                    transaction.commit().expect("small");
                }
            }
        };
        assert!(matches!(refused, AllocateError::OutOfMemory(_)));
        list.release(slot, owner).expect("owned");
        assert!(whole_extents_free(&segment));
    }
}
