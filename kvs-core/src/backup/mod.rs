//! The backup file: at every moment a complete copy of the table, up to what `--durability` allows.
//!
//! ```text
//! worker ─ change, answer and record, one decision ─► ring in the segment ─┐
//! worker ─────────────────────────────────────────► ring in the segment ─┼─ drain ─► file ─ sync ─► disk
//!                                                     a copy of the table ─┘           (a new one, when it got too long)
//! ```
//!
//! | module | what it is |
//! |---|---|
//! | [`ring`] | a worker's changes on their way |
//! | [`record`] | the bytes of the file |
//! | [`disk`] | what is needed of a disk |
//! | [`log`] | the file as it is written |
//! | [`writer`] | draining, syncing, rewriting: what the backup thread does |
//! | [`scan`] | reading a file, told apart whole, torn and damaged ones |
//! | [`survey`](mod@survey) | what a file holds and lacks, all of it |
//! | [`load`] | from a file to a table |
//! | [`gate`] | what workers and the backup thread say to each other |
//!
//! Records of one key may be in any order; the one with the highest version counts. So rings are drained without looking at each
//! other, and a copy of the table and the changes made meanwhile go into a new file as they come.

pub mod disk;
pub mod gate;
pub mod load;
pub mod log;
pub mod record;
pub mod ring;
pub mod scan;
#[cfg(all(test, not(miri), not(feature = "shuttle")))]
mod simulate;
pub mod survey;
#[cfg(all(test, not(miri), not(feature = "shuttle")))]
mod tests;
pub mod writer;

use std::io;
use std::path::{Path, PathBuf};

use crate::sys::memory::Damaged;
use crate::table::TableError;
use crate::transaction::TransactionError;
use record::HeaderError;

/// Why a backup file can't be read, written or taken for this segment's.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackupError {
    /// The system said no.
    #[error("backup file {}: can't {action}: {source}{}", path.display(), advice(source))]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// It is none, or not one for this release.
    #[error("{} is no backup file that can be used: {source}; choose another --backup, or move it away", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: HeaderError,
    },
    /// Another process has it.
    #[error("backup file {} is in use by another instance; end that one first or choose another --backup", path.display())]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// The file and the segment are not of the same data.
    #[error(
        "backup file {} and the segment hold the data of different instances, and nothing is ever merged: to go on with the \
         segment, move the file away or choose another --backup; to go on with the file, remove the segment with `kvs-tools purge`",
        path.display()
    )]
    OtherInstance {
        /// The file.
        path: PathBuf,
    },
    /// Somebody put another file in its place while it was being written.
    #[error(
        "another file was put in the place of backup file {}, so nothing can be written there: move it away, and a new one is \
         written from memory; to go back to it, end the store and remove the segment with `kvs-tools purge`", path.display()
    )]
    Replaced {
        /// The file.
        path: PathBuf,
    },
    /// The file lacks what the segment knows to have written to it.
    #[error(
        "backup file {} is an older copy than the segment ({what}): to go on with the segment, move the file away, a new one \
         is written; to go back to the copy, remove the segment with `kvs-tools purge`", path.display()
    )]
    Older {
        /// The file.
        path: PathBuf,
        /// How that can be seen.
        what: String,
    },
    /// It is damaged before its end.
    #[error(
        "backup file {} is damaged at byte {offset}: the record there is not what was written, and what follows byte {later} is; \
         `kvs-tools check --backup` lists the damage, and with --salvage FILE writes all that is sound to a new file",
        path.display()
    )]
    Damage {
        /// The file.
        path: PathBuf,
        /// Where the first bad record begins.
        offset: u64,
        /// Where the next sound one begins.
        later: u64,
    },
    /// It holds more than the segment takes.
    #[error("backup file {} holds more than --capacity {capacity} takes; start with a larger one", path.display())]
    Capacity {
        /// The file.
        path: PathBuf,
        /// In bytes.
        capacity: u64,
    },
    /// Something in the segment can't be.
    #[error(transparent)]
    Table(#[from] TableError),
}

impl From<Damaged> for BackupError {
    fn from(damaged: Damaged) -> Self {
        Self::Table(damaged.into())
    }
}

impl From<TransactionError> for BackupError {
    fn from(error: TransactionError) -> Self {
        Self::Table(error.into())
    }
}

impl BackupError {
    /// Whether this process can't go on: it is dying, or its locks are damaged.
    pub fn is_fatal(&self) -> bool {
        use TransactionError::{Lock, OwnerDied};
        matches!(self, Self::Table(TableError::Transaction(OwnerDied | Lock(_))))
    }

    /// What the system said when `action` was tried on `path`.
    pub(crate) fn io(path: &Path, action: &'static str, source: io::Error) -> Self {
        Self::Io { path: path.to_path_buf(), action, source }
    }
}

/// What an operator can do about it.
fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "; free some room on its disk",
        io::ErrorKind::FileTooLarge => "; raise the limit of file sizes (ulimit -f)",
        io::ErrorKind::NotFound => "; make its directory, or choose another --backup",
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "; make its directory writable for this user, or choose another --backup"
        }
        _ => "",
    }
}

/// Where the next file is written before it takes the place of the one at `path`.
pub fn next_path(path: &Path) -> PathBuf {
    with_suffix(path, ".new")
}

/// Where the torn end of the file at `path`, cut off at `position`, is kept.
pub fn torn_path(path: &Path, position: u64) -> PathBuf {
    with_suffix(path, &format!(".torn-{position}"))
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}
