//! A backup file as it is written: records are gathered, written at its end in one call, and count from then on.
//!
//! Invariants
//! - Up to [`Mark::position`] the file holds whole records, each with the checksum of the one before. What a killed process had
//!   written behind that is cut off before anything else is written.
//! - A batch that could not be written is forgotten, and gathered again from where it came.
//! - One writer: whoever has the file's `flock`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::BackupError;
use super::disk::{Disk, DiskFile};
use super::record::{self, ENTRIES_BYTES, FILE_HEADER_BYTES, FileHeader, HeaderError, Kind};
use crate::segment::layout::BackupMark;
use crate::sys::memory::Word;
use crate::transaction::Transaction;

/// How far a file has come. With position 0 there is no file to go on with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Mark {
    /// Which of the files that followed one another.
    pub generation: u64,
    /// Bytes that are written whole.
    pub position: u64,
    /// Number of the next record.
    pub sequence: u64,
    /// Checksum of the last record.
    pub chain: u32,
}

impl Mark {
    /// What the segment says.
    pub fn load(words: &BackupMark) -> Self {
        Self {
            generation: words.generation.load(),
            position: words.position.load(),
            sequence: words.sequence.load(),
            chain: words.chain.load() as u32,
        }
    }

    /// Notes that the segment says so.
    pub fn store(&self, transaction: &mut Transaction<'_>, words: &BackupMark) {
        let all: [(&Word, u64); 4] = [
            (&words.generation, self.generation),
            (&words.position, self.position),
            (&words.sequence, self.sequence),
            (&words.chain, u64::from(self.chain)),
        ];
        all.into_iter().for_each(|(word, value)| transaction.store(word, value));
    }
}

/// A file that was found, locked for this process.
pub struct Found {
    /// The file.
    pub file: Arc<dyn DiskFile>,
    /// Who it is.
    pub header: FileHeader,
    /// Its length, in bytes.
    pub length: u64,
}

/// Opens the backup file at `path` and locks it; None when there is none, or an empty one.
///
/// # Errors
/// [`BackupError::Locked`], [`BackupError::Header`], or what the system says.
pub fn open(disk: &dyn Disk, path: &Path) -> Result<Option<Found>, BackupError> {
    let Some(file) = disk.open(path).map_err(|error| BackupError::io(path, "open it", error))? else {
        return Ok(None);
    };
    if !file.lock().map_err(|error| BackupError::io(path, "lock it", error))? {
        return Err(BackupError::Locked { path: path.to_path_buf() });
    }
    let length = file.length().map_err(|error| BackupError::io(path, "look at it", error))?;
    if length == 0 {
        return Ok(None);
    }
    let header = read_header(&*file, path)?;
    Ok(Some(Found { file: Arc::from(file), header, length }))
}

/// Reads who the file is.
///
/// # Errors
/// [`BackupError::Header`], or what the system says.
pub fn read_header(file: &dyn DiskFile, path: &Path) -> Result<FileHeader, BackupError> {
    let mut bytes = [0; FILE_HEADER_BYTES];
    let count = file.read_at(&mut bytes, 0).map_err(|error| BackupError::io(path, "read it", error))?;
    let header = FileHeader::decode(&bytes[..count]);
    header.map_err(|source: HeaderError| BackupError::Header { path: path.to_path_buf(), source })
}

/// A file that is written.
pub struct Log {
    path: PathBuf,
    file: Arc<dyn DiskFile>,
    seed: u32,
    written: Mark,
    /// Records that are not written yet, and where they lead.
    pending: Vec<u8>,
    sequence: u64,
    chain: u32,
}

/// Room for a batch that is kept between batches.
const PENDING_KEPT_MAX: usize = 8 << 20;

impl Log {
    /// Begins a file at `path`, in the place of one that is there.
    ///
    /// # Errors
    /// What the system says.
    pub fn create(disk: &dyn Disk, path: &Path, header: &FileHeader) -> Result<Self, BackupError> {
        let error = |error| BackupError::io(path, "make it", error);
        let file = disk.create(path).map_err(error)?;
        if !file.lock().map_err(error)? {
            return Err(BackupError::Locked { path: path.to_path_buf() });
        }
        file.write_at(&header.encode(), 0).map_err(|error| BackupError::io(path, "write it", error))?;
        let position = FILE_HEADER_BYTES as u64;
        let mark = Mark { generation: header.generation, position, sequence: 1, chain: 0 };
        Ok(Self::at(path, Arc::from(file), header, mark))
    }

    /// Goes on with a file that reaches up to `mark` at least; what is behind is cut off.
    ///
    /// # Errors
    /// What the system says.
    pub fn resume(path: &Path, found: Found, mark: Mark) -> Result<Self, BackupError> {
        if found.length > mark.position {
            let cut = found.file.set_length(mark.position);
            cut.map_err(|error| BackupError::io(path, "cut off what was written by half", error))?;
        }
        Ok(Self::at(path, found.file, &found.header, mark))
    }

    fn at(path: &Path, file: Arc<dyn DiskFile>, header: &FileHeader, mark: Mark) -> Self {
        let (sequence, chain) = (mark.sequence, mark.chain);
        let seed = header.checksum_seed();
        Self { path: path.to_path_buf(), file, seed, written: mark, pending: Vec::new(), sequence, chain }
    }

    /// The file.
    pub fn file(&self) -> &Arc<dyn DiskFile> {
        &self.file
    }

    /// How far it is written.
    pub fn mark(&self) -> Mark {
        self.written
    }

    /// It has got another name.
    pub fn renamed(&mut self, path: &Path) {
        self.path = path.to_path_buf();
    }

    /// Bytes gathered and not written yet.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Gathers a record, whose key and value `fill` appends.
    ///
    /// # Errors
    /// What `fill` says; the batch is to be [discarded](Self::discard) then.
    #[inline]
    pub fn append<E>(
        &mut self,
        kind: Kind,
        version: u64,
        lengths: (usize, usize),
        fill: impl FnOnce(&mut Vec<u8>) -> Result<(), E>,
    ) -> Result<(), E> {
        let start = self.pending.len();
        record::begin(&mut self.pending, (self.sequence, self.chain), kind, version, lengths);
        fill(&mut self.pending)?;
        self.chain = record::finish(&mut self.pending, start, self.seed);
        self.sequence += 1;
        Ok(())
    }

    /// Gathers a mark that says: up to `position` the file is synced, and the table has so many `entries`.
    pub fn append_synced(&mut self, position: u64, entries: u64) {
        let fill = |target: &mut Vec<u8>| {
            target.extend_from_slice(&entries.to_le_bytes());
            Ok::<(), std::convert::Infallible>(())
        };
        let Ok(()) = self.append(Kind::Synced, position, (0, ENTRIES_BYTES), fill);
    }

    /// Writes what was gathered.
    ///
    /// # Errors
    /// What the system says; the batch is forgotten then.
    pub fn flush(&mut self) -> Result<(), BackupError> {
        let written = self.file.write_at(&self.pending, self.written.position);
        if let Err(error) = written {
            self.discard();
            return Err(BackupError::io(&self.path, "write to it", error));
        }
        self.written.position += self.pending.len() as u64;
        (self.written.sequence, self.written.chain) = (self.sequence, self.chain);
        self.discard();
        Ok(())
    }

    /// Forgets what was gathered.
    pub fn discard(&mut self) {
        (self.sequence, self.chain) = (self.written.sequence, self.written.chain);
        self.pending.clear();
        self.pending.shrink_to(PENDING_KEPT_MAX);
    }
}
