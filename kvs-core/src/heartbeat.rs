//! Knowing that a process which lives has stopped working: a count in the segment's header that goes up while it does.
//!
//! Each server beats once in an [`interval`], a tenth of the hang time-out, and looks at the other's count as often. A
//! count that stands still over [`CHECKS`] looks in a row is a hang.
//!
//! Invariants
//! - Looks are counted, not time: a watcher that was itself stopped, or starved, for an hour makes one look when it goes on,
//!   and finds that the other has beaten meanwhile, or gives it nine more.
//! - Who looks has beaten first. So when both servers were stopped and go on, neither takes the other for hung; and that each
//!   kills the other can't be: the last looks of the one lie among beats of the other.
//! - The front server maps the header's page alone, and changes only the words that tell of itself.
//!
//! No lock: every word has one writer. A crash leaves a count that stands still, and nobody looks at a dead server's.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use crate::segment::layout::{Header, MAGIC, PAGE_BYTES};
use crate::sys::memory::{Memory, Offset};
use crate::sys::process::ProcessIdentity;

/// Looks in a row without a beat that make a hang.
pub const CHECKS: u32 = 10;

/// How far apart beats and looks are; None when nobody shall be taken for hung.
pub fn interval(hang_timeout: Duration) -> Option<Duration> {
    Some(hang_timeout / CHECKS).filter(|interval| !interval.is_zero())
}

/// What was seen of a count that should go up.
#[derive(Debug, Clone, Copy, Default)]
pub struct Observer {
    last: u64,
    unchanged: u32,
}

impl Observer {
    /// Nothing yet, of a count that is `now` as it is.
    pub fn new(now: u64) -> Self {
        Self { last: now, unchanged: 0 }
    }

    /// Looks once in an interval; true when the count has stood still for too long.
    pub fn is_stuck(&mut self, count: u64) -> bool {
        self.unchanged = if count == self.last { self.unchanged.saturating_add(1) } else { 0 };
        self.last = count;
        self.unchanged >= CHECKS
    }
}

/// The first page of a segment, as the front server has it.
pub struct HeaderPage(Memory);

impl HeaderPage {
    /// Maps the first page of the segment that a data server serves.
    ///
    /// # Errors
    /// `InvalidData` when it is none; else what the kernel says.
    pub fn map(segment: BorrowedFd<'_>) -> io::Result<Self> {
        let wrong = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what);
        // Touching a page that the file doesn't have is a signal.
        if !u64::try_from(rustix::fs::fstat(segment)?.st_size).is_ok_and(|size| size >= PAGE_BYTES) {
            return Err(wrong("the segment is shorter than its header"));
        }
        let page = Self(Memory::map(segment, PAGE_BYTES)?);
        if page.header().is_some_and(|header| header.magic.load() == MAGIC) {
            Ok(page)
        } else {
            Err(wrong("what the data server serves is no segment"))
        }
    }

    fn header(&self) -> Option<&Header> {
        self.0.object(Offset::new(0)).ok()
    }

    /// The front server works.
    pub fn beat(&self) {
        if let Some(header) = self.header() {
            self.0.store(&header.front_heartbeat, header.front_heartbeat.load().wrapping_add(1));
        }
    }

    /// The data server's count.
    pub fn data_beats(&self) -> u64 {
        self.header().map_or(0, |header| header.data_heartbeat.load())
    }

    /// This front server takes the place of one that died.
    pub fn introduce_successor(&self, front: ProcessIdentity) {
        let Some(header) = self.header() else { return };
        // Seen in between, they are no process that lives.
        self.0.store(&header.front_process[0], u64::from(front.pid));
        self.0.store(&header.front_process[1], front.start_time);
        self.0.store(&header.front_restarts, header.front_restarts.load() + 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heartbeat_interval_of_no_timeout_is_none() {
        assert_eq!(interval(Duration::ZERO), None);
        assert_eq!(interval(Duration::from_secs(5)), Some(Duration::from_millis(500)));
    }

    #[test]
    fn heartbeat_that_stands_still_is_stuck_after_so_many_looks_and_no_sooner() {
        let mut observer = Observer::new(7);
        for _ in 1..CHECKS {
            assert!(!observer.is_stuck(7));
        }
        assert!(!observer.is_stuck(8), "it beat at the last moment");
        for _ in 1..CHECKS {
            assert!(!observer.is_stuck(8));
        }
        assert!(observer.is_stuck(8));
        assert!(observer.is_stuck(8), "and stays so");
        assert!(!observer.is_stuck(9));
    }

    #[test]
    #[cfg(not(miri))]
    fn heartbeat_page_of_a_file_that_is_no_segment_is_refused() {
        use std::os::fd::AsFd;
        let file = tempfile::tempfile().expect("a file");
        assert!(HeaderPage::map(file.as_fd()).is_err());
        file.set_len(PAGE_BYTES).expect("longer");
        assert!(HeaderPage::map(file.as_fd()).is_err());
    }
}
