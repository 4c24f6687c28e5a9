//! A unix socket with its file.
//!
//! Invariants
//! - A file is only replaced when it is a socket of this user on which nobody answers: what a killed server left.
//! - A file is only removed while it is the one this store made, told by its inode and the time it was made.
//! - The file has mode 0600 from its first moment: the mode is the socket's own before it gets its name.
//!
//! Lock: the directory's `flock`, from looking at the file to listening on the new one, so that two servers that start at
//! the same time don't take each other's file for a stale one. A crash leaves a stale file at most.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use kvs_core::control::SocketFileMark;
use kvs_core::sys::process::ProcessIdentity;
use rustix::fs::{FileType, FlockOperation, Mode, OFlags, Stat};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Longest path of a unix socket, in bytes, its final zero left out.
const PATH_BYTES_MAX: usize = 107;
/// Connections the kernel keeps until they are accepted.
const BACKLOG: i32 = 4096;
/// How long another server may take from looking at a file to listening on its own.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
const LOCK_PAUSE: Duration = Duration::from_millis(2);
/// How long a server that was killed may keep its socket until the kernel has taken it apart.
const DYING_PATIENCE: Duration = Duration::from_secs(3);
const DYING_PAUSE: Duration = Duration::from_millis(5);

/// A socket's file. It stays when this is dropped: the socket may outlive the process.
#[derive(Debug, Clone)]
pub struct SocketFile {
    path: PathBuf,
    identity: Identity,
}

/// Device and inode; time of making, in seconds and nanoseconds: an inode's number alone is soon used again.
type Identity = ((u64, u64), (i64, i64));

fn identity(stat: &Stat) -> Identity {
    ((stat.st_dev, stat.st_ino), (stat.st_mtime, stat.st_mtime_nsec as i64))
}

impl SocketFile {
    /// Makes a listening socket at `path`, and returns it with its file.
    ///
    /// # Errors
    /// Why that place can't be had, and what to do.
    pub fn listen(path: &Path) -> anyhow::Result<(UnixListener, Self)> {
        check_length(path)?;
        let until = Instant::now() + DYING_PATIENCE;
        let _turn = loop {
            let turn = lock_directory(path)?;
            match remove_stale(path)? {
                Place::Free => break turn,
                Place::Dying if Instant::now() < until => {}
                Place::Dying | Place::Taken => bail!(
                    "another server answers on the socket {}; end it first, or choose another --name or --unix",
                    path.display()
                ),
            }
            drop(turn);
            thread::sleep(DYING_PAUSE);
        };
        let socket = open_socket(path)
            .with_context(|| format!("can't make the socket {}; choose another --unix", path.display()))?;
        let stat = rustix::fs::lstat(path).with_context(|| format!("can't look at {}", path.display()))?;
        let file = Self { path: path.to_path_buf(), identity: identity(&stat) };
        Ok((UnixListener::from(socket), file))
    }

    /// The file at `path` of a socket that listens there already; None when it doesn't, or the file is gone.
    pub fn found(socket: &UnixListener, path: &Path) -> Option<Self> {
        let address = socket.local_addr().ok()?;
        let stat = rustix::fs::lstat(path).ok()?;
        let is_there = address.as_pathname() == Some(path)
            && FileType::from_raw_mode(stat.st_mode) == FileType::Socket
            && UnixStream::connect(path).is_ok();
        is_there.then(|| Self { path: path.to_path_buf(), identity: identity(&stat) })
    }

    /// One that another process made.
    pub fn of(mark: SocketFileMark) -> Self {
        Self { path: OsString::from_vec(mark.path).into(), identity: (mark.place, mark.made) }
    }

    /// For another process.
    pub fn mark(&self) -> SocketFileMark {
        let (place, made) = self.identity;
        SocketFileMark { path: self.path.as_os_str().as_bytes().to_vec(), place, made }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes it; one that is gone, or has become another's, is none of ours.
    pub fn remove(&self) {
        let removed = match rustix::fs::lstat(&self.path) {
            Ok(stat) if identity(&stat) == self.identity => rustix::fs::unlink(&self.path),
            // Somebody has put another one there: it is theirs.
            Ok(_) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = removed {
            log::warn!("can't remove {}: {error}", self.path.display());
        }
    }
}

fn check_length(path: &Path) -> anyhow::Result<()> {
    let length = path.as_os_str().len();
    if length > PATH_BYTES_MAX {
        bail!(
            "the socket path {} has {length} bytes, {PATH_BYTES_MAX} are possible; choose a shorter --unix",
            path.display()
        );
    }
    Ok(())
}

/// Keeps other servers from looking at this directory's sockets until the returned descriptor is closed.
fn lock_directory(path: &Path) -> anyhow::Result<OwnedFd> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = rustix::fs::open(directory, flags, Mode::empty()).with_context(|| {
        format!("can't open the directory {} for the socket; choose another --unix", directory.display())
    })?;
    let until = Instant::now() + LOCK_PATIENCE;
    loop {
        match rustix::fs::flock(&opened, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(opened),
            Err(Errno::WOULDBLOCK) if Instant::now() < until => thread::sleep(LOCK_PAUSE),
            Err(Errno::WOULDBLOCK) => bail!(
                "another process keeps the directory {} locked; end it, or choose another --unix",
                directory.display()
            ),
            // A file system without locks: two servers that start at the same instant are not told apart there.
            Err(_) => return Ok(opened),
        }
    }
}

/// Whether a socket may be made at a place.
#[derive(PartialEq, Eq)]
enum Place {
    Free,
    /// A living server answers there.
    Taken,
    /// The server that made the socket there is dead, and still somebody has it: one that was killed with it and is being taken
    /// apart, which takes 20 ms for each GiB of memory, or its successor.
    Dying,
}

fn remove_stale(path: &Path) -> anyhow::Result<Place> {
    let shown = path.display();
    let stat = match rustix::fs::lstat(path) {
        Ok(stat) => stat,
        Err(Errno::NOENT) => return Ok(Place::Free),
        Err(error) => bail!("can't look at {shown}: {error}; choose another --unix"),
    };
    if !FileType::from_raw_mode(stat.st_mode).is_socket() {
        bail!("{shown} is there already and is no socket; remove it, or choose another --unix");
    }
    if stat.st_uid != rustix::process::geteuid().as_raw() {
        bail!("the socket {shown} belongs to user {}; choose another --unix", stat.st_uid);
    }
    match knock(path) {
        Err(Errno::CONNREFUSED) => {}
        Err(Errno::NOENT) => return Ok(Place::Free),
        Ok(false) => return Ok(Place::Dying),
        // A full queue is somebody's, too.
        Ok(true) | Err(Errno::AGAIN) => return Ok(Place::Taken),
        Err(error) => bail!("can't tell who uses the socket {shown}: {error}; choose another --unix"),
    }
    rustix::fs::unlink(path).with_context(|| format!("can't replace the stale socket {shown}"))?;
    Ok(Place::Free)
}

/// Connects without waiting; tells whether the process lives that made the socket which answers.
fn knock(path: &Path) -> Result<bool, Errno> {
    let socket = new_socket()?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    let maker = rustix::net::sockopt::socket_peercred(&socket)?.pid.as_raw_nonzero().get();
    let maker = ProcessIdentity::of(maker.unsigned_abs());
    Ok(maker.is_ok_and(|maker| maker.is_alive()))
}

fn new_socket() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

fn open_socket(path: &Path) -> Result<OwnedFd, Errno> {
    let socket = new_socket()?;
    // The file gets the mode of the socket, less the umask.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    //! Goal: no file that somebody needs is ever touched. Method: files of every kind at the wanted place.

    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn place() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("sock");
        (directory, path)
    }

    fn refusal(path: &Path) -> String {
        format!("{:#}", SocketFile::listen(path).expect_err("refused"))
    }

    #[test]
    fn socket_file_is_private_and_stays_until_it_is_removed() {
        let (_directory, path) = place();
        let (_listener, file) = SocketFile::listen(&path).expect("a socket");
        let mode = std::fs::metadata(&path).expect("made").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        UnixStream::connect(&path).expect("it listens");
        let of_another_process = SocketFile::of(file.mark());
        drop(file);
        assert!(path.exists());
        of_another_process.remove();
        assert!(!path.exists());
    }

    #[test]
    fn socket_file_somebody_answers_on_is_left_alone() {
        let (directory, path) = place();
        let (listener, file) = SocketFile::listen(&path).expect("a socket");
        assert!(refusal(&path).contains("another server"));
        // A second name keeps its inode from being the next file's.
        std::fs::hard_link(&path, directory.path().join("kept")).expect("linked");
        UnixStream::connect(&path).expect("still there");
        drop(listener);
        let (_second_listener, _second) = SocketFile::listen(&path).expect("nobody answers there");
        file.remove();
        assert!(path.exists(), "it is the second one's now");
    }

    #[test]
    fn socket_file_left_by_a_dead_server_is_replaced() {
        let (_directory, path) = place();
        drop(SocketFile::listen(&path).expect("a socket"));
        let (_listener, _file) = SocketFile::listen(&path).expect("nobody answers there");
        UnixStream::connect(&path).expect("it listens");
    }

    #[test]
    fn socket_file_place_with_something_else_is_refused() {
        let (directory, path) = place();
        std::fs::write(&path, "precious").expect("written");
        assert!(refusal(&path).contains("no socket"));
        assert_eq!(std::fs::read(&path).expect("still there"), b"precious");
        std::fs::remove_file(&path).expect("removed");
        std::os::unix::fs::symlink("/nowhere", &path).expect("a link");
        assert!(refusal(&path).contains("no socket"));
        assert!(refusal(&directory.path().join("missing/sock")).contains("directory"));
        assert!(refusal(&directory.path().join("x".repeat(108))).contains("107"));
    }
}
