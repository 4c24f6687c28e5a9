//! The hash table: lock-free validated reads, guarded writes, growth without a pause.

pub mod geometry;
mod hash;

use crate::arena::block_list::BlockList;
use crate::arena::extents::AllocateError;
use crate::segment::layout::WorkerSlot;
use crate::segment::{OutOfMemory, Segment};
use crate::sys::memory::{Damaged, Word};
use crate::transaction::{Transaction, TransactionError};
use crate::wire::SetCondition;

pub use hash::{HashSeed, KeyHash};

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
    /// The value to increment is not a decimal number.
    #[error("the value is not a decimal number of 64 bits")]
    NotANumber,
    /// The sum can't be held.
    #[error("the sum is out of the range of 64 bits")]
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

/// A value that was found, to be copied before the lookup is validated.
pub struct Value<'v> {
    length: u64,
    of: std::marker::PhantomData<&'v ()>,
}

impl Value<'_> {
    /// Its length, in bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Copies its bytes from position `from` on into `target`.
    ///
    /// # Errors
    /// [`Damaged`] when it can't be; the lookup is then repeated.
    pub fn copy_to(&self, _from: u64, _target: &mut [u8]) -> Result<(), Damaged> {
        Err(Damaged { offset: 0 })
    }
}

/// The table of a segment.
#[derive(Clone)]
pub struct Table {
    segment: Segment,
    seed: HashSeed,
}

#[allow(unused_variables, missing_docs, clippy::missing_errors_doc)]
impl Table {
    pub fn new(segment: &Segment) -> Result<Self, Damaged> {
        Ok(Self { segment: segment.clone(), seed: HashSeed::of(segment.header()?) })
    }

    pub fn segment(&self) -> &Segment {
        &self.segment
    }

    pub fn hash_of(&self, key: &[u8]) -> KeyHash {
        self.seed.hash(0, key)
    }

    pub fn prefetch_bucket(&self, hash: KeyHash) {}

    pub fn prefetch_entry(&self, hash: KeyHash) {}

    pub fn read<R>(
        &self,
        hash: KeyHash,
        key: &[u8],
        copy: impl FnMut(&Value<'_>) -> Result<R, Damaged>,
    ) -> Result<Option<R>, TableError> {
        Ok(None)
    }

    pub fn fits_inline(key_length: usize, value_length: usize) -> bool {
        key_length.next_multiple_of(8) + value_length + 16 <= 4064
    }

    pub fn set(
        &self,
        transaction: &mut Transaction<'_>,
        hash: KeyHash,
        key: &[u8],
        value: &[u8],
        condition: SetCondition,
    ) -> Result<bool, TableError> {
        Err(TableError::Full(OutOfMemory))
    }

    pub fn set_assembled(
        &self,
        transaction: &mut Transaction<'_>,
        hash: KeyHash,
        key: &[u8],
        list: &BlockList,
        owner: &Word,
        condition: SetCondition,
    ) -> Result<bool, TableError> {
        Err(TableError::Full(OutOfMemory))
    }

    pub fn delete(
        &self,
        transaction: &mut Transaction<'_>,
        hash: KeyHash,
        key: &[u8],
    ) -> Result<bool, TableError> {
        Ok(false)
    }

    pub fn increment(
        &self,
        transaction: &mut Transaction<'_>,
        hash: KeyHash,
        key: &[u8],
        by: i64,
    ) -> Result<i64, TableError> {
        Err(TableError::Full(OutOfMemory))
    }

    pub fn collect_garbage(&self, slot: &WorkerSlot) -> Result<(), TransactionError> {
        Ok(())
    }

    pub fn scan(
        &self,
        cursor: u64,
        homes_max: usize,
        visit: &mut dyn FnMut(&[u8]),
    ) -> Result<Option<u64>, TableError> {
        Ok(None)
    }

    pub fn totals(&self) -> Totals {
        Totals::default()
    }
}
