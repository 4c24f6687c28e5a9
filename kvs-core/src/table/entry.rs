//! Entries: a key with its value and what is known about it.
//!
//! ```text
//! 0    word 0     version (48 bits) | checksum (16)          0: being built, or not decided yet
//! 8    word 1     value length (32) | key length (16) | flags (8) | 0 (8)      from the lowest bits up
//! 16   extended?  expires_at_ms, group                       only with FLAG_EXTENDED
//! ..   chunked?   chunk count, next of the garbage list, then the chunk table   only with FLAG_CHUNKED
//! ..   content    the key, filled up with zeros to a multiple of 8, then the value
//! ```
//!
//! A chunked entry's content begins in its chunks, in their order; what they don't hold is the tail, kept here.
//!
//! Invariants
//! - Everything but word 0 is written while the block is free; word 0 is part of the transaction that publishes it, and
//!   neither changes while a slot names the entry. Entries are replaced, never written into.
//! - Versions go up in a shard with every change and are never used again.
//! - The checksum covers word 1 and all that follows in the block, not the chunks.
//!
//! A crash leaves an entry published or its block free.

use super::hash::{HashSeed, KeyHash};
use crate::arena::block_list::{CHUNKS_MAX, Chunk};
use crate::segment::layout::LAYOUT_HASH;
use crate::sys::memory::{Damaged, Memory, View, Window, Word};

/// Bytes that come near together.
const CACHE_LINE_BYTES: u64 = 64;

/// The entry has words for expiry and group.
pub const FLAG_EXTENDED: u64 = 1;
/// The content begins in chunks.
pub const FLAG_CHUNKED: u64 = 2;
/// Bytes of the two words every entry has.
pub const ENTRY_HEAD_BYTES: u64 = 16;
/// Bytes of expiry and group.
const EXTENDED_BYTES: u64 = 16;
/// Bytes before the chunk table: count and garbage link.
const CHUNKED_BYTES: u64 = 16;
const CHECKSUM_BITS: u32 = 16;

/// Bytes that content of a key and a value takes.
#[inline(always)]
pub const fn content_bytes(key_length: u64, value_length: u64) -> u64 {
    key_length.next_multiple_of(8) + value_length
}

/// An entry as its first words describe it. Nothing here is trusted: the bytes may be changing, or damaged.
#[derive(Clone, Copy)]
pub struct Entry<'v> {
    memory: Window<'v>,
    /// Where it is.
    pub offset: u64,
    word0: u64,
    word1: u64,
    chunk_count: u64,
}

impl<'v> Entry<'v> {
    /// Looks at the entry at `offset`; None while it isn't published.
    ///
    /// # Errors
    /// [`Damaged`] when there can't be one.
    #[inline(always)]
    pub fn load(view: &'v View, offset: u64) -> Result<Option<Self>, Damaged> {
        Self::load_within(view.whole(), offset)
    }

    /// Looks at the entry at `offset`, of which nothing outside of `memory` is ever touched.
    ///
    /// # Errors
    /// [`Damaged`] when there can't be one.
    #[inline(always)]
    pub fn load_within(memory: Window<'v>, offset: u64) -> Result<Option<Self>, Damaged> {
        let word0 = memory.word(offset)?.load();
        let word1 = memory.word(offset + 8)?.load();
        if word0 == 0 {
            return Ok(None);
        }
        let entry = Self { memory, offset, word0, word1, chunk_count: 0 };
        let chunk_count = if entry.is_chunked() { entry.load_chunk_count()? } else { 0 };
        Ok(Some(Self { chunk_count, ..entry }))
    }

    // What is only for chunked entries stands in functions of their own, and takes the entry by value: it is kept in
    // registers then where it isn't chunked.
    #[cold]
    fn load_chunk_count(self) -> Result<u64, Damaged> {
        let count = self.chunk_count_word()?.load();
        if count > CHUNKS_MAX as u64 { Err(Damaged { offset: self.offset }) } else { Ok(count) }
    }

    /// Its version in its shard.
    pub fn version(&self) -> u64 {
        self.word0 >> CHECKSUM_BITS
    }

    /// Length of the key, in bytes.
    #[inline(always)]
    pub fn key_length(&self) -> u64 {
        self.word1 >> 32 & 0xffff
    }

    /// Length of the value, in bytes.
    #[inline(always)]
    pub fn value_length(&self) -> u64 {
        self.word1 & 0xffff_ffff
    }

    /// Its flags.
    #[inline(always)]
    pub fn flags(&self) -> u64 {
        self.word1 >> 48 & 0xff
    }

    /// Whether its content begins in chunks.
    #[inline(always)]
    pub fn is_chunked(&self) -> bool {
        self.flags() & FLAG_CHUNKED != 0
    }

    /// Number of its chunks; 0 when it isn't chunked.
    pub fn chunk_count(&self) -> u64 {
        self.chunk_count
    }

    #[inline(always)]
    fn chunked_at(&self) -> u64 {
        let extended = if self.flags() & FLAG_EXTENDED != 0 { EXTENDED_BYTES } else { 0 };
        self.offset + ENTRY_HEAD_BYTES + extended
    }

    /// The word with the number of chunks of a chunked entry.
    ///
    /// # Errors
    /// [`Damaged`] when it lies outside.
    pub fn chunk_count_word(&self) -> Result<&'v Word, Damaged> {
        self.memory.word(self.chunked_at())
    }

    /// The word that links a chunked entry into its worker's garbage list.
    ///
    /// # Errors
    /// [`Damaged`] when it lies outside.
    pub fn garbage_word(&self) -> Result<&'v Word, Damaged> {
        self.memory.word(self.chunked_at() + 8)
    }

    /// The words of the chunk table that are in use.
    ///
    /// # Errors
    /// [`Damaged`] when it lies outside.
    pub fn chunk_words(&self) -> Result<&'v [Word], Damaged> {
        if !self.is_chunked() {
            return Ok(&[]);
        }
        self.memory.words(self.chunked_at() + CHUNKED_BYTES, self.chunk_count)
    }

    /// Where the part of the content that is in this block begins.
    #[inline(always)]
    fn inline_at(&self) -> u64 {
        let chunked = if self.is_chunked() { CHUNKED_BYTES + self.chunk_count * 8 } else { 0 };
        self.chunked_at() + chunked
    }

    /// Bytes that the chunks hold.
    ///
    /// # Errors
    /// [`Damaged`] when a chunk can't be.
    pub fn chunk_bytes(&self) -> Result<u64, Damaged> {
        self.chunk_words()?.iter().try_fold(0, |sum, word| {
            Chunk::decode(word.load()).map(|chunk| sum + chunk.bytes()).ok_or(Damaged { offset: self.offset })
        })
    }

    /// Bytes it takes in this block.
    ///
    /// # Errors
    /// [`Damaged`] when a chunk can't be.
    pub fn block_bytes(&self) -> Result<u64, Damaged> {
        let content = content_bytes(self.key_length(), self.value_length());
        Ok(self.inline_at() - self.offset + content.saturating_sub(self.chunk_bytes()?))
    }

    /// Asks for the entry at `offset` to be brought near: its first two cache lines, over which even small ones lie mostly.
    #[inline(always)]
    pub fn prefetch(view: &View, offset: u64) {
        view.prefetch(offset);
        view.prefetch(offset.wrapping_add(CACHE_LINE_BYTES));
    }

    /// Whether it is the entry of `key`.
    ///
    /// # Errors
    /// [`Damaged`] when its content can't be where it should.
    #[inline(always)]
    pub fn has_key(&self, key: &[u8]) -> Result<bool, Damaged> {
        if self.key_length() != key.len() as u64 {
            return Ok(false);
        }
        if !self.is_chunked() {
            return self.memory.equal_bytes(self.inline_at(), key);
        }
        self.has_key_in_chunks(key)
    }

    #[cold]
    fn has_key_in_chunks(self, key: &[u8]) -> Result<bool, Damaged> {
        let mut at = 0;
        while at < key.len() {
            let (offset, length) = self.piece(at as u64)?;
            let part = &key[at..key.len().min(at + length as usize)];
            if part.is_empty() || !self.memory.equal_bytes(offset, part)? {
                return Ok(false);
            }
            at += part.len();
        }
        Ok(true)
    }

    /// The contiguous memory with the content from position `from` on: its offset and length.
    fn piece(&self, from: u64) -> Result<(u64, u64), Damaged> {
        let content = content_bytes(self.key_length(), self.value_length());
        let mut start = 0;
        for word in self.chunk_words()? {
            let chunk = Chunk::decode(word.load()).ok_or(Damaged { offset: self.offset })?;
            if from < start + chunk.bytes() {
                let within = from - start;
                return Ok((
                    chunk.offset.wrapping_add(within),
                    (chunk.bytes() - within).min(content.saturating_sub(from)),
                ));
            }
            start += chunk.bytes();
        }
        Ok((self.inline_at() + (from - start), content.saturating_sub(from)))
    }

    /// The contiguous memory with the value from position `from` on: its offset and length.
    ///
    /// # Errors
    /// [`Damaged`] when a chunk can't be.
    pub fn value_piece(&self, from: u64) -> Result<(u64, u64), Damaged> {
        self.piece(self.key_length().next_multiple_of(8) + from)
    }

    /// Appends the key and the value to `target`, the key not filled up.
    ///
    /// # Errors
    /// [`Damaged`] when its content can't be where it should.
    pub fn append_content(&self, target: &mut Vec<u8>) -> Result<(), Damaged> {
        let (key_length, start) = (self.key_length() as usize, target.len());
        target.resize(start + key_length + self.value_length() as usize, 0);
        let (key, value) = target[start..].split_at_mut(key_length);
        self.copy_content(0, key)?;
        self.copy_value(0, value)
    }

    /// Copies content from position `from` on into `target`.
    #[inline(always)]
    fn copy_content(&self, from: u64, target: &mut [u8]) -> Result<(), Damaged> {
        if self.is_chunked() {
            return self.copy_from_chunks(from, target);
        }
        self.memory.read_bytes(self.inline_at() + from, target)
    }

    #[cold]
    fn copy_from_chunks(self, mut from: u64, mut target: &mut [u8]) -> Result<(), Damaged> {
        while !target.is_empty() {
            let (offset, length) = self.piece(from)?;
            if length == 0 {
                return Err(Damaged { offset: self.offset });
            }
            let count = target.len().min(length as usize);
            let (now, later) = target.split_at_mut(count);
            self.memory.read_bytes(offset, now)?;
            (from, target) = (from + count as u64, later);
        }
        Ok(())
    }

    /// Copies the value from position `from` on into `target`.
    ///
    /// # Errors
    /// [`Damaged`] when the value has no such bytes.
    #[inline(always)]
    pub fn copy_value(&self, from: u64, target: &mut [u8]) -> Result<(), Damaged> {
        if from.checked_add(target.len() as u64).is_none_or(|end| end > self.value_length()) {
            return Err(Damaged { offset: self.offset });
        }
        self.copy_content(self.key_length().next_multiple_of(8) + from, target)
    }

    /// Copies the key into `target`, in place of what is there.
    ///
    /// # Errors
    /// [`Damaged`] when its content can't be where it should.
    pub fn copy_key(&self, target: &mut Vec<u8>) -> Result<(), Damaged> {
        target.clear();
        self.append_key(target)
    }

    /// Appends the key to `target`.
    ///
    /// # Errors
    /// [`Damaged`] when its content can't be where it should.
    pub fn append_key(&self, target: &mut Vec<u8>) -> Result<(), Damaged> {
        let start = target.len();
        target.resize(start + self.key_length() as usize, 0);
        self.copy_content(0, &mut target[start..])
    }

    /// The hash of its key.
    ///
    /// # Errors
    /// [`Damaged`] when its content can't be where it should.
    pub fn hash(&self, seed: HashSeed) -> Result<KeyHash, Damaged> {
        let mut hasher = seed.hasher(0);
        let mut buffer = [0u8; 128];
        let mut at = 0;
        while at < self.key_length() {
            let piece = &mut buffer[..(self.key_length() - at).min(128) as usize];
            self.copy_content(at, piece)?;
            hasher.write(piece);
            at += piece.len() as u64;
        }
        Ok(hasher.finish())
    }

    /// Whether the checksum fits.
    ///
    /// # Errors
    /// [`Damaged`] when its content can't be where it should.
    pub fn checksum_fits(&self) -> Result<bool, Damaged> {
        let found = self.word0 & ((1 << CHECKSUM_BITS) - 1);
        Ok(found == checksum(self.memory, self.offset, self.block_bytes()?, self.garbage_skip())?)
    }

    /// The garbage link and the count of chunks change when an entry is retired; the checksum leaves them out.
    fn garbage_skip(&self) -> Option<u64> {
        self.is_chunked().then(|| self.chunked_at())
    }
}

/// Sixteen bits of a CRC32C over the block from word 1 on, begun with the layout's hash.
fn checksum(memory: Window<'_>, offset: u64, bytes: u64, skip: Option<u64>) -> Result<u64, Damaged> {
    let mut buffer = [0u8; 512];
    let mut sum = LAYOUT_HASH as u32;
    let end = offset.checked_add(bytes).ok_or(Damaged { offset })?;
    let mut at = offset + 8;
    while at < end {
        if skip == Some(at) {
            at += CHUNKED_BYTES;
            continue;
        }
        let stop = skip.filter(|&skip| skip > at).unwrap_or(end).min(end);
        let count = (stop - at).min(buffer.len() as u64) as usize;
        memory.read_bytes(at, &mut buffer[..count])?;
        sum = crc32c::crc32c_append(sum, &buffer[..count]);
        at += count as u64;
    }
    Ok(u64::from(sum ^ sum >> 16) & ((1 << CHECKSUM_BITS) - 1))
}

/// What a new entry's content comes from.
pub enum Content<'c> {
    /// A value that fits into the block, with its key.
    Inline(&'c [u8]),
    /// Chunks that hold key and value already, and the bytes that are left, with their offset.
    Chunked {
        /// The chunks.
        chunks: &'c [Chunk],
        /// Offset and length of what they don't hold.
        tail: (u64, u64),
        /// Length of the value, in bytes.
        value_length: u64,
    },
}

impl Content<'_> {
    /// Bytes the entry will take in its block.
    pub fn block_bytes(&self, key: &[u8]) -> u64 {
        match self {
            Self::Inline(value) => ENTRY_HEAD_BYTES + content_bytes(key.len() as u64, value.len() as u64),
            Self::Chunked { chunks, tail, .. } => {
                ENTRY_HEAD_BYTES + CHUNKED_BYTES + chunks.len() as u64 * 8 + tail.1
            }
        }
    }

    /// Bytes of the value that go where the entry's record goes; a large value is named there instead.
    pub fn inline_length(&self) -> usize {
        match self {
            Self::Inline(value) => value.len(),
            Self::Chunked { .. } => 0,
        }
    }

    /// Length of the value, in bytes.
    pub fn value_length(&self) -> u64 {
        match self {
            Self::Inline(value) => value.len() as u64,
            Self::Chunked { value_length, .. } => *value_length,
        }
    }
}

/// Builds an entry in the free block at `offset`, all but word 0, and returns that word for `version`.
///
/// # Errors
/// [`Damaged`] when the block lies outside.
#[inline]
pub fn build(
    memory: &Memory,
    offset: u64,
    key: &[u8],
    content: &Content<'_>,
    version: u64,
) -> Result<u64, Damaged> {
    // A reader that still looks at the entry that was here before must not take this one for it.
    memory.store(memory.word(offset)?, 0);
    let flags = if matches!(content, Content::Chunked { .. }) { FLAG_CHUNKED } else { 0 };
    let word1 = flags << 48 | (key.len() as u64) << 32 | content.value_length();
    memory.store(memory.word(offset + 8)?, word1);
    let at = offset + ENTRY_HEAD_BYTES;
    let skip = match content {
        Content::Inline(value) => {
            memory.write_bytes(at, key)?;
            memory.write_bytes(at + key.len().next_multiple_of(8) as u64, value)?;
            None
        }
        Content::Chunked { chunks, tail, .. } => {
            memory.store(memory.word(at)?, chunks.len() as u64);
            memory.store(memory.word(at + 8)?, 0);
            let table = at + CHUNKED_BYTES;
            for (index, chunk) in chunks.iter().enumerate() {
                memory.store(memory.word(table + index as u64 * 8)?, chunk.word());
            }
            copy_within(memory, tail.0, table + chunks.len() as u64 * 8, tail.1)?;
            Some(at)
        }
    };
    Ok(version << CHECKSUM_BITS | checksum(memory.whole(), offset, content.block_bytes(key), skip)?)
}

fn copy_within(memory: &Memory, from: u64, to: u64, length: u64) -> Result<(), Damaged> {
    let mut buffer = [0u8; 512];
    let mut done = 0;
    while done < length {
        let count = (length - done).min(buffer.len() as u64) as usize;
        memory.read_bytes(from + done, &mut buffer[..count])?;
        memory.write_bytes(to + done, &buffer[..count])?;
        done += count as u64;
    }
    Ok(())
}
