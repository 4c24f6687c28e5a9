//! Buckets: one cache line of seven slots and a header.
//!
//! ```text
//! 0    header   sequence (56 bits) | reach (8)      of the home that this bucket is
//! 8    slot     tag (16 bits) | offset of the entry (48); 0: empty
//! ...  seven of them
//! ```
//!
//! Invariants
//! - An entry's slot lies between its home bucket and `reach` buckets behind it, wherever there was room.
//! - Whenever a slot of an entry is set, changed or cleared, the sequence of its *home* bucket goes up afterwards and
//!   before the entry's memory is free again. A reader that finds the sequence as it was has read what was there.
//! - Slots change through transactions under the shard's lock only; readers load them whole.

use crate::segment::Segment;
use crate::segment::layout::{BUCKET_BYTES, BUCKET_SLOTS, REACH_MAX, Regions};
use crate::shared_struct;
use crate::sys::memory::{Damaged, Offset, View, Word};

use super::hash::KeyHash;

const OFFSET_BITS: u32 = 48;
const OFFSET_MASK: u64 = (1 << OFFSET_BITS) - 1;
const REACH_BITS: u32 = 8;

shared_struct! {
    /// One bucket.
    pub struct Bucket, 64, {
        /// Sequence and reach of the home.
        header: Word,
        /// Tags and offsets.
        slots: [Word; BUCKET_SLOTS],
    }
}

/// What a bucket's header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BucketHeader {
    /// How often an entry of this home was changed.
    pub sequence: u64,
    /// How many buckets behind the home its entries may lie.
    pub reach: u64,
}

impl BucketHeader {
    /// Reads the word; None when the reach can't be.
    #[inline(always)]
    pub const fn decode(word: u64) -> Option<Self> {
        let header = Self { sequence: word >> REACH_BITS, reach: word & ((1 << REACH_BITS) - 1) };
        if header.reach > REACH_MAX { None } else { Some(header) }
    }

    /// The word.
    pub const fn word(self) -> u64 {
        self.sequence << REACH_BITS | self.reach
    }

    /// After one more change, with the given reach.
    pub const fn changed(self, reach: u64) -> Self {
        Self { sequence: self.sequence.wrapping_add(1) & (u64::MAX >> REACH_BITS), reach }
    }
}

/// What a slot says of its entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// Sixteen bits of the key's hash.
    pub tag: u64,
    /// Where the entry is.
    pub offset: u64,
}

impl Slot {
    /// The slot of the entry at `offset`.
    pub const fn new(hash: KeyHash, offset: u64) -> Self {
        Self { tag: hash.tag(), offset }
    }

    /// Reads the word; None when the slot is empty.
    #[inline(always)]
    pub const fn decode(word: u64) -> Option<Self> {
        if word == 0 { None } else { Some(Self { tag: word >> OFFSET_BITS, offset: word & OFFSET_MASK }) }
    }

    /// The word.
    pub const fn word(self) -> u64 {
        self.tag << OFFSET_BITS | self.offset
    }
}

impl Bucket {
    /// Which slots have `tag`, a bit for each; with tag 0, empty ones too.
    ///
    /// All are looked at, without a branch: one that depended on where the slot is could not be foreseen, and nothing that
    /// comes after the lookup could begin before the bucket is here.
    #[inline(always)]
    pub fn slots_with_tag(&self, tag: u64) -> u32 {
        let from = tag << OFFSET_BITS;
        let has_tag = |word: &Word| u32::from(word.load().wrapping_sub(from) <= OFFSET_MASK);
        self.slots.iter().rev().fold(0, |found, word| found << 1 | has_tag(word))
    }
}

/// The buckets of one shard, as anybody sees them.
#[derive(Clone, Copy)]
pub struct Buckets<'v> {
    view: &'v View,
    start: u64,
    limit: u64,
}

impl<'v> Buckets<'v> {
    /// Those of shard `index`.
    #[inline(always)]
    pub fn new(view: &'v View, regions: &Regions, index: u64) -> Self {
        let limit = regions.bucket_region_bytes / BUCKET_BYTES;
        Self { view, start: regions.bucket_region(index), limit }
    }

    /// Those of shard `index` that lie in the first `bytes` of its region, where memory is reserved.
    #[inline(always)]
    pub fn within(view: &'v View, regions: &Regions, index: u64, bytes: u64) -> Self {
        let limit = bytes.min(regions.bucket_region_bytes) / BUCKET_BYTES;
        Self { view, start: regions.bucket_region(index), limit }
    }

    /// Those of shard `index` of a segment that this process writes.
    pub fn of(segment: &'v Segment, index: u64) -> Self {
        Self::new(segment.memory(), segment.regions(), index)
    }

    /// Where bucket `index` is, or would be.
    #[inline(always)]
    pub fn offset(&self, index: u64) -> u64 {
        self.start.wrapping_add(index.wrapping_mul(BUCKET_BYTES))
    }

    /// Bucket `index`.
    ///
    /// # Errors
    /// [`Damaged`] when the shard has no room for it.
    #[inline(always)]
    pub fn get(&self, index: u64) -> Result<&'v Bucket, Damaged> {
        let offset = self.offset(index);
        if index >= self.limit {
            return Err(Damaged { offset });
        }
        self.view.object(Offset::new(offset))
    }

    /// Header of bucket `index`.
    ///
    /// # Errors
    /// [`Damaged`] when it can't be one.
    #[inline(always)]
    pub fn header(&self, index: u64) -> Result<BucketHeader, Damaged> {
        self.header_of(self.get(index)?, index)
    }

    /// Header of `bucket`, which has this index.
    ///
    /// # Errors
    /// [`Damaged`] when it can't be one.
    #[inline(always)]
    pub fn header_of(&self, bucket: &Bucket, index: u64) -> Result<BucketHeader, Damaged> {
        let damaged = || Damaged { offset: self.offset(index) };
        BucketHeader::decode(bucket.header.load()).ok_or_else(damaged)
    }

    /// Asks for bucket `index` to be brought near.
    #[inline(always)]
    pub fn prefetch(&self, index: u64) {
        self.view.prefetch(self.offset(index));
    }
}
