//! The process-shared lock that tells when its owner died.
//!
//! A [`RobustMutex`] overlays 64 bytes of shared memory and holds a pthread mutex there (`PROCESS_SHARED`,
//! `ROBUST`). Whoever locks it after its owner died, in any process, gets [`Acquired::OwnerDied`]: the lock is
//! held, what it guards may be half changed, and the holder repairs that before it says
//! [`RobustMutexGuard::mark_consistent`].
//!
//! Invariants
//! - A guard stays on the thread that locked: ownership is a thread id, so the guard is not `Send`.
//! - The memory outlives every holder. Unmapping it while a thread holds the lock, then dying, leaves it locked
//!   for ever: the kernel finds held locks by their address in the dying thread.
//! - A thread holds at most [`HELD_MAX`] robust locks: the kernel walks no further when the thread dies.
//! - The bytes depend on the C library (its kind and version): a segment is only shared between processes with
//!   the same one, which the segment's layout hash enforces.
//!
//! A crash in here
//! 1. before the owner's thread id is stored in the lock word: the lock is free, nothing happened;
//! 2. between that and the return of `lock`: the C library announces the lock to the kernel first
//!    (`list_op_pending`), so the next locker gets `OwnerDied`;
//! 3. while held: `OwnerDied`, also for a waiter that sleeps already, woken by the kernel as the thread exits and
//!    before it tears the address space down;
//! 4. inside unlock, before the word is cleared: `OwnerDied` although the guarded state is whole, so repairing
//!    must be harmless when there is nothing to repair. After it: the lock is free, and the kernel wakes a waiter;
//! 5. of a repairer, before `mark_consistent`: `OwnerDied` again for the next.
//!
//! Under miri, which knows no robust locks, a plain spin lock takes the place of the pthread mutex; under the
//! model checker (feature `shuttle`) waiting is a loop that lets other tasks run.
#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::io;
use std::marker::PhantomData;

use super::memory::Shared;

/// Most robust locks a thread may hold at once: the kernel's `ROBUST_LIST_LIMIT`. Those beyond it would stay
/// locked for ever after a crash.
pub const HELD_MAX: usize = 2048;

/// Size of a [`RobustMutex`], in bytes: one cache line, more than any C library needs.
pub const ROBUST_MUTEX_BYTES: usize = 64;

/// A lock in shared memory. It is never constructed or moved: it overlays memory and is made valid by
/// [`RobustMutex::initialize`].
#[repr(C, align(64))]
pub struct RobustMutex {
    bytes: UnsafeCell<[u64; ROBUST_MUTEX_BYTES / 8]>,
}

const _: () = assert!(size_of::<RobustMutex>() == ROBUST_MUTEX_BYTES);
const _: () = assert!(align_of::<RobustMutex>() == ROBUST_MUTEX_BYTES);
const _: () = assert!(size_of::<libc::pthread_mutex_t>() <= ROBUST_MUTEX_BYTES);
const _: () = assert!(align_of::<libc::pthread_mutex_t>() <= ROBUST_MUTEX_BYTES);

// SAFETY: plain bytes, every pattern allowed; after `initialize` only the C library's lock functions change them.
unsafe impl Shared for RobustMutex {}
// SAFETY: a lock may be used from any thread; its bytes are only reached through the lock functions.
unsafe impl Send for RobustMutex {}
// SAFETY: as above.
unsafe impl Sync for RobustMutex {}

/// How the lock was acquired.
#[must_use = "dropping it unlocks at once, and an owner's death would be lost"]
#[derive(Debug)]
pub enum Acquired<'a> {
    /// Its last owner unlocked it in order.
    Clean(RobustMutexGuard<'a>),
    /// Its last owner died holding it: repair what it guards, then [`RobustMutexGuard::mark_consistent`].
    /// Dropping the guard without that makes the lock unusable, for every process and for good.
    OwnerDied(RobustMutexGuard<'a>),
}

/// Why the lock was not acquired.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LockError {
    /// Someone gave up repairing: unlocked after an owner's death without marking it consistent.
    #[error(
        "a lock in shared memory is out of use, because repairing what it guards failed after a crash; \
         restart the data server, and if that does not help run `kvs-tools check`"
    )]
    NotRecoverable,
    /// The C library refused: the lock's bytes are damaged or were never initialised.
    #[error("a lock in shared memory is damaged (error {0}); run `kvs-tools check` to see what else is")]
    Os(i32),
}

/// Holds the lock until it is dropped.
#[derive(Debug)]
pub struct RobustMutexGuard<'a> {
    mutex: &'a RobustMutex,
    inconsistent: bool,
    // The owner is the thread: another one cannot unlock.
    not_send: PhantomData<*const ()>,
}

impl std::fmt::Debug for RobustMutex {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("RobustMutex").finish_non_exhaustive()
    }
}

impl RobustMutex {
    /// Makes the bytes a free lock.
    ///
    /// # Safety
    /// Nobody holds the lock or waits for it, and nobody starts to until this returns: the memory is new and not
    /// yet shown to anyone, or every thread that ever used it is proven dead.
    ///
    /// # Errors
    /// When the kernel has no robust locks, or the C library no memory; the bytes are no lock then.
    pub unsafe fn initialize(&self) -> io::Result<()> {
        // SAFETY: nobody else uses the bytes, by the caller's contract.
        unsafe { *self.bytes.get() = [0; ROBUST_MUTEX_BYTES / 8] };
        // SAFETY: as above, and the bytes are large enough and aligned, asserted above.
        match unsafe { raw::initialize(self.raw()) } {
            0 => Ok(()),
            status => Err(io::Error::from_raw_os_error(status)),
        }
    }

    /// Locks, waiting for as long as a living owner holds it.
    ///
    /// # Errors
    /// [`LockError`]; the lock is not held then.
    #[inline]
    pub fn lock(&self) -> Result<Acquired<'_>, LockError> {
        #[cfg(feature = "shuttle")]
        loop {
            if let Some(acquired) = self.try_lock()? {
                return Ok(acquired);
            }
            shuttle::thread::yield_now();
        }
        #[cfg(not(feature = "shuttle"))]
        {
            // SAFETY: the bytes are a lock since `initialize`, or the C library refuses them.
            self.acquired(unsafe { raw::lock(self.raw()) })
        }
    }

    /// Locks if nobody alive holds it; `None` when somebody does.
    ///
    /// # Errors
    /// [`LockError`]; the lock is not held then.
    #[inline]
    pub fn try_lock(&self) -> Result<Option<Acquired<'_>>, LockError> {
        // SAFETY: the bytes are a lock since `initialize`, or the C library refuses them.
        match unsafe { raw::try_lock(self.raw()) } {
            libc::EBUSY => Ok(None),
            status => self.acquired(status).map(Some),
        }
    }

    #[inline]
    fn acquired(&self, status: libc::c_int) -> Result<Acquired<'_>, LockError> {
        match status {
            0 => Ok(Acquired::Clean(self.guard(false))),
            libc::EOWNERDEAD => Ok(Acquired::OwnerDied(self.guard(true))),
            libc::ENOTRECOVERABLE => Err(LockError::NotRecoverable),
            other => Err(LockError::Os(other)),
        }
    }

    #[inline]
    fn guard(&self, inconsistent: bool) -> RobustMutexGuard<'_> {
        RobustMutexGuard { mutex: self, inconsistent, not_send: PhantomData }
    }

    #[inline]
    fn raw(&self) -> *mut libc::pthread_mutex_t {
        self.bytes.get().cast()
    }
}

impl RobustMutexGuard<'_> {
    /// Says that what the lock guards is whole again, so that unlocking leaves an ordinary free lock. Does
    /// nothing when the last owner did not die.
    #[inline]
    pub fn mark_consistent(&mut self) {
        if self.inconsistent {
            // SAFETY: this thread holds the lock, and the lock is in the state this call is for.
            let status = unsafe { raw::mark_consistent(self.mutex.raw()) };
            debug_assert_eq!(status, 0, "an inconsistent lock held by this thread can be marked");
            self.inconsistent = false;
        }
    }
}

impl Drop for RobustMutexGuard<'_> {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: this thread holds the lock: the guard was made by locking and cannot leave the thread.
        let status = unsafe { raw::unlock(self.mutex.raw()) };
        debug_assert_eq!(status, 0, "a lock held by this thread can be unlocked");
    }
}

/// The C library's robust mutex.
#[cfg(not(miri))]
mod raw {
    use std::mem::MaybeUninit;

    pub(super) use libc::{
        pthread_mutex_consistent as mark_consistent, pthread_mutex_trylock as try_lock,
        pthread_mutex_unlock as unlock,
    };

    #[cfg(not(feature = "shuttle"))]
    pub(super) use libc::pthread_mutex_lock as lock;

    /// # Safety
    /// `mutex` points to memory for a mutex that nobody uses.
    pub(super) unsafe fn initialize(mutex: *mut libc::pthread_mutex_t) -> libc::c_int {
        let mut attributes = MaybeUninit::<libc::pthread_mutexattr_t>::uninit();
        let attributes = attributes.as_mut_ptr();
        // SAFETY: `attributes` is initialised by the first call, used by the others and destroyed by the last;
        // `mutex` is the caller's.
        unsafe {
            let status = libc::pthread_mutexattr_init(attributes);
            if status != 0 {
                return status;
            }
            let statuses = [
                libc::pthread_mutexattr_setpshared(attributes, libc::PTHREAD_PROCESS_SHARED),
                libc::pthread_mutexattr_setrobust(attributes, libc::PTHREAD_MUTEX_ROBUST),
                libc::pthread_mutex_init(mutex, attributes),
            ];
            libc::pthread_mutexattr_destroy(attributes);
            statuses.into_iter().find(|status| *status != 0).unwrap_or(0)
        }
    }
}

/// A spin lock in the first four bytes, for miri.
#[cfg(miri)]
mod raw {
    use std::sync::atomic::{AtomicU32, Ordering};

    /// # Safety
    /// `mutex` points to a lock that lives for `'a`.
    unsafe fn word<'a>(mutex: *mut libc::pthread_mutex_t) -> &'a AtomicU32 {
        // SAFETY: large enough and aligned, asserted above; only ever reached as this atomic.
        unsafe { &*mutex.cast::<AtomicU32>() }
    }

    pub(super) unsafe fn initialize(_mutex: *mut libc::pthread_mutex_t) -> libc::c_int {
        0
    }

    pub(super) unsafe fn try_lock(mutex: *mut libc::pthread_mutex_t) -> libc::c_int {
        // SAFETY: the caller's.
        let taken = unsafe { word(mutex) }.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed);
        taken.map_or(libc::EBUSY, |_| 0)
    }

    #[cfg(not(feature = "shuttle"))]
    pub(super) unsafe fn lock(mutex: *mut libc::pthread_mutex_t) -> libc::c_int {
        // SAFETY: the caller's.
        while unsafe { try_lock(mutex) } != 0 {
            std::thread::yield_now();
        }
        0
    }

    pub(super) unsafe fn unlock(mutex: *mut libc::pthread_mutex_t) -> libc::c_int {
        // SAFETY: the caller's.
        unsafe { word(mutex) }.store(0, Ordering::Release);
        0
    }

    pub(super) unsafe fn mark_consistent(_mutex: *mut libc::pthread_mutex_t) -> libc::c_int {
        0
    }
}

#[cfg(all(test, not(miri), not(feature = "shuttle")))]
mod tests {
    //! Goal: an owner's death is always told, whoever it was. Method: real processes, killed with SIGKILL while
    //! they hold a lock in memory shared with the test.

    use std::os::fd::OwnedFd;

    use rustix::mm::{MapFlags, ProtFlags};

    use super::*;

    /// A page shared with children; leaked, because unmapping it under a holder is what must never happen.
    fn shared_mutex() -> &'static RobustMutex {
        // SAFETY: a new anonymous mapping; it is never unmapped.
        let mutex = unsafe {
            let page = rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                4096,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
            )
            .expect("a page");
            &*page.cast::<RobustMutex>()
        };
        // SAFETY: the memory is new.
        unsafe { mutex.initialize() }.expect("a lock");
        mutex
    }

    /// A forked child that runs `child`, tells, and waits to be killed.
    struct Child(libc::pid_t);

    impl Child {
        fn run(child: impl FnOnce()) -> Self {
            let (ready, tell): (OwnedFd, OwnedFd) = rustix::pipe::pipe().expect("a pipe");
            // SAFETY: the child only locks, writes to a pipe and pauses.
            let pid = unsafe { libc::fork() };
            assert!(pid >= 0, "fork");
            if pid == 0 {
                child();
                let _ = rustix::io::write(&tell, b"x");
                loop {
                    // SAFETY: waits for a signal.
                    unsafe { libc::pause() };
                }
            }
            let mut byte = [0];
            assert_eq!(rustix::io::read(&ready, &mut byte), Ok(1));
            Self(pid)
        }

        fn kill(self) {
            let mut status = 0;
            // SAFETY: a child of this test, not reaped yet.
            unsafe {
                assert_eq!(libc::kill(self.0, libc::SIGKILL), 0);
                assert_eq!(libc::waitpid(self.0, &raw mut status, 0), self.0);
            }
        }
    }

    fn lock_and_keep(mutex: &RobustMutex) {
        std::mem::forget(mutex.lock());
    }

    #[test]
    fn robust_mutex_unlocked_in_order_is_clean() {
        let mutex = shared_mutex();
        for _ in 0..3 {
            assert!(matches!(mutex.lock(), Ok(Acquired::Clean(_))));
        }
    }

    #[test]
    fn robust_mutex_held_is_not_acquired_by_try_lock_even_by_its_owner() {
        let mutex = shared_mutex();
        let guard = mutex.lock().expect("free");
        assert!(matches!(mutex.try_lock(), Ok(None)));
        std::thread::scope(|scope| {
            scope.spawn(|| assert!(matches!(mutex.try_lock(), Ok(None))));
        });
        drop(guard);
        assert!(matches!(mutex.try_lock(), Ok(Some(Acquired::Clean(_)))));
    }

    #[test]
    fn robust_mutex_owner_killed_gives_owner_died_then_clean() {
        let mutex = shared_mutex();
        Child::run(|| lock_and_keep(mutex)).kill();
        match mutex.lock() {
            Ok(Acquired::OwnerDied(mut guard)) => guard.mark_consistent(),
            other => panic!("{other:?}"),
        }
        assert!(matches!(mutex.lock(), Ok(Acquired::Clean(_))));
    }

    #[test]
    fn robust_mutex_owner_killed_wakes_a_waiter() {
        let mutex = shared_mutex();
        let child = Child::run(|| lock_and_keep(mutex));
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| {
                let acquired = mutex.lock();
                let died = matches!(acquired, Ok(Acquired::OwnerDied(_)));
                std::mem::forget(acquired);
                died
            });
            std::thread::sleep(std::time::Duration::from_millis(20));
            assert!(!waiter.is_finished());
            child.kill();
            assert!(waiter.join().expect("the waiter"));
        });
    }

    #[test]
    fn robust_mutex_repairer_killed_gives_owner_died_again() {
        let mutex = shared_mutex();
        Child::run(|| lock_and_keep(mutex)).kill();
        Child::run(|| lock_and_keep(mutex)).kill();
        assert!(matches!(mutex.lock(), Ok(Acquired::OwnerDied(_))));
    }

    #[test]
    fn robust_mutex_not_marked_consistent_is_not_recoverable_until_initialised() {
        let mutex = shared_mutex();
        Child::run(|| lock_and_keep(mutex)).kill();
        drop(mutex.lock());
        assert!(matches!(mutex.lock(), Err(LockError::NotRecoverable)));
        assert!(matches!(mutex.try_lock(), Err(LockError::NotRecoverable)));
        // SAFETY: the only owner is dead and nobody waits.
        unsafe { mutex.initialize() }.expect("a lock");
        assert!(matches!(mutex.lock(), Ok(Acquired::Clean(_))));
    }
}
