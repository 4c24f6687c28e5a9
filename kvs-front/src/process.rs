//! Killing a process through its descriptor: never another one that got its number. And ending one whole that has gone wrong.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use kvs_core::limits::FIRST_CLIENT_DESCRIPTOR;
use kvs_core::sys::launch::{self, Child};
use kvs_core::sys::priority::{self, BREATH};
use kvs_core::sys::process::open_descriptors;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Resource, Signal, getrlimit, pidfd_open, pidfd_send_signal};

/// A thread that panicked may have left anything half done: the whole process ends, and its successor goes on.
pub fn abort_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::abort();
    }));
}

/// Makes room for `count` descriptors, while this process has one thread. Where threads share it, the kernel halts whoever needs the
/// table of descriptors enlarged until all processors have passed by: ten milliseconds and more, at each doubling. And prepares for
/// launching others, before there are thousands of descriptors that these are not to get.
pub fn reserve_descriptors(count: u64) {
    if let Err(error) = launch::prepare() {
        log::debug!("launching the other server will take longer: {error}");
    }
    let most = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let last = i32::try_from(count.min(most).saturating_sub(1)).unwrap_or(i32::MAX);
    // It is there to be opened and closed; where that can't be, the table grows later.
    let _ = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stderr(), last);
}

/// A descriptor of this very process, for another one.
///
/// # Errors
/// No descriptor is left.
pub fn own() -> rustix::io::Result<OwnedFd> {
    pidfd_open(rustix::process::getpid(), PidfdFlags::empty())
}

/// The process group of this process.
pub fn own_group() -> u32 {
    rustix::process::getpgrp().as_raw_nonzero().get().unsigned_abs()
}

/// A descriptor of a child that nobody else reaps.
///
/// # Errors
/// No descriptor is left.
pub fn of_child(child: &std::process::Child) -> rustix::io::Result<OwnedFd> {
    pidfd_open(Pid::from_child(child), PidfdFlags::empty())
}

/// Kills it; one that is dead already is no error.
pub fn kill(process: BorrowedFd<'_>) {
    match pidfd_send_signal(process, Signal::KILL) {
        Ok(()) | Err(Errno::SRCH) => {}
        Err(error) => log::error!("can't kill the other server: {error}"),
    }
}

/// Waits until none of its threads runs any more, at most for `patience`; whether that is so.
pub fn ends_within(process: &OwnedFd, patience: Duration) -> bool {
    let until = Instant::now() + patience;
    loop {
        let left = Timespec::try_from(until.saturating_duration_since(Instant::now())).ok();
        match poll(&mut [PollFd::new(process, PollFlags::IN)], left.as_ref()) {
            Err(Errno::INTR) => {}
            ended => return ended.is_ok_and(|count| count > 0),
        }
    }
}

/// Waits until none of its threads runs any more.
pub fn await_end(process: BorrowedFd<'_>) {
    loop {
        let ended = poll(&mut [PollFd::from_borrowed_fd(process, PollFlags::IN)], None);
        if !matches!(ended, Err(Errno::INTR)) {
            return;
        }
    }
}

/// Takes the other server, which this process has launched and which has ended, out of the kernel's lists, in a thread that has nothing
/// else to do: it takes a tenth of a second with ten thousand clients.
pub fn reap(child: Child) {
    if let Err(error) = priority::give_way_from_now_on() {
        log::debug!("what is left of the other server takes time from those who are served: {error}");
    }
    // It was given a core when it was woken, and would keep it.
    std::thread::sleep(BREATH);
    // The other one had the same clients.
    let own = open_descriptors(std::process::id()).and_then(|count| u32::try_from(count).ok()).unwrap_or(0);
    // An error would mean that somebody else has done it.
    let _ = child.reap_at_leisure(own.saturating_add(FIRST_CLIENT_DESCRIPTOR.unsigned_abs()));
}

/// What a server begins with that the other one, `launcher`, has launched, in its main thread. It gave way to clients while it was loaded,
/// and doesn't any longer. And should it stand still when the launcher dies, the kernel lets it go on, so that it can notice.
pub fn begin_launched(launcher: &str) {
    if let Err(error) = priority::begin() {
        log::warn!("this server gets what others leave of the cores: {error}");
    }
    if let Err(error) = rustix::process::set_parent_process_death_signal(Some(Signal::CONT)) {
        log::warn!("a death of the {launcher} while this process stands still will go unnoticed: {error}");
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::process::Command;

    use super::*;

    #[test]
    fn process_that_was_killed_has_ended_and_may_be_killed_again() {
        let mut child = Command::new("sleep").arg("60").spawn().expect("sleep");
        let process = of_child(&child).expect("a descriptor");
        kill(process.as_fd());
        await_end(process.as_fd());
        kill(process.as_fd());
        assert!(!child.wait().expect("ended").success());
        kill(process.as_fd());
    }
}
