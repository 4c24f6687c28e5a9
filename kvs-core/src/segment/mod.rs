//! The segment: one named piece of shared memory that holds everything which must outlive a process.
//!
//! Invariants
//! - It is created with `O_EXCL | O_NOFOLLOW` and mode 0600, and gets its magic word last: a segment without it
//!   was never finished and holds nothing, so it is made anew.
//! - Whoever writes holds an exclusive `flock` on the file. The lock belongs to the open file description, which
//!   front and data server share, so it outlives either of them and no second store can slip in between.
//! - Memory is reserved with `fallocate` before it is touched: a full `/dev/shm` is an error, never a signal.
//! - A segment that does not match in every point is refused with a reason, never guessed at.
//!
//! A crash while creating leaves a segment without its magic word; a crash while reserving leaves memory that is
//! reserved again, which changes nothing.

pub mod layout;
mod open;
mod pages;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::FallocateFlags;

use crate::limits::SESSIONS_MAX;
use crate::sys::memory::{Damaged, Memory, Offset, View, Word};
use crate::table::hash::HashSeed;
use layout::{
    ConnectionSlot, Header, LAYOUT_VERSION, Regions, SessionHead, SessionWindow, Shard, WorkerSlot,
};

pub(crate) use open::nanoseconds_since_epoch;
pub use open::{Opened, Purpose, default_capacity, kept_aside_path, remove};

/// Why a segment can't be opened, made or enlarged.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SegmentError {
    /// There is none of that name.
    #[error("no segment {}: is an instance of that name running on this machine?", path.display())]
    Missing {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// It is being made or removed.
    #[error("segment {} is not finished: it is being made or removed; if no instance starts, the next one makes it anew", path.display())]
    Unfinished {
        /// The segment.
        path: PathBuf,
    },
    /// Another process holds the lock.
    #[error("segment {} is in use by {}; end that instance first or choose another --name", path.display(), holder(*pid))]
    InUse {
        /// The segment.
        path: PathBuf,
        /// Data server that serves it, 0 when unknown.
        pid: u64,
    },
    /// The file isn't what this store would have made.
    #[error("segment {} is refused: {what}; if it is not yours to keep, `kvs-tools purge` removes it", path.display())]
    Foreign {
        /// The segment.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// Made before the machine was last started.
    #[error("segment {} was made before this machine was last started; starting the instance loads its backup file", path.display())]
    OtherBoot {
        /// The segment.
        path: PathBuf,
    },
    /// Made by another version of the store.
    #[error(
        "segment {} has layout {found}, this binary knows layout {LAYOUT_VERSION}: start the version that made it, \
         export the data with `kvs-tools export`, then `kvs-tools purge` and import", path.display()
    )]
    Layout {
        /// The segment.
        path: PathBuf,
        /// Its version, with a mark when only the constants differ.
        found: String,
    },
    /// The capacity asked for can't be had.
    #[error("capacity {wanted} bytes {why}")]
    Capacity {
        /// In bytes.
        wanted: u64,
        /// What is in the way, and what to do.
        why: String,
    },
    /// The kernel said no.
    #[error("segment {}: can't {action}: {source}", path.display())]
    Io {
        /// The segment.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// Something inside can't be.
    #[error(transparent)]
    Damaged(#[from] Damaged),
}

fn holder(pid: u64) -> String {
    if pid == 0 { "another process".into() } else { format!("the data server with pid {pid}") }
}

/// There is no more memory to be had: the capacity is reached, or `/dev/shm` is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no memory left: the capacity is reached or /dev/shm is full")]
pub struct OutOfMemory;

/// A segment that this process may change.
#[derive(Clone)]
pub struct Segment {
    memory: Arc<Memory>,
    regions: Regions,
    /// None for the heap memory of model tests.
    file: Option<Arc<OwnedFd>>,
}

impl Segment {
    /// A segment in this process's own memory, for model tests; nothing is reserved from the kernel.
    ///
    /// # Errors
    /// As [`Segment::format`].
    pub fn on_heap(capacity_bytes: u64) -> Result<Self, SegmentError> {
        let regions = Regions::new(capacity_bytes);
        let segment = Self { memory: Arc::new(Memory::heap(regions.length)), regions, file: None };
        segment.format([1, 2], [3, 4], Purpose { backup_id: [0, 0], loading: false })?;
        Ok(segment)
    }

    /// The memory.
    #[inline(always)]
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Where everything lies.
    #[inline(always)]
    pub fn regions(&self) -> &Regions {
        &self.regions
    }

    /// The open file, whose lock says who may write; none for model tests.
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(|file| file.as_fd())
    }

    /// The header.
    ///
    /// # Errors
    /// [`Damaged`] never on a mapped segment; the mapping is at least this long.
    #[inline]
    pub fn header(&self) -> Result<&Header, Damaged> {
        self.memory.object(Offset::new(0))
    }

    /// Shard `index`.
    ///
    /// # Errors
    /// [`Damaged`] when there is no such shard.
    #[inline]
    pub fn shard(&self, index: u64) -> Result<&Shard, Damaged> {
        self.memory.object(self.regions.shard(index))
    }

    /// Takes memory for `length` bytes from `offset`, both multiples of the page, from the kernel.
    ///
    /// # Errors
    /// [`OutOfMemory`] when `/dev/shm` has no room, which is also what any other refusal amounts to.
    pub fn reserve(&self, offset: u64, length: u64) -> Result<(), OutOfMemory> {
        let Some(file) = &self.file else { return Ok(()) };
        loop {
            match rustix::fs::fallocate(file.as_fd(), FallocateFlags::empty(), offset, length) {
                Ok(()) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    log::debug!("reserving {length} bytes at {offset:#x} of the segment: {error}");
                    return Err(OutOfMemory);
                }
            }
        }
    }

    /// Worker slot `index`, with memory under it and all before. Called by one thread only.
    ///
    /// # Errors
    /// [`SegmentError::Capacity`] when `/dev/shm` is full.
    pub fn claim_worker(&self, index: u64) -> Result<Offset<WorkerSlot>, SegmentError> {
        let header = self.header()?;
        let reserved = header.worker_slots_reserved.load();
        if index >= reserved {
            let from = self.regions.worker(reserved).bytes();
            self.reserve_fixed(from, self.regions.worker(index + 1).bytes() - from)?;
            self.memory.store(&header.worker_slots_reserved, index + 1);
        }
        Ok(self.regions.worker(index))
    }

    /// Backup ring of worker `index`, with memory under it and all before: where it begins. Called by one thread only.
    ///
    /// # Errors
    /// [`SegmentError::Capacity`] when `/dev/shm` is full.
    pub fn claim_ring(&self, index: u64) -> Result<u64, SegmentError> {
        let header = self.header()?;
        let reserved = header.backup_rings_reserved.load();
        if index >= reserved {
            let from = self.regions.ring(reserved);
            self.reserve_fixed(from, self.regions.ring(index + 1) - from)?;
            self.memory.store(&header.backup_rings_reserved, index + 1);
        }
        Ok(self.regions.ring(index))
    }

    /// Memory taken from the kernel so far, in bytes.
    pub fn memory_bytes(&self) -> u64 {
        self.header().map_or(0, memory_bytes)
    }

    /// Connection slot `index`, with memory under it. Called by one thread only.
    ///
    /// # Errors
    /// [`OutOfMemory`] when `/dev/shm` is full.
    pub fn claim_connection(&self, index: u64) -> Result<Offset<ConnectionSlot>, OutOfMemory> {
        const SLOTS_PER_PAGE: u64 = layout::PAGE_BYTES / size_of::<ConnectionSlot>() as u64;
        let header = self.header().map_err(|_| OutOfMemory)?;
        let reserved = header.connection_slots_reserved.load();
        if index >= reserved {
            let wanted = layout::round_up(index + 1, SLOTS_PER_PAGE);
            let from = self.regions.connection(reserved).bytes();
            self.reserve(from, self.regions.connection(wanted).bytes() - from)?;
            self.memory.store(&header.connection_slots_reserved, wanted);
        }
        Ok(self.regions.connection(index))
    }

    /// Memory under one more session record: its index. Called by one thread at a time.
    ///
    /// # Errors
    /// [`OutOfMemory`] when there are as many as there can be, or `/dev/shm` is full.
    pub fn claim_session(&self) -> Result<u64, OutOfMemory> {
        let header = self.header().map_err(|_| OutOfMemory)?;
        let index = header.sessions_reserved.load();
        if index >= SESSIONS_MAX {
            return Err(OutOfMemory);
        }
        let head = self.regions.session_head(index).bytes() & !(layout::PAGE_BYTES - 1);
        self.reserve(head, layout::PAGE_BYTES)?;
        self.reserve(self.regions.session_window(index).bytes(), size_of::<SessionWindow>() as u64)?;
        self.memory.store(&header.sessions_reserved, index + 1);
        Ok(index)
    }

    /// Takes memory under `length` bytes at any `offset`, rounding to whole pages.
    fn reserve_fixed(&self, offset: u64, length: u64) -> Result<(), SegmentError> {
        let start = offset & !(layout::PAGE_BYTES - 1);
        let end = layout::round_up(offset + length, layout::PAGE_BYTES);
        self.reserve(start, end - start).map_err(|_| SegmentError::Capacity {
            wanted: self.regions.capacity_bytes,
            why: "can't even be begun: /dev/shm is full; free some room there".into(),
        })
    }
}

/// Memory that was taken from the kernel as `header` has it, in bytes.
pub fn memory_bytes(header: &Header) -> u64 {
    let slots = |count: &Word, bytes: usize| count.load().saturating_mul(bytes as u64);
    header
        .reserved_bytes
        .load()
        .saturating_add(slots(&header.worker_slots_reserved, size_of::<WorkerSlot>()))
        .saturating_add(slots(&header.connection_slots_reserved, size_of::<ConnectionSlot>()))
        .saturating_add(slots(&header.backup_rings_reserved, layout::BACKUP_RING_BYTES as usize))
        .saturating_add(slots(
            &header.sessions_reserved,
            size_of::<SessionHead>() + size_of::<SessionWindow>(),
        ))
}

/// What tells this segment from every other one, also on other machines, as a text. It follows from the seed of the hash, which
/// stays a secret all the same.
pub fn identity(header: &Header) -> String {
    let seed = HashSeed::of(header);
    let facts = header.boot_id.iter().chain(&header.backup_id).chain([&header.created_ns]);
    let bytes: Vec<u8> = facts.flat_map(|word| word.load().to_le_bytes()).collect();
    // No keys are ever hashed for these groups.
    let [low, high] = [u32::MAX, u32::MAX - 1].map(|group| seed.hash(group, &bytes).0);
    format!("{high:016x}{low:016x}")
}

/// A segment that this process can only read: what tools and local readers hold.
pub struct SegmentView {
    view: View,
    regions: Regions,
    /// None for memory that this process also writes.
    file: Option<FileIdentity>,
}

/// Which file it is, whatever it is called. Its number is not given to another one as long as it is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FileIdentity {
    device: u64,
    inode: u64,
}

impl FileIdentity {
    #[allow(clippy::unnecessary_cast, reason = "another type on other processors")]
    fn of(stat: &rustix::fs::Stat) -> Self {
        Self { device: stat.st_dev as u64, inode: stat.st_ino as u64 }
    }
}

impl SegmentView {
    /// A read-only view of a segment that this process also writes.
    pub fn of(segment: &Segment) -> Self {
        Self { view: View::of(segment.memory()), regions: segment.regions, file: None }
    }

    /// Whether the server of this segment serves connection `number` of process `pid`.
    pub fn has_connection(&self, number: u64, pid: u32) -> bool {
        let reserved = self.header().map_or(0, |header| header.connection_slots_reserved.load());
        (0..reserved.min(u64::from(crate::limits::CONNECTIONS_MAX_LIMIT))).any(|index| {
            self.view.object(self.regions.connection(index)).is_ok_and(|slot| {
                slot.state.load() != 0 && slot.id.load() == number && slot.client.load() as u32 == pid
            })
        })
    }

    /// Where the data ends that has memory now.
    pub fn data_end(&self) -> u64 {
        let reserved = self.header().map_or(0, |header| header.extents_reserved.load());
        self.regions.data + reserved.min(self.regions.extent_count) * layout::EXTENT_BYTES
    }

    /// Whether the segment was removed, so that nothing in it counts any more.
    #[inline(always)]
    pub fn is_retired(&self) -> bool {
        self.header().map_or(0, |header| header.magic.load()) != layout::MAGIC
    }

    /// The memory.
    #[inline(always)]
    pub fn view(&self) -> &View {
        &self.view
    }

    /// Where everything lies.
    #[inline(always)]
    pub fn regions(&self) -> &Regions {
        &self.regions
    }

    /// The header.
    ///
    /// # Errors
    /// [`Damaged`] never: the mapping is at least this long.
    #[inline(always)]
    pub fn header(&self) -> Result<&Header, Damaged> {
        self.view.object(Offset::new(0))
    }
}

/// Text that was stored zero-padded in words.
pub fn text_of(words: &[Word]) -> String {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.load().to_le_bytes()).collect();
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// Stores `text` zero-padded into `words`, cut to what fits.
pub fn store_text(memory: &Memory, words: &[Word], text: &str) {
    let mut bytes = text.bytes();
    for word in words {
        let mut chunk = [0u8; 8];
        for slot in &mut chunk {
            *slot = bytes.next().unwrap_or(0);
        }
        memory.store(word, u64::from_le_bytes(chunk));
    }
}
