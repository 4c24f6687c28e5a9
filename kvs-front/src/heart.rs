//! The supervisor's heartbeat, and its look at the data server's.
//!
//! A data server that serves is judged by its count in the segment; one that starts, which may take long where there is much to
//! load, only by whether it was stopped. See [`kvs_core::heartbeat`] for why looks are counted instead of time.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvs_core::heartbeat::{HeaderPage, Observer, interval};
use kvs_core::sys::process::{ProcessIdentity, is_stopped};
use kvs_front::process;

/// The heart.
pub struct Heart {
    interval: Option<Duration>,
    next: Instant,
    page: Option<HeaderPage>,
    watched: Option<Watched>,
    standby: Option<Watched>,
}

struct Watched {
    pid: u32,
    process: Arc<OwnedFd>,
    observer: Observer,
    /// Seen moving, though it does not beat yet.
    moves: u64,
    serves: bool,
}

impl Heart {
    /// One that beats ten times in `hang_timeout`; never when that is zero.
    pub fn new(hang_timeout: Duration) -> Self {
        Self {
            interval: interval(hang_timeout),
            next: Instant::now(),
            page: None,
            watched: None,
            standby: None,
        }
    }

    /// From now on it beats in this segment.
    ///
    /// # Errors
    /// When its header can't be mapped.
    pub fn enter(&mut self, segment: BorrowedFd<'_>) -> io::Result<&HeaderPage> {
        Ok(self.page.insert(HeaderPage::map(segment)?))
    }

    /// From now on this data server, which starts, is watched.
    pub fn watch_start(&mut self, pid: u32, process: Arc<OwnedFd>) {
        self.watched = Some(Watched { pid, process, observer: Observer::default(), moves: 0, serves: false });
    }

    /// From now on this data server, which serves, is watched.
    pub fn watch(&mut self, pid: u32, process: Arc<OwnedFd>) {
        let observer = Observer::new(self.page.as_ref().map_or(0, HeaderPage::data_beats));
        self.watched = Some(Watched { pid, process, observer, moves: 0, serves: true });
    }

    /// From now on this standby is watched; it does nothing, so only whether it was stopped counts.
    pub fn watch_standby(&mut self, pid: u32, process: Arc<OwnedFd>) {
        self.standby = Some(Watched { pid, process, observer: Observer::default(), moves: 0, serves: false });
    }

    /// From now on no standby is watched.
    pub fn forget_standby(&mut self) {
        self.standby = None;
    }

    /// From now on no data server but a standby is watched.
    pub fn forget(&mut self) {
        self.watched = None;
    }

    /// When [`Heart::beat`] wants to be called at the latest.
    pub fn due(&self) -> Option<Instant> {
        self.interval.map(|_| self.next)
    }

    /// Beats when it is time, and kills the data server if it hangs.
    pub fn beat(&mut self, now: Instant) {
        let Some(interval) = self.interval.filter(|_| now >= self.next) else { return };
        self.next = now + interval;
        if let Some(page) = &self.page {
            page.beat();
        }
        let beats = self.page.as_ref().map_or(0, HeaderPage::data_beats);
        let hung = self.watched.take_if(|watched| watched.is_stuck(beats));
        for hung in hung.into_iter().chain(self.standby.take_if(|standby| standby.is_stuck(0))) {
            let timeout = interval * kvs_core::heartbeat::CHECKS;
            log::error!(
                "data server {} has stood still for {timeout:?} (--hang-timeout); killing it",
                hung.pid
            );
            process::kill(hung.process.as_fd());
        }
    }
}

impl Watched {
    fn is_stuck(&mut self, beats: u64) -> bool {
        if self.serves {
            return self.observer.is_stuck(beats);
        }
        self.moves += u64::from(!is_stopped(self.pid));
        self.observer.is_stuck(self.moves)
    }
}

/// This front server, as the next words of the header shall have it.
///
/// # Errors
/// When `/proc` can't be read.
pub fn own_identity() -> anyhow::Result<ProcessIdentity> {
    anyhow::Context::context(ProcessIdentity::current(), "can't learn this process's start time")
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use rustix::process::{Signal, kill_process};

    use super::*;

    #[test]
    fn heart_kills_a_starting_data_server_that_was_stopped_and_no_other() {
        let mut child = Command::new("sleep").arg("60").spawn().expect("sleep");
        let process = Arc::new(process::of_child(&child).expect("a descriptor"));
        let mut heart = Heart::new(Duration::from_secs(1));
        heart.watch_start(child.id(), process);
        let mut now = Instant::now() + Duration::from_secs(60);
        let mut beats = |count: u32| {
            for _ in 0..count {
                heart.beat(now);
                heart.beat(now);
                now += Duration::from_secs(60);
            }
        };
        beats(50);
        assert_eq!(child.try_wait().expect("asked"), None);
        kill_process(rustix::process::Pid::from_child(&child), Signal::STOP).expect("stopped");
        while !is_stopped(child.id()) {
            std::thread::yield_now();
        }
        beats(9);
        assert_eq!(child.try_wait().expect("asked"), None, "looks are counted, not time");
        beats(1);
        assert!(!child.wait().expect("ended").success());
    }
}
