//! One thread that beats while every worker gets on, and looks whether the front server does.
//!
//! A worker that serves has an odd turn, and every round of it is another one. One that stands at the same odd turn over as many
//! looks as make a hang will not get on: this process ends, and the next data server recovers. A front server that hangs is
//! killed, and its death takes the usual way. See [`kvs_core::heartbeat`] for why looks are counted.
//!
//! Lock: one around who is watched, held for a moment. A crash of this thread is one of the process.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use kvs_core::heartbeat::{CHECKS, Observer, interval};
use kvs_core::liveness::LIVENESS_SLOTS;
use kvs_core::segment::layout::{Header, WorkerSlot};
use kvs_front::process;

use crate::shared::Shared;

/// The thread's slot of the liveness page: the last of the helpers'.
const SLOT: usize = LIVENESS_SLOTS - 1;

/// The thread, from outside. It ends with the process.
#[derive(Clone)]
pub struct Heartbeat {
    front: Arc<Mutex<Option<Watched>>>,
}

struct Watched {
    process: Arc<OwnedFd>,
    /// None until it was looked at first.
    observer: Option<Observer>,
}

impl Heartbeat {
    /// Starts it; with a time-out of zero nobody is ever taken for hung, and there is no thread.
    ///
    /// # Errors
    /// When no thread is to be had.
    pub fn start(shared: &Arc<Shared>, hang_timeout: Duration) -> anyhow::Result<Self> {
        let front = Arc::new(Mutex::new(None));
        let Some(interval) = interval(hang_timeout) else { return Ok(Self { front }) };
        let (shared, watched) = (Arc::clone(shared), Arc::clone(&front));
        let thread = std::thread::Builder::new().name("heartbeat".into()).spawn(move || {
            let _alive = shared.enter(SLOT);
            let Some(mut looks) = Looks::new(&shared) else { std::process::abort() };
            loop {
                std::thread::sleep(interval);
                looks.round(&watched, hang_timeout);
            }
        });
        thread.context("can't start the heartbeat")?;
        Ok(Self { front })
    }

    /// From now on this front server is watched.
    pub fn watch(&self, process: Arc<OwnedFd>) {
        *self.front() = Some(Watched { process, observer: None });
    }

    /// From now on no front server is watched.
    pub fn forget(&self) {
        *self.front() = None;
    }

    fn front(&self) -> MutexGuard<'_, Option<Watched>> {
        self.front.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Looks<'s> {
    shared: &'s Shared,
    header: &'s Header,
    workers: Vec<(&'s WorkerSlot, Observer)>,
}

impl<'s> Looks<'s> {
    /// None when the segment has not the slots that its workers work in, which can't be.
    fn new(shared: &'s Shared) -> Option<Self> {
        let slot = |index| shared.segment.memory().object(shared.segment.regions().worker(index as u64));
        let workers = (0..shared.workers).map(|index| Some((slot(index).ok()?, Observer::default())));
        Some(Self { shared, header: shared.segment.header().ok()?, workers: workers.collect::<Option<_>>()? })
    }

    fn round(&mut self, front: &Mutex<Option<Watched>>, timeout: Duration) {
        for (index, (slot, observer)) in self.workers.iter_mut().enumerate() {
            if has_stuck(slot.turn.load(), observer) {
                log::error!(
                    "worker {index} has not got on for {timeout:?} (--hang-timeout); ending, the next data server recovers"
                );
                std::process::abort();
            }
        }
        let beats = self.header.data_heartbeat.load();
        self.shared.segment.memory().store(&self.header.data_heartbeat, beats.wrapping_add(1));
        self.look_at(&mut front.lock().unwrap_or_else(PoisonError::into_inner), timeout);
    }

    fn look_at(&self, front: &mut Option<Watched>, timeout: Duration) {
        let beats = self.header.front_heartbeat.load();
        let hung = front.take_if(|watched| {
            watched.observer.get_or_insert_with(|| Observer::new(beats.wrapping_sub(1))).is_stuck(beats)
        });
        if let Some(hung) = hung {
            log::error!("the front server has stood still for {timeout:?} (--hang-timeout); killing it");
            process::kill(hung.process.as_fd());
        }
    }
}

/// Whether a worker has stood at the same odd turn for too long. An even one waits for work.
fn has_stuck(turn: u64, observer: &mut Observer) -> bool {
    if turn.is_multiple_of(2) {
        *observer = Observer::new(turn);
        return false;
    }
    observer.is_stuck(turn)
}

const _: () = assert!(CHECKS > 1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heartbeat_worker_is_stuck_at_an_odd_turn_only() {
        let mut observer = Observer::default();
        for _ in 0..3 * CHECKS {
            assert!(!has_stuck(8, &mut observer), "it waits for work");
        }
        for turn in 0..u64::from(3 * CHECKS) {
            assert!(!has_stuck(9 + 2 * turn, &mut observer), "it is busy");
        }
        let turn = 9 + 2 * u64::from(3 * CHECKS);
        let looks = (1..).find(|_| has_stuck(turn, &mut observer));
        assert_eq!(looks, Some(CHECKS + 1), "the first look sees it move");
    }
}
