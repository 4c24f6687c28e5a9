//! The hash table: lock-free validated reads, guarded writes, growth without a pause.
//!
//! ```text
//! hash of the key ── low 8 bits ──► shard ── as a fraction ──► home bucket ── tag, offset ──► entry
//!                                            64 bytes: 7 slots                                key, value, version
//! ```
//!
//! | module | what it is |
//! |---|---|
//! | [`hash`](self::HashSeed) | the keyed hash and what its bits choose |
//! | [`geometry`] | which bucket is whose home, also while a shard grows |
//! | [`bucket`] | seven slots and the sequence that readers validate with |
//! | [`entry`] | bytes of an entry |
//! | [`view`] | lookup and scan without a lock |
//! | `pins` | entries that are being sent from where they are |
//! | `write` | set, delete, increment, inside the caller's transaction |
//! | `grow` | one home at a time |
//! | `snapshot` | copying all entries while they are being changed, for a new backup file |
//! | `restore` | putting back what a backup file says |
//!
//! A lookup costs two dependent cache misses, the bucket and the entry; the shard's geometry stays in the cache.
//!
//! Locks: each shard's, for changes only. What a crash does is argued in [`crate::transaction`].

pub mod bucket;
pub mod entry;
pub mod geometry;
mod grow;
pub mod hash;
#[cfg(all(test, feature = "shuttle"))]
mod interleavings;
mod pins;
mod restore;
mod snapshot;
#[cfg(all(test, not(feature = "shuttle")))]
pub(crate) mod tests;
pub mod view;
mod write;

use std::sync::Arc;

use crate::arena::block_list::{self, BlockList};
use crate::arena::extents::AllocateError;
use crate::arena::{size_class, slab};
use crate::segment::layout::WorkerSlot;
use crate::segment::{OutOfMemory, Segment};
use crate::sys::memory::{Damaged, Word};
use crate::transaction::{self, Transaction, TransactionError};
use crate::wire::SetCondition;
use entry::{Content, Entry};
use pins::Pins;
use view::{ReadError, TableView};
pub(crate) use write::DIGITS_MAX;
use write::ShardWriter;

pub use hash::{HashSeed, KeyHash};
pub use snapshot::HomeEntries;
pub use view::Value;

/// Large values on their way to the backup file take up to this part of the capacity.
const WAITING_SHARE: u64 = 64;

/// Why the table did not do what was asked. Nothing of it has happened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TableError {
    /// There is no memory for the entry.
    #[error(transparent)]
    Full(#[from] OutOfMemory),
    /// The shard was found damaged and is set aside.
    #[error("shard {shard} of the segment is damaged and set aside; run `kvs-tools check`")]
    Quarantined {
        /// Which one.
        shard: u64,
    },
    /// The backup file doesn't keep up: the worker's ring has no room for the change now.
    #[error("the backup file doesn't keep up; try again")]
    BackupBehind,
    /// The value to increment is not a decimal number.
    #[error("the value is not a decimal number of 64 bits")]
    NotANumber,
    /// The sum can't be held.
    #[error("the sum is out of the range of 64 bits, {} to {}", i64::MIN, i64::MAX)]
    NumberRange,
    /// The transaction can't go on.
    #[error(transparent)]
    Transaction(#[from] TransactionError),
}

impl From<AllocateError> for TableError {
    fn from(error: AllocateError) -> Self {
        match error {
            AllocateError::OutOfMemory(full) => Self::Full(full),
            AllocateError::Transaction(error) => Self::Transaction(error),
        }
    }
}

impl From<Damaged> for TableError {
    fn from(damaged: Damaged) -> Self {
        Self::Transaction(damaged.into())
    }
}

/// What is in the table, all shards together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Live entries.
    pub entries: u64,
    /// Bytes of their keys and values.
    pub content_bytes: u64,
}

/// A value that stays where it is until it is [let go](Table::unpin).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PinnedValue {
    /// Where its entry is.
    pub offset: u64,
    /// Its length, in bytes.
    pub length: u64,
}

/// The table of a segment that this process writes.
#[derive(Clone)]
pub struct Table {
    segment: Segment,
    seed: HashSeed,
    pins: Arc<Pins>,
    /// Changes go to the backup rings, too.
    backed_up: bool,
}

impl Table {
    /// The table in `segment`; what is changed in it goes to no backup file.
    ///
    /// # Errors
    /// [`Damaged`] never, on a segment that was opened.
    pub fn new(segment: &Segment) -> Result<Self, Damaged> {
        let seed = HashSeed::of(segment.header()?);
        Ok(Self { segment: segment.clone(), seed, pins: Arc::default(), backed_up: false })
    }

    /// The same table, with the same pins; every change goes to the backup ring of its worker, which must have one.
    pub fn backed_up(&self) -> Self {
        Self { backed_up: true, ..self.clone() }
    }

    /// The segment it is in.
    pub fn segment(&self) -> &Segment {
        &self.segment
    }

    /// The table as a reader sees it.
    #[inline(always)]
    pub fn view(&self) -> TableView<'_> {
        TableView::new(self.segment.memory(), self.segment.regions(), self.seed)
    }

    /// The hash of `key`.
    #[inline(always)]
    pub fn hash_of(&self, key: &[u8]) -> KeyHash {
        self.seed.hash(0, key)
    }

    /// Asks for the home bucket of `hash` to be brought near.
    #[inline]
    pub fn prefetch_bucket(&self, hash: KeyHash) {
        self.view().prefetch_bucket(hash);
    }

    /// Asks for the entry of `hash` to be brought near; its home bucket is near already. See [`TableView::prefetch_entry`].
    #[inline]
    pub fn prefetch_entry(&self, hash: KeyHash, is_change: bool) -> bool {
        self.view().prefetch_entry(hash, is_change)
    }

    /// Asks for the entry of `hash` to be brought near, which its home doesn't name.
    pub fn prefetch_entry_beyond(&self, hash: KeyHash, is_change: bool) {
        self.view().prefetch_entry_beyond(hash, is_change);
    }

    /// Looks `key` up and lets `copy` take what it needs of the value. `copy` may run several times; its last result
    /// counts. None when there is no such key. Takes the shard's lock only when writers are faster every time.
    ///
    /// # Errors
    /// [`TableError::Quarantined`] when the shard is damaged, [`TableError::Transaction`] when the lock can't be had.
    #[inline]
    pub fn read<R>(
        &self,
        hash: KeyHash,
        key: &[u8],
        mut copy: impl FnMut(&Value<'_>) -> Result<R, Damaged>,
    ) -> Result<Option<R>, TableError> {
        let index = hash.shard(self.segment.regions().shard_count);
        self.settle(index, || self.view().read(hash, key, &mut copy))
    }

    /// Reads without the lock, then with it, then gives up on the shard.
    fn settle<R>(&self, index: u64, mut read: impl FnMut() -> Result<R, ReadError>) -> Result<R, TableError> {
        let shard = self.segment.shard(index)?;
        if shard.quarantined.load() != 0 {
            return Err(TableError::Quarantined { shard: index });
        }
        match read() {
            Ok(found) => Ok(found),
            Err(ReadError::Damaged(damaged)) => Err(self.quarantine(index, damaged)),
            Err(ReadError::Contended) => {
                let _guard = transaction::acquire(&shard.lock)?;
                read().map_err(|error| match error {
                    ReadError::Damaged(damaged) => self.quarantine(index, damaged),
                    ReadError::Contended => self.quarantine(index, Damaged { offset: 0 }),
                })
            }
        }
    }

    fn quarantine(&self, shard: u64, damaged: Damaged) -> TableError {
        log::error!("{damaged}; shard {shard} is set aside");
        if let Ok(shard) = self.segment.shard(shard) {
            self.segment.memory().store(&shard.quarantined, 1);
        }
        TableError::Quarantined { shard }
    }

    /// Changes the shard of `hash`, and sets it aside when it turns out to be damaged.
    fn change<R>(
        &self,
        transaction: &mut Transaction<'_>,
        hash: KeyHash,
        change: impl FnOnce(ShardWriter<'_, '_>) -> Result<R, TableError>,
    ) -> Result<R, TableError> {
        let result = ShardWriter::begin(self, transaction, hash).and_then(change);
        result.map_err(|error| match error {
            TableError::Transaction(TransactionError::Damaged(damaged)) => {
                self.quarantine(hash.shard(self.segment.regions().shard_count), damaged)
            }
            error => error,
        })
    }

    /// Whether an entry of a key and a value of these lengths fits one block; else it goes through a [`BlockList`].
    #[inline(always)]
    pub const fn fits_inline(key_length: usize, value_length: usize) -> bool {
        entry::ENTRY_HEAD_BYTES + entry::content_bytes(key_length as u64, value_length as u64)
            <= size_class::SIZE_MAX
    }

    /// Notes that `key` gets `value`, which [fits](Self::fits_inline); false when the condition forbids it. The caller
    /// notes its own words after this, not before: growth that is due commits what was noted.
    ///
    /// # Errors
    /// [`TableError`]; the transaction is then to be dropped.
    pub fn set(
        &self,
        transaction: &mut Transaction<'_>,
        hash: KeyHash,
        key: &[u8],
        value: &[u8],
        condition: SetCondition,
    ) -> Result<bool, TableError> {
        self.change(transaction, hash, |writer| writer.set(hash, key, &Content::Inline(value), condition))
    }

    /// Notes that `key` gets the value in `list`, which holds the key, filled up with zeros to a multiple of 8, and then
    /// the value. Its blocks become the entry's, and `owner` no longer names it. False when the condition forbids it;
    /// the list is then as it was.
    ///
    /// # Errors
    /// As [`Table::set`].
    pub fn set_assembled(
        &self,
        transaction: &mut Transaction<'_>,
        hash: KeyHash,
        key: &[u8],
        list: &BlockList,
        owner: &Word,
        condition: SetCondition,
    ) -> Result<bool, TableError> {
        self.assembled(transaction, (key, list, owner), |table, transaction, content| {
            table.change(transaction, hash, |writer| writer.set(hash, key, content, condition))
        })
    }

    fn assembled<'s>(
        &self,
        transaction: &mut Transaction<'s>,
        (key, list, owner): (&[u8], &BlockList, &Word),
        change: impl FnOnce(&Self, &mut Transaction<'s>, &Content<'_>) -> Result<bool, TableError>,
    ) -> Result<bool, TableError> {
        let chunks = list.chunks()?;
        let damaged = Damaged { offset: list.offset() };
        let value_length = list.length()?.checked_sub(key.len().next_multiple_of(8) as u64).ok_or(damaged)?;
        let content = Content::Chunked { chunks: &chunks, tail: list.tail()?, value_length };
        let set = change(self, transaction, &content)?;
        if set {
            list.dissolve(transaction, owner)?;
        }
        Ok(set)
    }

    /// Notes that `key` is gone; false when it wasn't there.
    ///
    /// # Errors
    /// As [`Table::set`].
    pub fn delete(
        &self,
        transaction: &mut Transaction<'_>,
        hash: KeyHash,
        key: &[u8],
    ) -> Result<bool, TableError> {
        self.change(transaction, hash, |writer| writer.delete(hash, key))
    }

    /// Notes that the decimal number under `key`, 0 when there is none, grows by `by`; returns the sum.
    ///
    /// # Errors
    /// As [`Table::set`], and [`TableError::NotANumber`], [`TableError::NumberRange`].
    pub fn increment(
        &self,
        transaction: &mut Transaction<'_>,
        hash: KeyHash,
        key: &[u8],
        by: i64,
    ) -> Result<i64, TableError> {
        self.change(transaction, hash, |writer| writer.increment(hash, key, by))
    }

    /// Pins the value of `key`, if it is a chunked one; None when there is no such key or its value is a small one now.
    ///
    /// # Errors
    /// As [`Table::read`].
    pub fn pin(&self, hash: KeyHash, key: &[u8]) -> Result<Option<PinnedValue>, TableError> {
        let index = hash.shard(self.segment.regions().shard_count);
        let mut pinned: Option<u64> = None;
        // Runs again when the entry turns out not to be the key's any more: then the pin was in vain.
        let found = self.settle(index, || {
            pinned.take().into_iter().for_each(|offset| self.pins.remove(offset));
            self.view().find(hash, key, |place| {
                pinned.take().into_iter().for_each(|offset| self.pins.remove(offset));
                if place.entry.is_chunked() {
                    self.pins.add(place.entry.offset);
                    pinned = Some(place.entry.offset);
                }
                Ok(PinnedValue { offset: place.entry.offset, length: place.entry.value_length() })
            })
        });
        match found {
            Ok(Some(value)) if pinned == Some(value.offset) => Ok(Some(value)),
            other => {
                pinned.into_iter().for_each(|offset| self.pins.remove(offset));
                other.map(|_| None)
            }
        }
    }

    /// Pins the entry at `offset` again, of whose value of `length` bytes a dead data server was sending.
    ///
    /// # Errors
    /// [`Damaged`] when there is no such value.
    pub fn pin_again(&self, offset: u64, length: u64) -> Result<PinnedValue, Damaged> {
        let entry = self.pinned_entry(offset)?;
        if !entry.is_chunked() || entry.value_length() != length {
            return Err(Damaged { offset });
        }
        self.pins.add(offset);
        Ok(PinnedValue { offset, length })
    }

    /// From now on nothing that was replaced is freed: what a dead data server was sending is not all pinned again.
    pub fn hold_garbage(&self) {
        self.pins.hold(true);
    }

    /// Everything that is being sent is pinned.
    pub fn release_garbage(&self) {
        self.pins.hold(false);
    }

    /// Keeps the large entry at `offset`, which a backup ring names, from being freed.
    pub(crate) fn pin_entry(&self, offset: u64) -> Result<(), Damaged> {
        self.pins.add_waiting(offset, self.pinned_entry(offset)?.value_length());
        Ok(())
    }

    /// Lets it go.
    pub(crate) fn unpin_entry(&self, offset: u64) -> Result<(), Damaged> {
        self.pins.remove_waiting(offset, self.pinned_entry(offset)?.value_length());
        Ok(())
    }

    /// Whether so much of the memory is held by large values on their way to the backup file that no more should be
    /// replaced.
    pub fn holds_too_much_for_backup(&self) -> bool {
        self.pins.waiting_bytes() > self.segment.regions().capacity_bytes / WAITING_SHARE
    }

    /// Lets a pinned value go.
    pub fn unpin(&self, value: PinnedValue) {
        self.pins.remove(value.offset);
    }

    /// The contiguous memory with the bytes of a pinned value from position `from` on: its offset and length.
    ///
    /// # Errors
    /// [`Damaged`] when it can't be where it should.
    pub fn pinned_piece(&self, value: PinnedValue, from: u64) -> Result<(u64, u64), Damaged> {
        let damaged = Damaged { offset: value.offset };
        Entry::load(self.segment.memory(), value.offset)?.ok_or(damaged)?.value_piece(from)
    }

    /// Gives back the blocks of the chunked entries that the worker of `slot` has replaced or removed and nobody sends any
    /// more, a few in each of many small transactions. To be called after each commit, and now and then while some
    /// are left; killed on the way, the next call goes on.
    ///
    /// # Errors
    /// [`TransactionError`] when a transaction can't go on.
    #[inline]
    pub fn collect_garbage(&self, slot: &WorkerSlot) -> Result<(), TransactionError> {
        if slot.garbage.load() == 0 || self.pins.are_held() {
            return Ok(());
        }
        let mut link = &slot.garbage;
        loop {
            let offset = link.load();
            if offset == 0 {
                return Ok(());
            }
            let entry = Entry::load(self.segment.memory(), offset)?.filter(Entry::is_chunked);
            let entry = entry.ok_or(Damaged { offset })?;
            if self.pins.contains(offset) {
                link = entry.garbage_word()?;
            } else {
                self.free_chunked(slot, link, &entry)?;
            }
        }
    }

    /// Frees a retired entry that `link` names, and takes it off the list.
    fn free_chunked(
        &self,
        slot: &WorkerSlot,
        link: &Word,
        entry: &Entry<'_>,
    ) -> Result<(), TransactionError> {
        let words = entry.chunk_words()?;
        loop {
            let mut transaction = Transaction::begin(&self.segment, slot);
            slab::lock_shard_of(&mut transaction, entry.offset)?;
            if block_list::give_back_chunks(&mut transaction, entry.chunk_count_word()?, words)? {
                slab::free(&mut transaction, entry.offset)?;
                transaction.store(link, entry.garbage_word()?.load());
                return transaction.commit();
            }
            transaction.commit()?;
        }
    }

    /// Visits the keys of up to `homes_max` homes from `cursor` on; see [`TableView::scan`].
    ///
    /// # Errors
    /// As [`Table::read`].
    pub fn scan(
        &self,
        cursor: u64,
        homes_max: usize,
        visit: &mut dyn FnMut(&[u8]),
    ) -> Result<Option<u64>, TableError> {
        let mut at = Some(cursor);
        for _ in 0..homes_max {
            let Some(cursor) = at else { return Ok(None) };
            let shard = TableView::shard_of_cursor(cursor);
            if shard >= self.segment.regions().shard_count {
                return Ok(None);
            }
            at = self.settle(shard, || self.view().scan(cursor, 1, visit))?;
        }
        Ok(at)
    }

    /// The entry at `offset`, which is pinned.
    pub(crate) fn pinned_entry(&self, offset: u64) -> Result<Entry<'_>, Damaged> {
        Entry::load(self.segment.memory(), offset)?.ok_or(Damaged { offset })
    }

    /// What is in the table now.
    pub fn totals(&self) -> Totals {
        let shards =
            (0..self.segment.regions().shard_count).filter_map(|index| self.segment.shard(index).ok());
        shards.fold(Totals::default(), |sum, shard| Totals {
            entries: sum.entries.wrapping_add(shard.entries.load()),
            content_bytes: sum.content_bytes.wrapping_add(shard.content_bytes.load()),
        })
    }
}
