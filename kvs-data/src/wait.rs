//! Waiting for several descriptors at once.

use std::os::fd::BorrowedFd;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// Waits until one of the sources that are there has something, or has hung up, or until then; which of them have.
pub fn wait_for<const N: usize>(sources: [Option<BorrowedFd<'_>>; N], until: Option<Instant>) -> [bool; N] {
    let mut polled: Vec<PollFd<'_>> =
        sources.iter().flatten().map(|source| PollFd::from_borrowed_fd(*source, PollFlags::IN)).collect();
    loop {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut polled, timeout.as_ref()) {
            Err(Errno::INTR) => {}
            // Without memory, at worst, none has anything, and the caller waits again.
            _ => break,
        }
    }
    let mut ready = polled.iter().map(|polled| !polled.revents().is_empty());
    sources.map(|source| source.is_some() && ready.next().unwrap_or(false))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::fd::AsFd as _;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use super::*;

    #[test]
    fn wait_tells_which_sources_have_something_and_ends_in_time() {
        let (mut far, near) = UnixStream::pair().expect("a pair");
        let (_other, silent) = UnixStream::pair().expect("a pair");
        let sources = [None, Some(silent.as_fd()), None, Some(near.as_fd())];
        let until = Instant::now() + Duration::from_millis(20);
        assert_eq!(wait_for(sources, Some(until)), [false; 4]);
        assert!(Instant::now() >= until);
        far.write_all(b"a").expect("room");
        assert_eq!(wait_for(sources, None), [false, false, false, true]);
        drop(far);
        assert_eq!(wait_for(sources, Some(until)), [false, false, false, true]);
    }
}
