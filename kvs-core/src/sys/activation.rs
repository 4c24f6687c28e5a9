//! Descriptors that a service manager gave this process at its start (`LISTEN_FDS`): those that an earlier process of the service had put into
//! the manager's store.
//!
//! Invariant: a descriptor is owned once. They are taken once in the life of a process, and only if the manager's variables
//! mean this very process.
#![allow(unsafe_code)]

use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::FdFlags;

/// The first of them: those before are the standard streams.
const FIRST: RawFd = 3;
/// More than any process may have open: a number above is no number of descriptors.
const COUNT_MAX: RawFd = 1 << 20;

static TAKEN: AtomicBool = AtomicBool::new(false);

/// Takes them, each with its name; none when there are none for this process, or they were taken before.
pub fn take() -> Vec<(String, OwnedFd)> {
    let variable = |name| std::env::var(name).ok();
    let means_us = variable("LISTEN_PID").is_some_and(|pid| pid == std::process::id().to_string());
    if !means_us || TAKEN.swap(true, Ordering::Relaxed) {
        return Vec::new();
    }
    let count = variable("LISTEN_FDS").and_then(|count| count.parse().ok()).unwrap_or(0);
    let names = variable("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':').map(str::to_owned).chain(std::iter::repeat(String::new()));
    let numbers = FIRST..FIRST + RawFd::clamp(count, 0, COUNT_MAX);
    numbers.filter_map(|number| Some((names.next()?, own(number)?))).collect()
}

/// Makes this process the owner of descriptor `number`; None when it isn't open.
fn own(number: RawFd) -> Option<OwnedFd> {
    // SAFETY: nothing but this module uses a descriptor of this range that the manager opened before the process began; if it is
    // not open, the calls below say so and touch nothing.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    let flags = rustix::io::fcntl_getfd(borrowed).ok()?;
    // What is marked so was opened by this process itself: the mark does not survive an `exec`.
    if flags.contains(FdFlags::CLOEXEC) {
        return None;
    }
    rustix::io::fcntl_setfd(borrowed, flags | FdFlags::CLOEXEC).ok()?;
    // SAFETY: it is open, came from the manager, and is taken here once and for all, as `TAKEN` says.
    Some(unsafe { OwnedFd::from_raw_fd(number) })
}
