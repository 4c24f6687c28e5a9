//! One thread that sees to the memory ahead of need, so that no request waits for the kernel: reserves it, and makes huge pages of it.
//!
//! A huge page can be made of small ones at any time, but whoever touches one of them meanwhile waits until it is copied, for a
//! millisecond or, where the machine is a virtual one, several. So it is done where nobody is:
//!
//! - **before**: an extent is made huge when it is reserved, while nobody knows of it, and in a large store one further ahead;
//! - **later**: what was in use before it could be made huge (the first extents, buckets, a segment of another data server) when
//!   no worker has had anything to do for a while, one page at a time; and in a store that is never idle one page a second: requests
//!   wait once for it, while small pages cost every request, and a millisecond for every five thousand of them when a data server dies.
//!
//! Where the kernel refuses, pages stay small.

use std::collections::HashSet;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

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
/// Extents are prepared from this much memory on: less would be felt in a small store's memory, and small pages wouldn't in its speed.
const PREPARED_FROM_BYTES: u64 = 128 << 20;
/// How far ahead of the one that is added next an extent is prepared: nobody gets there before that is done.
const AHEAD: u64 = 1;
/// The workers have nothing to do when they had nothing for so long.
const QUIET: Duration = Duration::from_millis(100);
/// Pause between two pages that are made huge although requests are served.
const BUSY_PAUSE: Duration = Duration::from_secs(1);
/// That doesn't begin before this data server has served for so long: those who waited for it go first.
const BUSY_FROM: Duration = Duration::from_secs(10);
/// A page for which the kernel needed less was huge already.
const COPY_MIN: Duration = Duration::from_micros(100);
/// Pause between two searches for pages that could be huge.
const SEARCH_PAUSE: Duration = Duration::from_secs(1);
/// Refusals of the kernel after which pages stay as they are for [`REFUSED_PAUSE`].
const REFUSALS_MAX: u32 = 16;
/// How long that is.
const REFUSED_PAUSE: Duration = Duration::from_secs(60);

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
            let _alive = shared.enter(FIRST_HELPER_SLOT);
            let Ok(slot) = shared.segment.memory().object(offset) else { std::process::abort() };
            let mut pages = HugePages::new(&shared);
            let mut pause = PAUSE_MAX;
            while stopped.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
                let busy = [reserve(&mut pages, slot), pages.prepare(), pages.improve()].contains(&true);
                pause = if busy { PAUSE_MIN } else { (pause * 2).min(PAUSE_MAX) };
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
fn reserve(pages: &mut HugePages<'_>, slot: &WorkerSlot) -> bool {
    let shared = pages.shared;
    let prepare = |offset| _ = !pages.rests() && pages.collapse(offset);
    match extents::reserve_ahead(&shared.segment, slot, SPARE_ORDER, prepare) {
        Ok(reserved) => reserved,
        // Whoever needs memory now is told so.
        Err(AllocateError::OutOfMemory(_)) => false,
        Err(error) => {
            log::error!("housekeeping: {error}");
            std::process::abort();
        }
    }
}

/// What is known about huge pages.
struct HugePages<'s> {
    shared: &'s Shared,
    /// The last extent that was prepared.
    prepared: Option<u64>,
    /// Those that are huge.
    done: HashSet<u64>,
    /// Those that are to become huge when nobody is served.
    pending: Vec<u64>,
    /// When those are looked for next.
    search_at: Instant,
    /// Refusals in a row.
    refusals: u32,
    /// The sum of all workers' turns when it changed last, and since when it is that.
    turns: u64,
    quiet_since: Instant,
    /// When the next page is made huge although requests are served.
    busy_at: Instant,
}

impl<'s> HugePages<'s> {
    fn new(shared: &'s Shared) -> Self {
        let now = Instant::now();
        Self {
            shared,
            prepared: None,
            done: HashSet::new(),
            pending: Vec::new(),
            search_at: now,
            refusals: 0,
            turns: 0,
            quiet_since: now,
            busy_at: now + BUSY_FROM,
        }
    }

    /// Prepares the extent after the next one; true when it did.
    fn prepare(&mut self) -> bool {
        let segment = &self.shared.segment;
        let Ok(header) = segment.header() else { return false };
        let wanted = header.extents_reserved.load() + AHEAD;
        let known = self.prepared.is_some_and(|prepared| prepared >= wanted);
        if known || segment.memory_bytes() < PREPARED_FROM_BYTES || self.rests() {
            return false;
        }
        let Ok(Some((extent, offset))) = extents::prepare_ahead(segment, AHEAD) else { return false };
        self.prepared = Some(extent);
        self.collapse(offset)
    }

    /// Makes a huge page of what is in use, if nobody is served or it is time; true when it may go on so.
    fn improve(&mut self) -> bool {
        let begun = Instant::now();
        if !(self.is_quiet() || self.busy_at <= begun) || self.rests() {
            return false;
        }
        if self.pending.is_empty() && self.search_at <= Instant::now() {
            self.search();
        }
        let Some(offset) = self.pending.pop() else { return false };
        self.collapse(offset);
        if begun.elapsed() > COPY_MIN {
            self.busy_at = Instant::now() + BUSY_PAUSE;
        }
        true
    }

    /// Whether the workers have had nothing to do for a while.
    fn is_quiet(&mut self) -> bool {
        let turns = self.shared.worker_slots().map(|slot| slot.turn.load());
        let (sum, busy) = turns.fold((0u64, false), |(sum, busy), turn| {
            // An odd one serves.
            (sum.wrapping_add(turn), busy || !turn.is_multiple_of(2))
        });
        if sum != std::mem::replace(&mut self.turns, sum) || busy {
            self.quiet_since = Instant::now();
        }
        self.quiet_since.elapsed() >= QUIET
    }

    /// Whether the kernel has refused so often that it is left alone for a while.
    fn rests(&mut self) -> bool {
        if self.refusals >= REFUSALS_MAX && self.search_at <= Instant::now() {
            self.refusals = 0;
        }
        self.refusals >= REFUSALS_MAX
    }

    fn search(&mut self) {
        self.search_at = Instant::now() + SEARCH_PAUSE;
        if let Ok(all) = self.shared.segment.huge_pages() {
            self.pending.extend(all.filter(|offset| !self.done.contains(offset)));
        }
    }

    /// True when the page is huge now.
    fn collapse(&mut self, offset: u64) -> bool {
        let Err(error) = self.shared.segment.collapse(offset) else {
            self.refusals = 0;
            return self.done.insert(offset);
        };
        self.refusals += 1;
        self.search_at = Instant::now() + REFUSED_PAUSE;
        if self.refusals == REFUSALS_MAX {
            self.pending.clear();
            log::debug!("pages stay small for {REFUSED_PAUSE:?}: the kernel makes no huge ones ({error})");
        }
        false
    }
}
