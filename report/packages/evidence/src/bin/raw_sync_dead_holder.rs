//! Whether a `raw_sync` mutex can be taken after its holder was killed.
//!
//! Method: a second process takes the mutex in shared memory and is killed with SIGKILL while it holds it; a third one
//! then locks, and is given five seconds. Repeated, because once proves little.

use std::time::{Duration, Instant};

use kvs_package_evidence::{kill_self, play, role, wait_or_kill};
use raw_sync::locks::{LockInit, Mutex};
use shared_memory::{Shmem, ShmemConf};

const TRIALS: usize = 10;
const PATIENCE: Duration = Duration::from_secs(5);

fn main() {
    match role() {
        Some((role, name)) => lock(&name, role == "hold"),
        None => report(),
    }
}

fn report() {
    let blocked = (0..TRIALS).filter(|trial| blocks_after_kill(*trial)).count();
    println!(
        "raw_sync 0.1.5: {blocked} of {TRIALS} lockers still blocked {PATIENCE:?} after the holder's SIGKILL"
    );
    println!(
        "control, nobody killed: {}",
        if blocks(&fresh_mutex("control")) { "blocked" } else { "locked at once" }
    );
}

fn blocks_after_kill(trial: usize) -> bool {
    let segment = fresh_mutex(&trial.to_string());
    let mut holder = play("hold", segment.get_os_id()).expect("start holder");
    wait_or_kill(&mut holder, PATIENCE).expect("wait").expect("holder hangs");
    blocks(&segment)
}

fn blocks(segment: &Shmem) -> bool {
    let start = Instant::now();
    let mut locker = play("lock", segment.get_os_id()).expect("start locker");
    let status = wait_or_kill(&mut locker, PATIENCE).expect("wait");
    assert!(status.is_none_or(|status| status.success()), "locker failed after {:?}", start.elapsed());
    status.is_none()
}

fn fresh_mutex(trial: &str) -> Shmem {
    let name = format!("kvs-evidence-{}-{trial}", std::process::id());
    let segment = ShmemConf::new().os_id(name).size(4096).create().expect("create segment");
    // SAFETY: the segment is mapped, larger than the lock and page-aligned; no other process has it yet.
    let (mutex, _) = unsafe { Mutex::new(segment.as_ptr(), segment.as_ptr().add(2048)) }.expect("init mutex");
    drop(mutex);
    segment
}

fn lock(name: &str, then_die: bool) {
    let segment = ShmemConf::new().os_id(name).open().expect("open segment");
    // SAFETY: the segment is mapped and holds a mutex that `fresh_mutex` made there.
    let (mutex, _) =
        unsafe { Mutex::from_existing(segment.as_ptr(), segment.as_ptr().add(2048)) }.expect("open mutex");
    let guard = mutex.lock().expect("lock");
    if then_die {
        kill_self();
    }
    drop(guard);
}
