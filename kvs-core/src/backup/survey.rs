//! What a backup file holds and what it lacks, all of it: for people who want to know, and for saving what can be saved.
//!
//! Nothing is written and nothing locked. A file that a running store writes may end in the middle of a batch, which looks like a torn
//! end.

use std::io;

use super::disk::DiskFile;
use super::record::{FILE_HEADER_BYTES, FileHeader, HeaderError, Kind, RECORD_HEADER_BYTES, RecordHeader};
use super::scan::{Sound, for_each_sound};

/// Gaps that are listed one by one.
pub const GAPS_LISTED_MAX: usize = 1_000;

/// A part of a file that holds no sound record, or the place where records are missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    /// Where it begins.
    pub from: u64,
    /// Where the next sound record begins, or the file ends.
    pub to: u64,
    /// Records that were there, as far as that is known.
    pub records_lost: Option<u64>,
}

/// What is in a file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Survey {
    /// Bytes looked at.
    pub length: u64,
    /// Sound records that give a key a value.
    pub sets: u64,
    /// Sound records that delete one.
    pub deletes: u64,
    /// Sound marks.
    pub marks: u64,
    /// Up to where a mark says that the file was synced.
    pub synced: u64,
    /// Parts that are not sound, from the first on.
    pub gaps: Vec<Gap>,
    /// All of them, listed or not.
    pub gap_count: u64,
    /// Where the torn end begins, if there is one: nobody was told that what is behind is safe. And sound records in it.
    pub torn: Option<(u64, u64)>,
}

impl Survey {
    /// Gaps in what was synced, which no power cut explains.
    pub fn damage(&self) -> impl Iterator<Item = &Gap> {
        self.gaps.iter().filter(|gap| self.torn.is_none_or(|(from, _)| gap.from < from))
    }
}

/// Looks at every byte of `file` up to `end`, and shows each sound record, with its place, to `visit`.
///
/// # Errors
/// What the system says.
pub fn survey(
    file: &dyn DiskFile,
    header: &FileHeader,
    end: u64,
    visit: &mut dyn FnMut(u64, &Sound<'_>),
) -> io::Result<Survey> {
    let mut walk = Walk::new();
    for_each_sound(file, header, (FILE_HEADER_BYTES as u64, end), &mut |at, record| {
        walk.take(at, &record.header);
        visit(at, &record);
    })?;
    Ok(walk.end(end))
}

/// The survey under way.
struct Walk {
    found: Survey,
    /// Where the next record begins, its number, and the checksum of the one before.
    position: u64,
    sequence: u64,
    chain: Option<u32>,
    /// Sound records before each listed gap.
    before: Vec<u64>,
    records: u64,
}

impl Walk {
    fn new() -> Self {
        Self {
            found: Survey::default(),
            position: FILE_HEADER_BYTES as u64,
            sequence: 1,
            chain: Some(0),
            before: Vec::new(),
            records: 0,
        }
    }

    fn take(&mut self, at: u64, record: &RecordHeader) {
        let follows = record.sequence == self.sequence && self.chain == Some(record.previous);
        if at != self.position || !follows {
            let records_lost = record.sequence.checked_sub(self.sequence);
            self.gap(Gap { from: self.position, to: at, records_lost });
        }
        match record.kind {
            Kind::Set => self.found.sets += 1,
            Kind::Delete => self.found.deletes += 1,
            Kind::Synced => {
                self.found.marks += 1;
                self.found.synced = self.found.synced.max(record.version);
            }
        }
        self.records += 1;
        self.position = at + record.length as u64;
        (self.sequence, self.chain) = (record.sequence.wrapping_add(1), Some(record.checksum));
    }

    fn gap(&mut self, gap: Gap) {
        self.found.gap_count += 1;
        if self.found.gaps.len() < GAPS_LISTED_MAX {
            self.found.gaps.push(gap);
            self.before.push(self.records);
        }
    }

    fn end(mut self, end: u64) -> Survey {
        self.found.length = end;
        if self.position < end {
            self.gap(Gap { from: self.position, to: end, records_lost: None });
        }
        let found = &mut self.found;
        let first = found.gaps.iter().position(|gap| gap.from >= found.synced);
        found.torn = first.map(|index| (found.gaps[index].from, self.records - self.before[index]));
        self.found
    }
}

/// Who the file is, and what is wrong with its first bytes when only those are damaged that say nothing of that.
///
/// # Errors
/// What the system says, or why it can't be told.
pub fn identify(file: &dyn DiskFile) -> io::Result<Result<(FileHeader, Option<HeaderError>), HeaderError>> {
    let mut bytes = [0; FILE_HEADER_BYTES];
    let count = file.read_at(&mut bytes, 0)?;
    let error = match FileHeader::decode(&bytes[..count]) {
        Ok(header) => return Ok(Ok((header, None))),
        Err(error @ HeaderError::Newer(_)) => return Ok(Err(error)),
        Err(error) => error,
    };
    if count < FILE_HEADER_BYTES {
        return Ok(Err(error));
    }
    // Checksums of records begin with who the file is: if the first one fits, it is this.
    let header = FileHeader::decode_unchecked(&bytes);
    let mut first = vec![0; RECORD_HEADER_BYTES];
    let count = file.read_at(&mut first, FILE_HEADER_BYTES as u64)?;
    let length = file.length()?;
    let record = RecordHeader::decode(&first[..count]);
    let Some(record) = record.filter(|record| (FILE_HEADER_BYTES + record.length) as u64 <= length) else {
        return Ok(Err(error));
    };
    first.resize(record.length, 0);
    let count = file.read_at(&mut first, FILE_HEADER_BYTES as u64)?;
    let fits = record.checksum_fits(header.checksum_seed(), &first[..count]);
    Ok(if fits { Ok((header, Some(error))) } else { Err(error) })
}
