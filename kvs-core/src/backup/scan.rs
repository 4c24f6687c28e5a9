//! Reading a backup file: whole records in blocks, and what to make of a bad one.
//!
//! Two passes share the work. One thread walks from record to record by their lengths, and looks only whether numbers and
//! chained checksums follow one another; any number of threads then compute the checksums of the blocks it hands out.
//!
//! A bad record is the end of what a power cut left (*torn*), or *damage*. Between two syncs a disk writes sectors in any order, so
//! there may well be sound records behind a torn one. What tells them apart is a mark behind it that says: this was synced. What was
//! synced and is bad is damage; so is a bad record with sound ones behind it in a file that was ended in order.
//!
//! | after the bad record | it is |
//! |---|---|
//! | no sound record | torn: nobody was told that what is missing is safe |
//! | sound records, none of which says that it was synced | torn: the same |
//! | a mark that says so | damage: start stops, nothing is skipped |

use std::io;

use super::disk::DiskFile;
use super::record::{
    FILE_HEADER_BYTES, FileHeader, Kind, RECORD_BYTES_MAX, RECORD_HEADER_BYTES, RecordHeader,
};

/// Bytes read at once.
pub const BLOCK_BYTES: usize = 2 << 20;

/// Whole records, one behind the other.
#[derive(Default)]
pub struct Block {
    /// Where in the file it begins.
    pub position: u64,
    bytes: Vec<u8>,
}

impl Block {
    /// Its length, in bytes.
    pub fn length(&self) -> usize {
        self.bytes.len()
    }

    /// Its records, up to the first whose checksum does not fit; then that one's position in the file.
    pub fn records(&self, seed: u32) -> Records<'_> {
        Records { block: self, at: 0, seed }
    }
}

/// The records of a block.
pub struct Records<'b> {
    block: &'b Block,
    at: usize,
    seed: u32,
}

/// A sound record, with all its bytes.
#[derive(Clone, Copy)]
pub struct Sound<'b> {
    /// What its first bytes say.
    pub header: RecordHeader,
    /// All of them.
    pub bytes: &'b [u8],
}

impl<'b> Sound<'b> {
    /// Its key.
    #[inline]
    pub fn key(&self) -> &'b [u8] {
        self.header.key(self.bytes)
    }

    /// Its value.
    #[inline]
    pub fn value(&self) -> &'b [u8] {
        self.header.value(self.bytes)
    }
}

impl<'b> Iterator for Records<'b> {
    type Item = Result<Sound<'b>, u64>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        let rest = &self.block.bytes[self.at..];
        if rest.is_empty() {
            return None;
        }
        let position = self.block.position + self.at as u64;
        let sound = RecordHeader::decode(rest).and_then(|header| {
            let bytes = rest.get(..header.length)?;
            header.checksum_fits(self.seed, bytes).then_some(Sound { header, bytes })
        });
        let Some(sound) = sound else {
            self.at = self.block.bytes.len();
            return Some(Err(position));
        };
        self.at += sound.header.length;
        Some(Ok(sound))
    }
}

/// Walks through a file.
pub struct Frames<'f> {
    file: &'f dyn DiskFile,
    /// The next record to come.
    position: u64,
    sequence: u64,
    chain: u32,
    end: u64,
}

/// What comes next in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// A block.
    Block,
    /// Nothing: the file ends here.
    End,
    /// Something at this position that can't be the next record.
    Bad(u64),
}

impl<'f> Frames<'f> {
    /// From the first record of `file` to `end`, its length or less.
    pub fn new(file: &'f dyn DiskFile, end: u64) -> Self {
        Self { file, position: FILE_HEADER_BYTES as u64, sequence: 1, chain: 0, end }
    }

    /// Where the next record begins, its number, and the checksum of the one before.
    pub fn reached(&self) -> (u64, u64, u32) {
        (self.position, self.sequence, self.chain)
    }

    /// Fills `block` with the next records.
    ///
    /// # Errors
    /// What the system says.
    pub fn next_block(&mut self, block: &mut Block) -> io::Result<Next> {
        block.position = self.position;
        block.bytes.clear();
        if self.position >= self.end {
            return Ok(Next::End);
        }
        let mut wanted = BLOCK_BYTES;
        loop {
            self.read(block, wanted)?;
            let (whole, more) = self.walk(block);
            if whole > 0 {
                block.bytes.truncate(whole);
                self.position += whole as u64;
                return Ok(Next::Block);
            }
            match more {
                // A record longer than a block.
                Some(length) if length > wanted && self.position + length as u64 <= self.end => {
                    wanted = length
                }
                _ => return Ok(Next::Bad(self.position)),
            }
        }
    }

    fn read(&self, block: &mut Block, wanted: usize) -> io::Result<()> {
        let left = usize::try_from(self.end - self.position).unwrap_or(usize::MAX);
        let from = block.bytes.len();
        block.bytes.resize(wanted.min(left), 0);
        let count = self.file.read_at(&mut block.bytes[from..], self.position + from as u64)?;
        block.bytes.truncate(from + count);
        Ok(())
    }

    /// Walks over the whole records in `block`; returns their length, and that of the one that isn't whole.
    fn walk(&mut self, block: &Block) -> (usize, Option<usize>) {
        let mut at = 0;
        while let Some(header) = RecordHeader::decode(&block.bytes[at..]) {
            if header.sequence != self.sequence || header.previous != self.chain {
                return (at, None);
            }
            if block.bytes.len() - at < header.length {
                return (at, Some(header.length));
            }
            (self.sequence, self.chain) = (header.sequence + 1, header.checksum);
            at += header.length;
        }
        let short = block.bytes.len() - at < RECORD_HEADER_BYTES;
        (at, short.then_some(RECORD_HEADER_BYTES))
    }
}

/// What is to be made of a bad record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bad {
    /// The end of what a power cut left.
    Torn {
        /// Sound records behind it, which nobody was told to be safe.
        sound_behind: u64,
    },
    /// Something that was safe is not what it was.
    Damage {
        /// Where the next sound record begins.
        later: u64,
    },
}

/// Looks what is behind the bad record at `position` of a file of `length` bytes.
///
/// # Errors
/// What the system says.
pub fn judge(file: &dyn DiskFile, header: &FileHeader, position: u64, length: u64) -> io::Result<Bad> {
    let (mut first, mut count, mut proven) = (None, 0, false);
    for_each_sound(file, header, (position + 8, length), &mut |at, record| {
        first.get_or_insert(at);
        count += 1;
        proven |= record.header.kind == Kind::Synced && record.header.version > position;
    })?;
    match first {
        Some(later) if proven => Ok(Bad::Damage { later }),
        _ => Ok(Bad::Torn { sound_behind: count }),
    }
}

/// Bytes that are summed up in vain before only [short](SHORT_BYTES) records are looked for: a client can store a value that looks like
/// the beginnings of many long ones.
const PATIENCE_BYTES: u64 = 1 << 30;
const SHORT_BYTES: usize = 4096;

/// Visits every sound record between two positions, with its position, wherever one begins.
///
/// # Errors
/// What the system says.
pub fn for_each_sound(
    file: &dyn DiskFile,
    header: &FileHeader,
    (from, end): (u64, u64),
    visit: &mut dyn FnMut(u64, Sound<'_>),
) -> io::Result<()> {
    let seed = header.checksum_seed();
    let mut window = Window { file, start: 0, bytes: Vec::new(), end };
    let mut at = from.next_multiple_of(8);
    let mut patience = PATIENCE_BYTES + 8 * end.saturating_sub(from);
    while at + RECORD_HEADER_BYTES as u64 <= end {
        let found = RecordHeader::decode(window.get(at, RECORD_HEADER_BYTES)?);
        let sound = match found {
            Some(header)
                if at + header.length as u64 <= end && (patience > 0 || header.length <= SHORT_BYTES) =>
            {
                patience = patience.saturating_sub(header.length as u64);
                let bytes = window.get(at, header.length)?;
                header.checksum_fits(seed, bytes).then_some(Sound { header, bytes })
            }
            _ => None,
        };
        match sound {
            Some(record) => {
                visit(at, record);
                at += record.header.length as u64;
            }
            None => at += 8,
        }
    }
    Ok(())
}

/// A part of a file in memory.
struct Window<'f> {
    file: &'f dyn DiskFile,
    start: u64,
    bytes: Vec<u8>,
    end: u64,
}

impl Window<'_> {
    /// The bytes at `at`: `length` of them, fewer only when the file has become shorter.
    fn get(&mut self, at: u64, length: usize) -> io::Result<&[u8]> {
        debug_assert!(length <= RECORD_BYTES_MAX);
        let within = at >= self.start && at + length as u64 <= self.start + self.bytes.len() as u64;
        if !within {
            let left = usize::try_from(self.end - at).unwrap_or(usize::MAX);
            self.bytes.resize(length.max(BLOCK_BYTES).min(left), 0);
            let count = self.file.read_at(&mut self.bytes, at)?;
            self.bytes.truncate(count);
            self.start = at;
        }
        let from = (at - self.start) as usize;
        Ok(self.bytes.get(from..from + length).unwrap_or(&[]))
    }
}
