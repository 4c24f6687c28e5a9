//! What workers and the backup thread say to each other without waiting.
//!
//! | word | written by | read by |
//! |---|---|---|
//! | `synced` | backup thread: how much of a ring has reached the disk for good | workers, before they send answers |
//! | `failing` | backup thread: the disk refuses | workers, before they change anything |
//! | `resting` | backup thread: it sleeps until it is called | workers, after they have changed something |
//! | `waiting` | workers: call me when something moves | backup thread, after each batch and each sync |
//!
//! No lock on the way of a request; the message of a failure has one.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::limits::WORKERS_MAX;

/// When changes may be acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acknowledge {
    /// When they are on disk.
    Synced,
    /// At once, as long as the disk takes them.
    WhileWriting,
    /// At once, as long as the ring takes them.
    Always,
}

/// Whether a change may be made now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Admission {
    /// Yes.
    Go,
    /// Not before the backup thread has taken something out of the worker's ring.
    Wait,
    /// No, and why.
    Refused(String),
}

/// The state of the backup file, as workers see it.
pub struct Gate {
    acknowledge: Acknowledge,
    failing: AtomicBool,
    resting: AtomicBool,
    message: Mutex<String>,
    synced: [AtomicU64; WORKERS_MAX],
    waiting: [AtomicBool; WORKERS_MAX],
    /// Where each ring stood when this process took over.
    inherited: OnceLock<Vec<u64>>,
}

impl Gate {
    /// Of a store that acknowledges so.
    pub fn new(acknowledge: Acknowledge) -> Self {
        Self {
            acknowledge,
            failing: AtomicBool::new(false),
            resting: AtomicBool::new(false),
            message: Mutex::default(),
            synced: [const { AtomicU64::new(0) }; WORKERS_MAX],
            waiting: [const { AtomicBool::new(false) }; WORKERS_MAX],
            inherited: OnceLock::new(),
        }
    }

    /// Whether answers to changes wait until these are on disk.
    pub fn waits_for_sync(&self) -> bool {
        self.acknowledge == Acknowledge::Synced
    }

    /// Whether a change may be made, given that the worker's ring has room for it or not.
    #[inline]
    pub fn admission(&self, has_room: bool) -> Admission {
        if self.failing.load(Ordering::Relaxed) && (!has_room || self.acknowledge != Acknowledge::Always) {
            return Admission::Refused(self.message());
        }
        if has_room { Admission::Go } else { Admission::Wait }
    }

    fn message(&self) -> String {
        self.message.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Why nothing can be written just now; None while all is well.
    pub fn failure(&self) -> Option<String> {
        self.failing.load(Ordering::Relaxed).then(|| self.message())
    }

    /// Nothing can be written; says why. Returns whether that is news.
    pub fn fail(&self, message: &str) -> bool {
        let mut known = self.message.lock().unwrap_or_else(PoisonError::into_inner);
        let news = !self.failing.swap(true, Ordering::Relaxed) || *known != message;
        message.clone_into(&mut known);
        news
    }

    /// All is well. Returns whether that is news.
    pub fn recover(&self) -> bool {
        self.failing.swap(false, Ordering::Relaxed)
    }

    /// How much of the ring of worker `index` is on disk for good.
    #[inline]
    pub fn synced(&self, index: usize) -> u64 {
        self.synced[index].load(Ordering::Acquire)
    }

    /// That much of it is.
    pub fn set_synced(&self, index: usize, position: u64) {
        self.synced[index].store(position, Ordering::Release);
    }

    /// The rings stand so, and answers that were given to what is in them may not have been sent. To be called once, before
    /// a worker begins.
    pub fn inherit(&self, heads: Vec<u64>) {
        let _ = self.inherited.set(heads);
    }

    /// Whether all that is on disk for good.
    pub fn is_inheritance_synced(&self) -> bool {
        let heads = self.inherited.get().into_iter().flatten().enumerate();
        heads.take(WORKERS_MAX).all(|(index, head)| self.synced(index) >= *head)
    }

    /// Worker `index` wants to be called when its ring is drained or synced.
    pub fn wait(&self, index: usize) {
        self.waiting[index].store(true, Ordering::SeqCst);
    }

    /// The workers that want to be called, whom the caller calls now.
    pub fn take_waiting(&self) -> impl Iterator<Item = usize> + '_ {
        let waiting = self.waiting.iter().enumerate();
        waiting
            .filter(|(_, word)| word.load(Ordering::SeqCst) && word.swap(false, Ordering::SeqCst))
            .map(|(index, _)| index)
    }

    /// The backup thread is going to sleep until it is called; it looks at the rings once more after this.
    pub fn rest(&self) {
        self.resting.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// It is awake.
    pub fn wake(&self) {
        self.resting.store(false, Ordering::SeqCst);
    }

    /// Something was put into a ring: whether the backup thread must be called.
    #[inline]
    pub fn must_call(&self) -> bool {
        fence(Ordering::SeqCst);
        self.resting.load(Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gate_refuses_as_the_mode_demands() {
        for (acknowledge, refused_with_room) in
            [(Acknowledge::Synced, true), (Acknowledge::WhileWriting, true), (Acknowledge::Always, false)]
        {
            let gate = Gate::new(acknowledge);
            assert_eq!((gate.admission(true), gate.admission(false)), (Admission::Go, Admission::Wait));
            assert!(gate.fail("the disk is full"));
            assert!(!gate.fail("the disk is full"));
            let refused = Admission::Refused("the disk is full".into());
            assert_eq!(gate.admission(false), refused);
            assert_eq!(gate.admission(true) == refused, refused_with_room);
            assert_eq!(gate.failure().as_deref(), Some("the disk is full"));
            assert!(gate.recover());
            assert_eq!(gate.admission(true), Admission::Go);
        }
    }

    #[test]
    fn gate_calls_each_waiting_worker_once() {
        let gate = Gate::new(Acknowledge::Synced);
        gate.wait(3);
        gate.wait(5);
        assert_eq!(gate.take_waiting().collect::<Vec<_>>(), [3, 5]);
        assert_eq!(gate.take_waiting().count(), 0);
    }
}
