//! Knowing at once, and for certain, that a process is dead.
//!
//! A [`LivenessPage`] is a page of shared memory between one *incarnation* of a server and whoever watches it. It
//! has one robust lock for each thread. A thread *claims* its slot, which locks it, before it touches anything it
//! shares with others (the segment, a client's socket), and never unlocks: only its death does. A watcher sleeps
//! in `lock` of the main thread's slot and is woken by the kernel about 150 µs after a SIGKILL, long before pidfd
//! or hang-up fire (they wait until the dead process's page tables are torn down, 20 ms a GiB).
//!
//! The death of one thread proves nothing about the others: after SIGKILL each leaves the kernel in its own time, a
//! `write` under way still completes. So a takeover is two steps: [`LivenessPage::await_death`] of the main
//! thread (the alarm), then [`LivenessPage::await_all_dead`] (the *fence*).
//!
//! Invariants
//! - A page belongs to one incarnation; its successor gets a new page.
//! - A thread that has claimed holds its lock until it is dead, and its process never unmaps the page.
//! - The state word of a slot changes under its lock only: unused → claimed → fenced, or unused → fenced.
//!   Nothing leads out of fenced.
//!
//! Why the fence misses nobody
//!
//! A mark "about to claim", set before locking, would leave a watcher that finds the mark and a free lock in
//! doubt: on its way, or dead on its way? The fence needs no such mark. It locks *every* slot, and sets it to fenced while
//! it holds it. For a thread T and its slot, consider when T's `lock` succeeds:
//! 1. before the fence's lock of that slot: then T holds it until its death, the fence's `lock` waits for that
//!    and returns `OwnerDied`. The kernel releases robust locks when the thread has left user mode for good, its last
//!    system call finished: nothing T does comes after the fence;
//! 2. after it: T finds the slot fenced, claim returns [`LivenessError::Fenced`], and T, having touched nothing yet,
//!    ends its process;
//! 3. never (T dies on the way, or never claims): there is nothing to wait for.
//!
//! A watcher may die anywhere in the fence: fenced stays fenced, the half-done slot gives `OwnerDied` to the next
//! watcher, which does the same again. Two watchers may fence one page at once: each waits for each slot in turn.
//!
//! The lock of a slot is the leaf of every lock order: a watcher holds one at a time and takes nothing under it.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::limits::WORKERS_MAX;
use crate::sys::liveness_map;
use crate::sys::memory::{Damaged, Memory};
use crate::sys::robust_mutex::{Acquired, LockError};

/// Number of slots of a page: one for each worker, and five for the main thread and its helpers.
pub const LIVENESS_SLOTS: usize = WORKERS_MAX + 5;
/// Slot of the main thread, whose death is the alarm.
pub const MAIN_SLOT: usize = 0;
/// Slot of worker 0; the others follow. The slots behind the last possible worker are for helper threads.
pub const FIRST_WORKER_SLOT: usize = 1;
/// First of the slots for helper threads.
pub const FIRST_HELPER_SLOT: usize = FIRST_WORKER_SLOT + WORKERS_MAX;

const _: () = assert!(FIRST_HELPER_SLOT < LIVENESS_SLOTS);

const STATE_UNUSED: u64 = 0;
const STATE_CLAIMED: u64 = 1;
const STATE_FENCED: u64 = 2;

/// Why a slot could not be claimed or watched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LivenessError {
    /// A peer has declared this process dead: it must end without touching anything shared.
    #[error("another process has taken over in the belief that this one is dead; this one must end")]
    Fenced,
    /// A living thread has the slot.
    #[error("liveness slot {0} is held by a living thread already; each thread needs its own")]
    Taken(usize),
    /// Nobody ever claimed the slot, so nobody's death can be awaited.
    #[error("no thread has claimed liveness slot {0}; wait until the server says it is ready")]
    NotClaimed(usize),
    /// The page has no such slot.
    #[error("the liveness page has no slot {index}; it has {LIVENESS_SLOTS}")]
    NoSuchSlot {
        /// The slot asked for.
        index: usize,
        /// Where it would lie.
        #[source]
        source: Damaged,
    },
    /// The lock of a slot is damaged.
    #[error("the liveness page is damaged")]
    Lock(#[from] LockError),
}

/// The page; a clone is the same page.
#[derive(Clone)]
pub struct LivenessPage {
    memory: Arc<Memory>,
    fd: Arc<OwnedFd>,
}

/// Proof that the thread it was given to holds its liveness slot. The slot stays held when this is dropped: only
/// the thread's death releases it.
#[derive(Debug)]
pub struct LivenessHold {
    index: usize,
    // A proof about one thread is worth nothing in another.
    not_send: PhantomData<*const ()>,
}

impl LivenessHold {
    /// The slot held.
    pub fn index(&self) -> usize {
        self.index
    }
}

impl std::fmt::Debug for LivenessPage {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("LivenessPage").field("fd", &self.fd).finish_non_exhaustive()
    }
}

impl AsFd for LivenessPage {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl LivenessPage {
    /// Makes a page for a new incarnation.
    ///
    /// # Errors
    /// What the kernel says when it has no memory or descriptor left.
    pub fn create() -> io::Result<Self> {
        let (fd, memory) = liveness_map::create(LIVENESS_SLOTS)?;
        Ok(Self { memory: Arc::new(memory), fd: Arc::new(fd) })
    }

    /// Maps the page a peer made.
    ///
    /// # Errors
    /// `InvalidData` when it is none; else what the kernel says.
    pub fn attach(fd: OwnedFd) -> io::Result<Self> {
        let memory = liveness_map::attach(&fd, LIVENESS_SLOTS)?;
        Ok(Self { memory: Arc::new(memory), fd: Arc::new(fd) })
    }

    /// Declares the calling thread alive in slot `index` until it dies. To be called before the thread touches
    /// the segment or a client's socket. The slot of a thread that has ended may be claimed again.
    ///
    /// # Errors
    /// [`LivenessError::Fenced`]: the process must end, touching nothing. [`LivenessError::Taken`]: a mistake.
    pub fn claim(&self, index: usize) -> Result<LivenessHold, LivenessError> {
        let slot = self.slot(index)?;
        // Under the lock a watcher does nothing but look and mark, so it is soon free; a thread keeps it for good.
        let acquired = loop {
            match slot.mutex.try_lock()? {
                Some(acquired) => break acquired,
                None if slot.state.load() == STATE_CLAIMED => return Err(LivenessError::Taken(index)),
                None => std::thread::yield_now(),
            }
        };
        let (Acquired::Clean(mut guard) | Acquired::OwnerDied(mut guard)) = acquired;
        // Before anything else, so that no way out of here leaves the lock unusable.
        guard.mark_consistent();
        if slot.state.load() == STATE_FENCED {
            return Err(LivenessError::Fenced);
        }
        self.memory.store(&slot.state, STATE_CLAIMED);
        std::mem::forget(guard);
        // The kernel finds the lock by its address when the thread dies: this process never unmaps the page.
        std::mem::forget(Arc::clone(&self.memory));
        Ok(LivenessHold { index, not_send: PhantomData })
    }

    /// Waits until the thread that claimed slot `index` is dead. Returns at once if it is already.
    ///
    /// # Errors
    /// [`LivenessError::NotClaimed`] when nobody has claimed it yet: wait for the server's word that it is ready
    /// first, and watch the process itself until then.
    pub fn await_death(&self, index: usize) -> Result<(), LivenessError> {
        let slot = self.slot(index)?;
        match slot.mutex.lock()? {
            Acquired::Clean(_) if slot.state.load() == STATE_UNUSED => Err(LivenessError::NotClaimed(index)),
            // Free and claimed: its owner died, and a watcher that looked earlier has freed the lock.
            Acquired::Clean(_) => Ok(()),
            Acquired::OwnerDied(mut guard) => {
                guard.mark_consistent();
                Ok(())
            }
        }
    }

    /// Waits until every thread that ever claimed a slot is dead, and keeps all others from claiming one: the
    /// fence. Kill the process first; this waits for as long as one of its threads lives.
    ///
    /// # Errors
    /// When a slot's lock is damaged: then only the process's exit status proves its death.
    pub fn await_all_dead(&self) -> Result<(), LivenessError> {
        for index in 0..LIVENESS_SLOTS {
            let slot = self.slot(index)?;
            let (Acquired::Clean(mut guard) | Acquired::OwnerDied(mut guard)) = slot.mutex.lock()?;
            self.memory.store(&slot.state, STATE_FENCED);
            guard.mark_consistent();
        }
        Ok(())
    }

    fn slot(&self, index: usize) -> Result<&liveness_map::LivenessSlot, LivenessError> {
        liveness_map::slot(&self.memory, index).map_err(|source| LivenessError::NoSuchSlot { index, source })
    }
}

#[cfg(all(test, not(miri), not(feature = "shuttle")))]
mod tests {
    //! Goal: no death is missed and none invented. Method: threads that end, since the kernel treats the end of a
    //! thread and the death of a process alike; real kills are in `sys::robust_mutex` and the workspace's tests.

    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    /// A thread that holds slot `index` until told to end.
    fn holder(page: &LivenessPage, index: usize) -> (mpsc::Sender<()>, std::thread::JoinHandle<()>) {
        let (tell, told) = mpsc::channel::<()>();
        let (ready, claimed) = mpsc::channel();
        let page = page.clone();
        let thread = std::thread::spawn(move || {
            let hold = page.claim(index).expect("a free slot");
            ready.send(hold.index()).expect("the test waits");
            let _ = told.recv();
        });
        assert_eq!(claimed.recv(), Ok(index));
        (tell, thread)
    }

    fn both_ends() -> (LivenessPage, LivenessPage) {
        let watcher = LivenessPage::create().expect("a page");
        let fd = watcher.as_fd().try_clone_to_owned().expect("a descriptor");
        (watcher, LivenessPage::attach(fd).expect("attach"))
    }

    #[test]
    fn liveness_fence_waits_for_every_thread() {
        let (watcher, server) = both_ends();
        let (end_main, main) = holder(&server, MAIN_SLOT);
        let (end_worker, worker) = holder(&server, FIRST_WORKER_SLOT + 3);
        let watching = std::thread::spawn(move || {
            watcher.await_death(MAIN_SLOT).expect("the alarm");
            watcher.await_death(MAIN_SLOT).expect("still dead");
            watcher.await_all_dead().expect("the fence");
        });
        drop(end_main);
        main.join().expect("main");
        std::thread::sleep(Duration::from_millis(20));
        assert!(!watching.is_finished(), "the worker is alive");
        drop(end_worker);
        worker.join().expect("worker");
        watching.join().expect("the watcher");
    }

    #[test]
    fn liveness_claim_after_the_fence_is_refused() {
        let (watcher, server) = both_ends();
        watcher.await_all_dead().expect("nobody lives");
        assert!(matches!(server.claim(MAIN_SLOT), Err(LivenessError::Fenced)));
        assert!(matches!(server.claim(FIRST_HELPER_SLOT), Err(LivenessError::Fenced)));
        watcher.await_all_dead().expect("twice changes nothing");
    }

    #[test]
    fn liveness_slot_of_an_ended_thread_can_be_claimed_again_a_held_one_not() {
        let (watcher, server) = both_ends();
        assert!(matches!(watcher.await_death(5), Err(LivenessError::NotClaimed(5))));
        let (end, thread) = holder(&server, 5);
        assert!(matches!(server.claim(5), Err(LivenessError::Taken(5))));
        drop(end);
        thread.join().expect("thread");
        drop(holder(&server, 5));
        assert!(matches!(server.claim(LIVENESS_SLOTS), Err(LivenessError::NoSuchSlot { .. })));
    }

    #[test]
    fn liveness_page_that_is_none_is_refused() {
        let file = tempfile::tempfile().expect("a file");
        assert!(LivenessPage::attach(file.into()).is_err());
    }
}
