//! What a robust `pthread_mutex` costs, and what it says after its holder was killed.
//!
//! Method: lock and unlock, uncontended, in rounds of a million, against a plain mutex in private memory; then a second
//! process takes the mutex in shared memory and is killed holding it, a hundred times.

use std::mem::MaybeUninit;
use std::time::{Duration, Instant};

use kvs_package_evidence::{kill_self, nanoseconds_each, play, role, wait_or_kill};
use rustix::fs::{Mode, ftruncate};
use rustix::mm::{MapFlags, ProtFlags, mmap};
use rustix::shm;

const KILLS: usize = 100;

fn main() {
    match role() {
        Some((_, name)) => {
            lock(open(&name, shm::OFlags::RDWR));
            kill_self();
        }
        None => report(),
    }
}

fn report() {
    let name = format!("kvs-evidence-{}-robust", std::process::id());
    let mutex = open(&name, shm::OFlags::CREATE | shm::OFlags::EXCL | shm::OFlags::RDWR);
    initialize(mutex);
    measure(mutex);
    let answers = (0..KILLS).map(|_| lock_after_kill(mutex, &name)).collect::<Vec<_>>();
    shm::unlink(&name).expect("remove segment");
    let told = answers.iter().filter(|(answer, _)| *answer == libc::EOWNERDEAD).count();
    let mut times = answers.iter().map(|(_, time)| *time).collect::<Vec<_>>();
    times.sort();
    println!("EOWNERDEAD in {told} of {KILLS} kills; lock + repair + unlock, median {:?}", times[KILLS / 2]);
}

fn measure(mutex: *mut libc::pthread_mutex_t) {
    let robust = nanoseconds_each(15, 1_000_000, |count| (0..count).for_each(|_| unlock_after(mutex)));
    println!("robust, process-shared: lock + unlock {robust}");
    let plain = std::sync::Mutex::new(0u64);
    let futex = nanoseconds_each(15, 1_000_000, |count| {
        (0..count).for_each(|_| *std::hint::black_box(&plain).lock().expect("lock") += 1)
    });
    println!("std::sync::Mutex:       lock + unlock {futex}");
}

fn unlock_after(mutex: *mut libc::pthread_mutex_t) {
    lock(mutex);
    unlock(mutex);
}

fn lock_after_kill(mutex: *mut libc::pthread_mutex_t, name: &str) -> (i32, Duration) {
    let mut holder = play("hold", name).expect("start holder");
    wait_or_kill(&mut holder, Duration::from_secs(5)).expect("wait").expect("holder hangs");
    let start = Instant::now();
    let answer = lock(mutex);
    if answer == libc::EOWNERDEAD {
        // SAFETY: the mutex lives as long as the mapping, and this thread holds it.
        unsafe { libc::pthread_mutex_consistent(mutex) };
    }
    unlock(mutex);
    (answer, start.elapsed())
}

fn lock(mutex: *mut libc::pthread_mutex_t) -> i32 {
    // SAFETY: the mutex is initialized and mapped until the process ends.
    unsafe { libc::pthread_mutex_lock(mutex) }
}

fn unlock(mutex: *mut libc::pthread_mutex_t) {
    // SAFETY: the mutex is initialized, mapped until the process ends, and held by this thread.
    unsafe { libc::pthread_mutex_unlock(mutex) };
}

fn open(name: &str, flags: shm::OFlags) -> *mut libc::pthread_mutex_t {
    let segment = shm::open(name, flags, Mode::RUSR | Mode::WUSR).expect("open segment");
    ftruncate(&segment, 4096).expect("set length");
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice; it is never unmapped.
    unsafe { mmap(std::ptr::null_mut(), 4096, protection, MapFlags::SHARED, &segment, 0) }
        .expect("map")
        .cast()
}

fn initialize(mutex: *mut libc::pthread_mutex_t) {
    let mut attributes = MaybeUninit::uninit();
    // SAFETY: `attributes` is initialized before use and destroyed after; `mutex` is mapped and not yet in use.
    unsafe {
        libc::pthread_mutexattr_init(attributes.as_mut_ptr());
        libc::pthread_mutexattr_setpshared(attributes.as_mut_ptr(), libc::PTHREAD_PROCESS_SHARED);
        libc::pthread_mutexattr_setrobust(attributes.as_mut_ptr(), libc::PTHREAD_MUTEX_ROBUST);
        libc::pthread_mutex_init(mutex, attributes.as_ptr());
        libc::pthread_mutexattr_destroy(attributes.as_mut_ptr());
    }
}
