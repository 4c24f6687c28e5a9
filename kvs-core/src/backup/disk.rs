//! What a backup file needs of a disk, so that tests can put a disk in its place that records, fills up, fails or loses power.
//!
//! | operation | what holds once it has returned |
//! |---|---|
//! | `write_at` | the bytes survive the death of every process, not a power cut |
//! | `sync` | the file's bytes and length survive a power cut |
//! | `rename`, `remove`, `create` | the name does so only after `sync_directory` |
//!
//! No lock: a file has one writer, which holds its `flock`.

use std::io;
use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{Advice, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

/// Where files are.
pub trait Disk: Send + Sync {
    /// Opens the file at `path` for reading and writing; None when there is none.
    ///
    /// # Errors
    /// What the system says; `InvalidInput` when it is no plain file.
    fn open(&self, path: &Path) -> io::Result<Option<Box<dyn DiskFile>>>;

    /// Makes an empty file of this user alone at `path`, in the place of one that is there.
    ///
    /// # Errors
    /// What the system says.
    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>>;

    /// Gives the file at `from` the name `to`, in the place of one that is there.
    ///
    /// # Errors
    /// What the system says.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Takes the file's name away; none there is no error.
    ///
    /// # Errors
    /// What the system says.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Makes the names in the directory of `path` survive a power cut.
    ///
    /// # Errors
    /// What the system says.
    fn sync_directory(&self, path: &Path) -> io::Result<()>;

    /// What tells the file at `path` from all others; None when there is none.
    ///
    /// # Errors
    /// What the system says.
    fn identity(&self, path: &Path) -> io::Result<Option<FileIdentity>>;
}

/// Device and inode.
pub type FileIdentity = (u64, u64);

/// An open file.
pub trait DiskFile: Send + Sync {
    /// Keeps all others from locking it for as long as it is open; false when somebody has it locked.
    ///
    /// # Errors
    /// What the system says.
    fn lock(&self) -> io::Result<bool>;

    /// What tells it from all others.
    ///
    /// # Errors
    /// What the system says.
    fn identity(&self) -> io::Result<FileIdentity>;

    /// Its length, in bytes.
    ///
    /// # Errors
    /// What the system says.
    fn length(&self) -> io::Result<u64>;

    /// Reads up to `target.len()` bytes from `position` on; fewer only at its end.
    ///
    /// # Errors
    /// What the system says.
    fn read_at(&self, target: &mut [u8], position: u64) -> io::Result<usize>;

    /// Writes all of `source` at `position`.
    ///
    /// # Errors
    /// What the system says; some of it may be written then.
    fn write_at(&self, source: &[u8], position: u64) -> io::Result<()>;

    /// Cuts it, or fills it up with zeros.
    ///
    /// # Errors
    /// What the system says.
    fn set_length(&self, length: u64) -> io::Result<()>;

    /// Makes its bytes and its length survive a power cut.
    ///
    /// # Errors
    /// What the system says. What was written may be gone then, even if a second try succeeds.
    fn sync(&self) -> io::Result<()>;
}

/// The machine's disks.
pub struct SystemDisk;

impl SystemDisk {
    /// Opens the file at `path` for reading alone.
    ///
    /// # Errors
    /// What the system says; `InvalidInput` when it is no plain file.
    pub fn open_to_read(&self, path: &Path) -> io::Result<Option<Box<dyn DiskFile>>> {
        open_plain(path, OFlags::RDONLY)
    }
}

fn open_plain(path: &Path, access: OFlags) -> io::Result<Option<Box<dyn DiskFile>>> {
    // A name pipe, say, would make a plain open wait.
    let flags = access | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(file) => file,
        Err(Errno::NOENT) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let stat = rustix::fs::fstat(&file)?;
    if !rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a plain file"));
    }
    Ok(Some(Box::new(SystemFile(file))))
}

impl Disk for SystemDisk {
    fn open(&self, path: &Path) -> io::Result<Option<Box<dyn DiskFile>>> {
        open_plain(path, OFlags::RDWR)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        self.remove(path)?;
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::RDWR | OFlags::CLOEXEC;
        Ok(Box::new(SystemFile(rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)?)))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        Ok(rustix::fs::rename(from, to)?)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        match rustix::fs::unlink(path) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn sync_directory(&self, path: &Path) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(directory_of(path), flags, Mode::empty())?;
        Ok(rustix::fs::fsync(&directory)?)
    }

    fn identity(&self, path: &Path) -> io::Result<Option<FileIdentity>> {
        match rustix::fs::stat(path) {
            Ok(stat) => Ok(Some((stat.st_dev, stat.st_ino))),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// The directory that `path` is in.
pub fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// So much is written before the kernel is told that it won't be read.
const UNCACHED_BYTES: u64 = 4 << 20;
/// It is told so of the last so many bytes: what isn't on the disk yet stays in its cache until it is told again.
const CACHED_BYTES_MAX: u64 = 64 << 20;

struct SystemFile(OwnedFd);

impl SystemFile {
    /// Has the kernel write what ends in a multiple of [`UNCACHED_BYTES`] between two positions, and forget what it has written: the
    /// cache that a file of gigabytes would take is worth more to others, and memory that was used just now is faster.
    fn uncache(&self, from: u64, to: u64) {
        let end = to / UNCACHED_BYTES * UNCACHED_BYTES;
        if end > from {
            let start = end.saturating_sub(CACHED_BYTES_MAX);
            // It is advice: a file system that doesn't take it serves as well.
            let _ = rustix::fs::fadvise(&self.0, start, NonZeroU64::new(end - start), Advice::DontNeed);
        }
    }
}

impl DiskFile for SystemFile {
    fn lock(&self) -> io::Result<bool> {
        match rustix::fs::flock(&self.0, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(Errno::WOULDBLOCK) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn identity(&self) -> io::Result<FileIdentity> {
        let stat = rustix::fs::fstat(&self.0)?;
        Ok((stat.st_dev, stat.st_ino))
    }

    fn length(&self) -> io::Result<u64> {
        Ok(u64::try_from(rustix::fs::fstat(&self.0)?.st_size).unwrap_or(0))
    }

    fn read_at(&self, target: &mut [u8], position: u64) -> io::Result<usize> {
        let mut done = 0;
        while done < target.len() {
            match rustix::io::pread(&self.0, &mut target[done..], position + done as u64) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(done)
    }

    fn write_at(&self, source: &[u8], position: u64) -> io::Result<()> {
        let mut done = 0;
        while done < source.len() {
            match rustix::io::pwrite(&self.0, &source[done..], position + done as u64) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.uncache(position, position + source.len() as u64);
        Ok(())
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        Ok(rustix::fs::ftruncate(&self.0, length)?)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::fdatasync(&self.0)?)
    }
}
