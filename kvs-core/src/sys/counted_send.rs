//! Sending on a socket so that the count of bytes sent is known even when the sender dies in it.
//!
//! `sendmmsg` stores how much of a message it sent into the caller's memory, behind the message's header. The kernel does that in
//! the same system call as the sending, and a thread dies of a SIGKILL only where it would sleep or go back to its own code:
//! not in between, where a socket that doesn't wait never sleeps. So with that count in the segment, whoever finds it there
//! knows what was sent, to the byte. Were the count's page not mapped where the kernel stores it, it would have to be then, and the
//! kernel gives that up for a thread that is being killed: so the page is written to, through that very mapping, before each send.
//!
//! ```text
//!          private page                 the worker slot's first page, mapped once more
//! ┌──────────────────────────────┬──────────────────────────────┐
//! │             message's header │ count │ … rest of the slot    │
//! └──────────────────────────────┴──────────────────────────────┘
//! ```
//!
//! The header has to lie right before the count, and it holds addresses, which have no place in a segment: so it lies at the end
//! of a page of this process's own, and the count begins the next.
//!
//! Invariants
//! - The count is all ones from before a send until the kernel has stored what it came to.
//! - One thread sends with one of these, as one thread writes a worker's slot.
//!
//! A crash leaves the count. For TCP the kernel's own counters do as well and cost nothing: see [`super::stream_position`].
#![allow(unsafe_code)]

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

use super::memory::{Memory, Word};

/// The page that the two halves are mapped by; the segment is laid out for it.
const PAGE: usize = 4096;
/// From the beginning of a message's header to its count.
const COUNT_AT: usize = std::mem::offset_of!(libc::mmsghdr, msg_len);

/// What the count's word says while nothing is known of a send.
pub const UNKNOWN: u64 = u64::MAX;

/// What the count's word says of the last send: the bytes sent, None when the kernel has stored nothing.
pub const fn count_of(word: u64) -> Option<u32> {
    if word as u32 == u32::MAX { None } else { Some(word as u32) }
}

/// A sender whose count lies in the segment.
pub struct CountedSend {
    base: NonNull<u8>,
}

// SAFETY: the mapping belongs to this value alone; it moves to another thread with it.
unsafe impl Send for CountedSend {}

impl CountedSend {
    /// Maps the page of the segment that begins at `offset`, which exists, behind one of its own.
    ///
    /// # Errors
    /// What the kernel says; `Unsupported` where pages are larger than the segment is laid out for.
    pub fn map(segment: BorrowedFd<'_>, offset: u64) -> io::Result<Self> {
        if rustix::param::page_size() != PAGE || !offset.is_multiple_of(PAGE as u64) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address the kernel chooses overlaps nothing of ours.
        let base =
            unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), 2 * PAGE, access, MapFlags::PRIVATE)? };
        let base = NonNull::new(base.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let sender = Self { base };
        // SAFETY: it replaces the second of the two pages just mapped, which nobody knows of yet.
        unsafe {
            let second = base.as_ptr().add(PAGE).cast();
            rustix::mm::mmap(second, PAGE, access, MapFlags::SHARED | MapFlags::FIXED, segment, offset)?;
        }
        Ok(sender)
    }

    /// Sends `parts` without waiting; `count`, the word that begins the mapped page, is left with what the kernel stored.
    ///
    /// # Errors
    /// What the kernel says; nothing was sent then.
    pub fn send(
        &mut self,
        memory: &Memory,
        count: &Word,
        socket: BorrowedFd<'_>,
        parts: &[IoSlice<'_>],
    ) -> rustix::io::Result<usize> {
        // Whoever dies before the kernel stores the count has sent nothing.
        memory.store(count, UNKNOWN);
        // SAFETY: the second page begins with the count, a word that every process reads and writes atomically.
        unsafe { self.base.add(PAGE).cast::<AtomicU64>().as_ref() }.store(UNKNOWN, Ordering::Relaxed);
        // SAFETY: all of the header but its count lies in the private page, 56 bytes before its end and so aligned; the
        // mapping is this value's own. The kernel reads `parts` during the call only.
        let sent = unsafe {
            let message = self.base.as_ptr().add(PAGE - COUNT_AT).cast::<libc::mmsghdr>();
            let header = &raw mut (*message).msg_hdr;
            header.write(std::mem::zeroed());
            (*header).msg_iov = parts.as_ptr().cast::<libc::iovec>().cast_mut();
            (*header).msg_iovlen = parts.len() as _;
            let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
            libc::sendmmsg(socket.as_raw_fd(), message, 1, flags as _)
        };
        if sent < 0 {
            let error = io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
            return Err(Errno::from_raw_os_error(error));
        }
        count_of(count.load()).map_or(Err(Errno::IO), |count| Ok(count as usize))
    }
}

impl Drop for CountedSend {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`, and nobody can borrow it any more.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), 2 * PAGE) };
    }
}

#[cfg(all(test, not(miri), not(feature = "shuttle")))]
mod tests {
    //! Goal: the count in the shared page is what the peer gets. Method: a socket pair that fills up.

    use std::os::fd::AsFd;

    use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, recv, socketpair};

    use super::*;

    #[test]
    fn counted_send_leaves_the_count_in_the_page_that_is_shared() {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(2 * PAGE as u64).expect("room");
        let memory = Memory::map(file.as_fd(), 2 * PAGE as u64).expect("mapped");
        let count = memory.word(PAGE as u64).expect("in bounds");
        let next = memory.word(PAGE as u64 + 8).expect("in bounds");
        memory.store(next, 7);
        let (near, far) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::NONBLOCK, None).expect("a pair");
        let mut sender = CountedSend::map(file.as_fd(), PAGE as u64).expect("mapped");
        let bytes = vec![5; 300_000];
        let mut total = 0;
        loop {
            let parts = [IoSlice::new(&bytes[..1]), IoSlice::new(&bytes[1..])];
            match sender.send(&memory, count, near.as_fd(), &parts) {
                Ok(sent) => {
                    assert_eq!(count_of(count.load()), Some(sent as u32));
                    total += sent;
                }
                Err(error) => {
                    assert_eq!((error, count_of(count.load())), (Errno::AGAIN, None));
                    break;
                }
            }
        }
        let mut received = 0;
        let mut buffer = vec![0; 65_536];
        while let Ok((_, some)) = recv(&far, &mut buffer[..], RecvFlags::empty()) {
            received += some;
        }
        assert_eq!((total, next.load()), (received, 7));
        drop(far);
        let parts = [IoSlice::new(&bytes)];
        assert_eq!(sender.send(&memory, count, near.as_fd(), &parts), Err(Errno::PIPE));
    }
}
