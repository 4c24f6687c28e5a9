//! Creating a segment, attaching to one, and refusing what isn't ours.
//!
//! The order of creation argues its own crash cases:
//! 1. the file is made exclusively and locked; killed here: a zero-length file, which the next start replaces;
//! 2. it gets its length and its fixed memory; killed here: no magic word, replaced likewise;
//! 3. header, shards and locks are filled; killed here: the same;
//! 4. the magic word is stored; from here on it is a segment.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use super::layout::{
    EXTENT_BYTES, Header, LAYOUT_HASH, LAYOUT_VERSION, MAGIC, PAGE_BYTES, Regions, SHARDS_MAX,
};
use super::{FileIdentity, Segment, SegmentError, SegmentView};
use crate::limits::{CAPACITY_BYTES_DEFAULT, CAPACITY_BYTES_MAX, CAPACITY_BYTES_MIN};
use crate::sys::memory::{Memory, Offset, View};
use crate::sys::process::boot_id;
use crate::table::geometry::Geometry;

/// A segment that was attached or made.
pub struct Opened {
    /// The segment, locked for this process and everyone it shares the file with.
    pub segment: Segment,
    /// Whether it was made now, and so is empty.
    pub created: bool,
}

/// What a segment is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Purpose {
    /// Identity of the backup file that belongs to it.
    pub backup_id: [u64; 2],
    /// Whether it is void until the file is loaded.
    pub loading: bool,
}

impl Purpose {
    /// Of a segment that has no backup file yet.
    ///
    /// # Errors
    /// When there are no random numbers to be had.
    pub fn new() -> Result<Self, SegmentError> {
        Ok(Self { backup_id: random_words(Path::new("(memory)"))?, loading: false })
    }
}

impl Segment {
    /// Attaches to the segment at `path`, or makes it with `capacity_bytes` when there is none.
    ///
    /// # Errors
    /// Every way in which a segment can't be had: see [`SegmentError`].
    pub fn open_or_create(path: &Path, capacity_bytes: u64) -> Result<Opened, SegmentError> {
        match Self::open(path)? {
            Some(segment) => Ok(Opened { segment, created: false }),
            None => {
                Ok(Opened { segment: Self::create(path, capacity_bytes, Purpose::new()?)?, created: true })
            }
        }
    }

    /// Attaches to the segment at `path`; None when there is none that is of any worth. One that was made before the machine was
    /// last started is kept aside.
    ///
    /// # Errors
    /// Every way in which a segment can't be had: see [`SegmentError`].
    pub fn open(path: &Path) -> Result<Option<Self>, SegmentError> {
        // Each round ends unless somebody removed or made the file between two calls.
        for _ in 0..16 {
            let file = match open_file(path, OFlags::RDWR) {
                Err(SegmentError::Missing { .. }) => return Ok(None),
                file => file?,
            };
            lock_exclusively(path, &file)?;
            if !is_named(path, &file)? {
                continue;
            }
            if is_unfinished(path, &file)? {
                log::warn!("{} was never finished by an earlier start; making it anew", path.display());
                unlink(path)?;
                return Ok(None);
            }
            return match Self::attach(path, file) {
                Ok(segment) if segment.header()?.loading.load() != 0 => {
                    log::warn!("{} was never loaded to its end; loading it anew", path.display());
                    unlink(path)?;
                    Ok(None)
                }
                Err(SegmentError::OtherBoot { .. }) => keep_aside(path).map(|()| None),
                attached => attached.map(Some),
            };
        }
        Err(SegmentError::InUse { path: path.to_path_buf(), pid: 0 })
    }

    /// Attaches to a segment whose file another process of this store has kept open, lock included.
    ///
    /// # Errors
    /// As [`Segment::open_or_create`].
    pub fn attach(path: &Path, file: OwnedFd) -> Result<Self, SegmentError> {
        check_file(path, &file)?;
        lock_exclusively(path, &file)?;
        let length = file_length(path, &file)?;
        let memory = Memory::map(file.as_fd(), length).map_err(|source| io_error(path, "map it", source))?;
        let regions = check_header(path, &memory, length)?;
        check_memory(path, &memory, &file)?;
        Ok(Self { memory: Arc::new(memory), regions, file: Some(Arc::new(file)) })
    }

    /// A copy of the segment at `path` in which changes stay in this process, for a verifier to recover and
    /// check. Returns whether a writer was attached too: `true` means that the contents may change meanwhile.
    ///
    /// # Errors
    /// As [`Segment::open_or_create`].
    pub fn open_private_copy(path: &Path) -> Result<(Self, bool), SegmentError> {
        let file = open_file(path, OFlags::RDWR)?;
        let served = rustix::fs::flock(file.as_fd(), FlockOperation::NonBlockingLockShared).is_err();
        let length = file_length(path, &file)?;
        let memory = Memory::map_private_copy(file.as_fd(), length)
            .map_err(|source| io_error(path, "map a copy of it", source))?;
        let regions = check_header(path, &memory, length)?;
        check_memory(path, &memory, &file)?;
        Ok((Self { memory: Arc::new(memory), regions, file: None }, served))
    }

    /// Makes the segment at `path`, where there is none.
    ///
    /// # Errors
    /// Every way in which it can't be made: see [`SegmentError`].
    pub fn create(path: &Path, capacity_bytes: u64, purpose: Purpose) -> Result<Self, SegmentError> {
        let capacity_bytes = check_capacity(path, capacity_bytes)?;
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::RDWR | OFlags::CLOEXEC;
        let file = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|error| io_error(path, "make it", error.into()))?;
        let made = Self::fill(path, file, capacity_bytes, purpose);
        if made.is_err() {
            unlink(path)?;
        }
        made
    }

    fn fill(path: &Path, file: OwnedFd, capacity_bytes: u64, purpose: Purpose) -> Result<Self, SegmentError> {
        lock_exclusively(path, &file)?;
        // The mode above was subject to the umask.
        rustix::fs::fchmod(&file, Mode::RUSR | Mode::WUSR)
            .map_err(|e| io_error(path, "protect it", e.into()))?;
        let regions = Regions::new(capacity_bytes);
        rustix::fs::ftruncate(&file, regions.length).map_err(|e| io_error(path, "size it", e.into()))?;
        let memory =
            Memory::map(file.as_fd(), regions.length).map_err(|source| io_error(path, "map it", source))?;
        let segment = Self { memory: Arc::new(memory), regions, file: Some(Arc::new(file)) };
        segment.reserve_fixed(0, regions.workers)?;
        let boot = boot_id().map_err(|source| io_error(path, "learn this machine's boot id", source))?;
        segment.format(words(boot), random_words(path)?, purpose)?;
        Ok(segment)
    }

    /// Fills the header, the shards and the locks of an empty segment; the magic word comes last.
    pub(super) fn format(
        &self,
        boot: [u64; 2],
        seed: [u64; 2],
        purpose: Purpose,
    ) -> Result<(), SegmentError> {
        let (memory, regions, header) = (&self.memory, &self.regions, self.header()?);
        memory.store(&header.layout_version, LAYOUT_VERSION);
        memory.store(&header.layout_hash, LAYOUT_HASH);
        memory.store(&header.capacity_bytes, regions.capacity_bytes);
        memory.store(&header.shard_count, regions.shard_count);
        for half in 0..2 {
            memory.store(&header.boot_id[half], boot[half]);
            memory.store(&header.hash_seed[half], seed[half]);
            memory.store(&header.backup_id[half], purpose.backup_id[half]);
        }
        memory.store(&header.loading, u64::from(purpose.loading));
        memory.store(&header.created_ns, nanoseconds_since_epoch());
        memory.store(&header.identity_checksum, identity_checksum(header));
        let mut reserved = regions.workers;
        for index in 0..regions.shard_count {
            reserved += self.format_shard(index)?;
        }
        memory.store(&header.reserved_bytes, reserved);
        self.initialize_locks()?;
        memory.store(&header.magic, MAGIC);
        Ok(())
    }

    /// Gives shard `index` its first buckets; returns the memory taken, in bytes.
    fn format_shard(&self, index: u64) -> Result<u64, SegmentError> {
        let shard = self.shard(index)?;
        let geometry = Geometry::initial(index, self.regions.shard_count);
        let bytes = super::layout::round_up(geometry.bytes(), super::layout::BUCKET_RESERVE_BYTES);
        self.reserve_fixed(self.regions.bucket_region(index), bytes)?;
        self.memory.store(&shard.geometry, geometry.word());
        self.memory.store(&shard.reserved_bytes, bytes);
        self.memory.store(&shard.next_version, 1);
        Ok(bytes)
    }

    /// Makes every lock of the segment free.
    ///
    /// Called at creation, and at attaching after every earlier owner was proven dead: whatever a dead process
    /// left in a lock's bytes, even damage, is replaced by a lock that works.
    ///
    /// # Errors
    /// [`SegmentError::Io`] when the C library can't make one.
    #[allow(unsafe_code)]
    pub fn initialize_locks(&self) -> Result<(), SegmentError> {
        let error = |source| io_error(Path::new("(memory)"), "make its locks", source);
        // SAFETY: this process alone has the segment, by the exclusive `flock` and the proof that the former
        // owner is dead, and none of its threads has taken a lock yet.
        unsafe { self.header()?.arena_lock.initialize() }.map_err(error)?;
        for index in 0..self.regions.shard_count {
            // SAFETY: as above.
            unsafe { self.shard(index)?.lock.initialize() }.map_err(error)?;
        }
        Ok(())
    }
}

impl SegmentView {
    /// Opens the segment at `path` for reading only, server or not.
    ///
    /// # Errors
    /// Every way in which it can't be had: see [`SegmentError`].
    pub fn open(path: &Path) -> Result<Self, SegmentError> {
        let file = open_file(path, OFlags::RDONLY)?;
        if is_unfinished(path, &file)? {
            return Err(SegmentError::Unfinished { path: path.to_path_buf() });
        }
        let length = file_length(path, &file)?;
        let view = View::map(file.as_fd(), length).map_err(|source| io_error(path, "map it", source))?;
        let regions = check_header(path, &view, length)?;
        check_memory(path, &view, &file)?;
        Ok(Self { view, regions, file: Some(identity_of(path, &file)?) })
    }

    /// Whether `path` names another file now, and not just none. What is mapped stays as it is, whatever its name is.
    ///
    /// # Errors
    /// When it can't be looked at.
    pub fn is_replaced(&self, path: &Path) -> Result<bool, SegmentError> {
        match rustix::fs::lstat(path) {
            Ok(named) => Ok(self.file != Some(FileIdentity::of(&named))),
            Err(Errno::NOENT) => Ok(false),
            Err(error) => Err(io_error(path, "look at it", error.into())),
        }
    }
}

fn identity_of(path: &Path, file: &OwnedFd) -> Result<FileIdentity, SegmentError> {
    let stat = rustix::fs::fstat(file).map_err(|error| io_error(path, "look at it", error.into()))?;
    Ok(FileIdentity::of(&stat))
}

/// Removes the segment at `path` if no process serves it and it is this user's. Who has it mapped learns that it is void.
///
/// Killed between the two steps, it leaves a segment that was never finished, as far as anybody can tell: the next start makes it
/// anew, as it would after the second.
///
/// # Errors
/// [`SegmentError::InUse`] when a server is attached, [`SegmentError::Missing`] when there is none.
pub fn remove(path: &Path) -> Result<(), SegmentError> {
    let file = rustix::fs::open(path, OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| open_error(path, error))?;
    lock_exclusively(path, &file)?;
    retire(path, &file)?;
    unlink(path)
}

/// Takes the magic word out of a segment, where local readers look at every read. What is none is not written into.
fn retire(path: &Path, file: &OwnedFd) -> Result<(), SegmentError> {
    if check_file(path, file).is_err() || magic_of(path, file)? != Some(MAGIC) {
        return Ok(());
    }
    match rustix::io::pwrite(file, &0u64.to_le_bytes(), 0) {
        Ok(8) => Ok(()),
        Ok(_) => Err(io_error(path, "mark it as void", io::ErrorKind::WriteZero.into())),
        Err(error) => Err(io_error(path, "mark it as void", error.into())),
    }
}

fn io_error(path: &Path, action: &'static str, source: io::Error) -> SegmentError {
    SegmentError::Io { path: path.to_path_buf(), action, source }
}

fn foreign(path: &Path, what: impl Into<String>) -> SegmentError {
    SegmentError::Foreign { path: path.to_path_buf(), what: what.into() }
}

fn open_error(path: &Path, error: Errno) -> SegmentError {
    match error {
        Errno::NOENT => SegmentError::Missing { path: path.to_path_buf() },
        Errno::LOOP => foreign(path, "it is a symbolic link"),
        error => io_error(path, "open it", error.into()),
    }
}

fn open_file(path: &Path, access: OFlags) -> Result<OwnedFd, SegmentError> {
    let file = rustix::fs::open(path, access | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| open_error(path, error))?;
    check_file(path, &file)?;
    Ok(file)
}

/// Owner, kind, mode and link count must be what creation made them.
fn check_file(path: &Path, file: &OwnedFd) -> Result<(), SegmentError> {
    let stat = rustix::fs::fstat(file).map_err(|error| io_error(path, "look at it", error.into()))?;
    let user = rustix::process::geteuid().as_raw();
    if !rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file() {
        return Err(foreign(path, "it is not a plain file"));
    }
    if stat.st_uid != user {
        return Err(foreign(path, format!("it belongs to user {}, not to user {user}", stat.st_uid)));
    }
    if stat.st_mode & 0o7777 != 0o600 {
        return Err(foreign(path, format!("its mode is {:04o}, not 0600", stat.st_mode & 0o7777)));
    }
    if stat.st_nlink > 1 {
        return Err(foreign(path, format!("it has {} hard links, so it has other names too", stat.st_nlink)));
    }
    Ok(())
}

fn file_length(path: &Path, file: &OwnedFd) -> Result<u64, SegmentError> {
    let stat = rustix::fs::fstat(file).map_err(|error| io_error(path, "look at it", error.into()))?;
    match u64::try_from(stat.st_size) {
        Ok(length) if length >= PAGE_BYTES => Ok(length),
        _ => Err(foreign(path, format!("it is only {} bytes long", stat.st_size))),
    }
}

fn lock_exclusively(path: &Path, file: &OwnedFd) -> Result<(), SegmentError> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => {
            Err(SegmentError::InUse { path: path.to_path_buf(), pid: served_by(file.as_fd()) })
        }
        Err(error) => Err(io_error(path, "lock it", error.into())),
    }
}

/// Where a segment at `path` that can't be trusted is kept aside; no instance can have this name.
pub fn kept_aside_path(path: &Path) -> PathBuf {
    let mut kept = path.as_os_str().to_owned();
    kept.push("~");
    kept.into()
}

/// Gives a segment of no further use another name, under which the user may still look at it.
fn keep_aside(path: &Path) -> Result<(), SegmentError> {
    let kept = kept_aside_path(path);
    rustix::fs::rename(path, &kept).map_err(|error| io_error(path, "keep it aside", error.into()))?;
    log::warn!(
        "{} was made before this machine was last started, so it can't be trusted; it is kept as {}",
        path.display(),
        kept.display()
    );
    Ok(())
}

/// Pid of the data server that the header names; 0 when there is none to be found.
fn served_by(file: BorrowedFd<'_>) -> u64 {
    let mut bytes = [0u8; 8];
    let at = std::mem::offset_of!(Header, data_process) as u64;
    match rustix::io::pread(file, &mut bytes, at) {
        Ok(8) => u64::from_le_bytes(bytes),
        _ => 0,
    }
}

/// Whether `path` still names this very file: it may have been removed before we got the lock.
fn is_named(path: &Path, file: &OwnedFd) -> Result<bool, SegmentError> {
    let ours = rustix::fs::fstat(file).map_err(|error| io_error(path, "look at it", error.into()))?;
    match rustix::fs::lstat(path) {
        Ok(named) => Ok(named.st_ino == ours.st_ino && named.st_dev == ours.st_dev),
        Err(Errno::NOENT) => Ok(false),
        Err(error) => Err(io_error(path, "look at it", error.into())),
    }
}

/// Whether creation was cut short: nothing in the file, or no magic word yet.
fn is_unfinished(path: &Path, file: &OwnedFd) -> Result<bool, SegmentError> {
    let stat = rustix::fs::fstat(file).map_err(|error| io_error(path, "look at it", error.into()))?;
    Ok(stat.st_size == 0 || magic_of(path, file)? == Some(0))
}

/// The file's first eight bytes, if it has so many.
fn magic_of(path: &Path, file: &OwnedFd) -> Result<Option<u64>, SegmentError> {
    let mut magic = [0u8; 8];
    let count = rustix::io::pread(file, &mut magic, 0).map_err(|e| io_error(path, "read it", e.into()))?;
    Ok((count == magic.len()).then(|| u64::from_le_bytes(magic)))
}

fn unlink(path: &Path) -> Result<(), SegmentError> {
    match rustix::fs::unlink(path) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(io_error(path, "remove it", error.into())),
    }
}

/// Holds the header against everything this binary knows; gives the regions on success.
fn check_header(path: &Path, view: &View, length: u64) -> Result<Regions, SegmentError> {
    let header: &Header = view.object(Offset::new(0))?;
    if header.magic.load() != MAGIC {
        return Err(foreign(path, "it does not begin with the mark of a kvs segment"));
    }
    let version = header.layout_version.load();
    if version != LAYOUT_VERSION {
        return Err(SegmentError::Layout { path: path.to_path_buf(), found: version.to_string() });
    }
    if header.layout_hash.load() != LAYOUT_HASH {
        let found = format!("{version} of another build (other constants, C library or processor)");
        return Err(SegmentError::Layout { path: path.to_path_buf(), found });
    }
    if header.identity_checksum.load() != identity_checksum(header) {
        return Err(foreign(path, "the checksum of its header does not fit"));
    }
    let capacity = header.capacity_bytes.load();
    if !(CAPACITY_BYTES_MIN..=CAPACITY_BYTES_MAX).contains(&capacity) {
        return Err(foreign(path, format!("its capacity of {capacity} bytes is out of range")));
    }
    let regions = Regions::new(capacity);
    debug_assert!(regions.shard_count <= SHARDS_MAX);
    if regions.length != length || regions.shard_count != header.shard_count.load() {
        return Err(foreign(path, format!("its length of {length} bytes does not fit its capacity")));
    }
    check_counts(path, header, &regions)?;
    let boot = boot_id().map_err(|source| io_error(path, "learn this machine's boot id", source))?;
    if words(boot) != [header.boot_id[0].load(), header.boot_id[1].load()] {
        return Err(SegmentError::OtherBoot { path: path.to_path_buf() });
    }
    Ok(regions)
}

/// Holds what the header says was reserved against what there can be: behind the last slot of a kind is something else, which
/// must not be taken for one.
fn check_counts(path: &Path, header: &Header, regions: &Regions) -> Result<(), SegmentError> {
    let counts = [
        ("worker slots", &header.worker_slots_reserved, crate::limits::WORKERS_MAX as u64),
        (
            "connection slots",
            &header.connection_slots_reserved,
            u64::from(crate::limits::CONNECTIONS_MAX_LIMIT),
        ),
        ("backup rings", &header.backup_rings_reserved, crate::limits::WORKERS_MAX as u64),
        ("sessions", &header.sessions_reserved, crate::limits::SESSIONS_MAX),
        ("extents", &header.extents_reserved, regions.extent_count),
    ];
    for (what, count, most) in counts {
        let count = count.load();
        if count > most {
            return Err(foreign(path, format!("its header says {count} {what}, there can be {most}")));
        }
    }
    Ok(())
}

/// Holds the memory that the header says was reserved against what the file has: touching more than that could be a
/// signal.
fn check_memory(path: &Path, view: &View, file: &OwnedFd) -> Result<(), SegmentError> {
    let header: &Header = view.object(Offset::new(0))?;
    // Reserving comes before it is noted, so what is noted is looked at first.
    let noted = super::memory_bytes(header);
    let stat = rustix::fs::fstat(file).map_err(|error| io_error(path, "look at it", error.into()))?;
    let there = u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512);
    if noted > there {
        return Err(foreign(path, format!("its header says {noted} bytes of memory, it has {there}")));
    }
    Ok(())
}

/// CRC32C over the header's unchanging fields.
fn identity_checksum(header: &Header) -> u64 {
    let fields = [
        &header.layout_version,
        &header.layout_hash,
        &header.capacity_bytes,
        &header.shard_count,
        &header.boot_id[0],
        &header.boot_id[1],
        &header.backup_id[0],
        &header.backup_id[1],
        &header.hash_seed[0],
        &header.hash_seed[1],
    ];
    let sum = fields.iter().fold(0, |sum, field| crc32c::crc32c_append(sum, &field.load().to_le_bytes()));
    u64::from(sum)
}

/// Rounds the capacity down to whole extents and holds it against the limits and the machine.
fn check_capacity(path: &Path, wanted: u64) -> Result<u64, SegmentError> {
    let refuse = |why: String| Err(SegmentError::Capacity { wanted, why });
    if !(CAPACITY_BYTES_MIN..=CAPACITY_BYTES_MAX).contains(&wanted) {
        return refuse(format!(
            "is out of range: choose between {CAPACITY_BYTES_MIN} and {CAPACITY_BYTES_MAX}"
        ));
    }
    let most = memory_of_machine(path)?;
    if wanted > most {
        let shown = directory_of(path);
        return refuse(format!(
            "is more than this machine has: {} holds at most {most} bytes; choose a smaller --capacity",
            shown.display()
        ));
    }
    Ok(wanted / EXTENT_BYTES * EXTENT_BYTES)
}

/// The capacity of a segment at `path` for which none was asked: [`CAPACITY_BYTES_DEFAULT`], or what this machine has where
/// that is less.
pub fn default_capacity(path: &Path) -> u64 {
    // Where the machine can't be asked, making the segment tells why.
    let most = memory_of_machine(path).unwrap_or(CAPACITY_BYTES_DEFAULT);
    CAPACITY_BYTES_DEFAULT.min(most / EXTENT_BYTES * EXTENT_BYTES)
}

fn directory_of(path: &Path) -> PathBuf {
    path.parent().map_or_else(|| PathBuf::from("/dev/shm"), Path::to_path_buf)
}

/// Most bytes that a segment at `path` could have if nothing else had any.
fn memory_of_machine(path: &Path) -> Result<u64, SegmentError> {
    let system = rustix::fs::statvfs(directory_of(path))
        .map_err(|error| io_error(path, "look at its file system", error.into()))?;
    let room = system.f_blocks.saturating_mul(system.f_frsize);
    let memory = rustix::system::sysinfo();
    let machine = (memory.totalram as u64).saturating_mul(u64::from(memory.mem_unit.max(1)));
    // A tmpfs without a size limit reports none.
    Ok(if room == 0 { machine } else { machine.min(room) })
}

fn random_words(path: &Path) -> Result<[u64; 2], SegmentError> {
    let mut bytes = [0u8; 16];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| io_error(path, "get random numbers for it", error.into()))?;
    Ok(words(bytes))
}

fn words(bytes: [u8; 16]) -> [u64; 2] {
    let (low, high) = bytes.split_at(8);
    let word = |half: &[u8]| half.iter().rev().fold(0u64, |sum, &byte| sum << 8 | u64::from(byte));
    [word(low), word(high)]
}

/// Now.
pub(crate) fn nanoseconds_since_epoch() -> u64 {
    let elapsed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(all(test, not(miri)))]
mod tests {
    use super::*;

    #[test]
    fn default_capacity_is_one_that_a_segment_may_have() {
        let capacity = default_capacity(Path::new("/dev/shm/kvs-none"));
        assert!(capacity <= CAPACITY_BYTES_DEFAULT && capacity.is_multiple_of(EXTENT_BYTES), "{capacity}");
        assert_eq!(check_capacity(Path::new("/dev/shm/kvs-none"), capacity).ok(), Some(capacity));
    }
}
