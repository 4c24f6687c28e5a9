//! The memory of a liveness page: a sealed memfd with one lock and one state word for each thread.
//!
//! Invariants
//! - The memfd is sealed at its length before anyone else gets it, and that is checked at attach: touching the
//!   mapping never raises SIGBUS, whatever the peer does.
//! - The locks are initialised exactly once, by the creator, before the descriptor is given away.
//!
//! The rules of the locks themselves, and what a crash does, are argued in [`crate::liveness`].
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags};

use super::memory::{Damaged, Memory, Offset, Word};
use super::robust_mutex::RobustMutex;
use crate::shared_struct;

shared_struct! {
    /// What one thread is known by.
    pub struct LivenessSlot, 128, {
        /// Held by the thread from its claim to its death.
        mutex: RobustMutex,
        /// See [`crate::liveness`]; only changed under `mutex`.
        state: Word,
        /// Nothing; keeps the next lock on a line of its own.
        reserved: [Word; 7],
    }
}

/// Size of a page with room for `slots` threads, in bytes.
const fn length(slots: usize) -> u64 {
    (slots * size_of::<LivenessSlot>()) as u64
}

/// The slot at `index`.
///
/// # Errors
/// [`Damaged`] when the page has no such slot.
pub fn slot(memory: &Memory, index: usize) -> Result<&LivenessSlot, Damaged> {
    memory.object(Offset::<LivenessSlot>::new(0).index(index as u64))
}

/// Makes a page with `slots` free slots.
///
/// # Errors
/// What the kernel says to `memfd_create`, `ftruncate`, sealing or `mmap`.
pub fn create(slots: usize) -> io::Result<(OwnedFd, Memory)> {
    let fd = rustix::fs::memfd_create("kvs-liveness", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&fd, length(slots))?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    let memory = Memory::map(fd.as_fd(), length(slots))?;
    for index in 0..slots {
        let slot = slot(&memory, index).map_err(io::Error::other)?;
        // SAFETY: the memory is new and nobody else has its descriptor yet.
        unsafe { slot.mutex.initialize() }?;
    }
    Ok((fd, memory))
}

/// Maps a page that a peer made.
///
/// # Errors
/// `InvalidData` when it is no sealed memory of the right length; else what the kernel says.
pub fn attach(fd: &OwnedFd, slots: usize) -> io::Result<Memory> {
    let sealed = rustix::fs::fcntl_get_seals(fd).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
    let size = rustix::fs::fstat(fd)?.st_size;
    if !sealed || u64::try_from(size) != Ok(length(slots)) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the descriptor is no liveness page of this version; are both servers of the same version?",
        ));
    }
    Memory::map(fd.as_fd(), length(slots))
}
