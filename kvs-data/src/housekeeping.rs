//! One thread that keeps memory reserved ahead of need, so that no request waits for the kernel to clear it.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;
use crossbeam_channel::{RecvTimeoutError, Sender};
use kvs_core::arena::extents::{self, AllocateError};
use kvs_core::liveness::FIRST_HELPER_SLOT;
use kvs_core::segment::layout::WorkerSlot;

use crate::shared::Shared;

/// A block of this order, 256 KiB, or larger shall always be free.
const SPARE_ORDER: usize = 6;
/// Pause while memory is being taken fast.
const PAUSE_MIN: Duration = Duration::from_millis(2);
/// Pause while nothing happens.
const PAUSE_MAX: Duration = Duration::from_millis(128);

/// The thread.
pub struct Housekeeping {
    stop: Sender<()>,
    thread: JoinHandle<()>,
}

impl Housekeeping {
    /// Starts it.
    ///
    /// # Errors
    /// When there is no memory for its slot or no thread to be had.
    pub fn start(shared: &Arc<Shared>) -> anyhow::Result<Self> {
        let (stop, stopped) = crossbeam_channel::bounded::<()>(0);
        let offset = shared.segment.claim_worker(shared.workers as u64)?;
        let shared = Arc::clone(shared);
        let thread = std::thread::Builder::new().name("housekeeping".into()).spawn(move || {
            let Ok(_alive) = shared.liveness.claim(FIRST_HELPER_SLOT) else { std::process::abort() };
            let Ok(slot) = shared.segment.memory().object(offset) else { std::process::abort() };
            let mut pause = PAUSE_MAX;
            while stopped.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
                pause = if reserve(&shared, slot) { PAUSE_MIN } else { (pause * 2).min(PAUSE_MAX) };
            }
        });
        Ok(Self { stop, thread: thread.context("can't start the housekeeping thread")? })
    }

    /// Ends it.
    pub fn stop(self) {
        drop(self.stop);
        // It ends by itself; a panic in it has aborted the process.
        let _ = self.thread.join();
    }
}

/// Reserves an extent if one is needed; true when it did.
fn reserve(shared: &Shared, slot: &WorkerSlot) -> bool {
    match extents::reserve_ahead(&shared.segment, slot, SPARE_ORDER) {
        Ok(reserved) => reserved,
        // Whoever needs memory now is told so.
        Err(AllocateError::OutOfMemory(_)) => false,
        Err(error) => {
            log::error!("housekeeping: {error}");
            std::process::abort();
        }
    }
}
