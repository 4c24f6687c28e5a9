//! Verification: every invariant of a segment, proven by walking all of it.
//!
//! The proof is one of ownership. Every block of the data region is claimed by whoever names it (the free bits, a slab, an
//! entry's chunks, a connection's buffer, a list); a block that is claimed twice, or by nobody, is a fault, and so is
//! whatever names what can't be. Counters and checksums are worked out anew and compared.
//!
//! | module | what it proves |
//! |---|---|
//! | [`blocks`] | each 4 KiB of the extents is free or owned by one thing; the free maps agree |
//! | [`slabs`] | each block of a slab is free or owned by one thing; the partial lists are whole |
//! | [`shards`] | every slot leads to a sound entry that a lookup finds; counters; no key twice |
//! | [`owners`] | what workers and connections name |
//! | `sessions` | sessions and connections agree, and results are where they belong |
//!
//! Invariants
//! - Nothing is trusted: any bytes at all give faults, not a crash or an endless loop. Each walk ends because a claim succeeds
//!   once only.
//! - Nothing is written. A segment that nobody serves is recovered in a private copy first, as the next data server would.
//!
//! Lock: none. A segment that is served changes while it is walked, so it is walked again, and what is not found each time was
//! a change, not a fault.

mod blocks;
mod owners;
mod sessions;
mod shards;
mod slabs;
#[cfg(all(test, not(miri), not(feature = "shuttle")))]
mod tests;

use std::path::Path;
use std::time::Duration;

use crate::segment::layout::{EXTENT_BYTES, Header, WorkerSlot};
use crate::segment::{Segment, SegmentError, SegmentView};
use crate::sys::memory::Damaged;
use crate::transaction::{self, Recovered};
use blocks::Blocks;
use slabs::Slabs;

/// Most faults that are told one by one.
pub const FAULTS_MAX: usize = 1000;
/// Walks over a segment that is served before what each of them found counts as a fault.
const WALKS_MAX: usize = 8;
/// Pause between two of them.
const WALK_PAUSE: Duration = Duration::from_millis(50);

/// What a verification came to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// The segment is being served, so faults that come and go are none.
    pub served: bool,
    /// Decided changes of dead workers that recovery will complete.
    pub intents: u64,
    /// Entries found.
    pub entries: u64,
    /// Bytes of their keys and values.
    pub content_bytes: u64,
    /// Extents of data memory.
    pub extents: u64,
    /// Connection slots in use.
    pub connections: u64,
    /// Sessions of clients, with a connection or without.
    pub sessions: u64,
    /// What is wrong, the first [`FAULTS_MAX`] of it.
    pub faults: Vec<String>,
    /// How much is wrong.
    pub fault_count: u64,
}

impl Report {
    fn fault(&mut self, what: impl Into<String>) {
        self.fault_count += 1;
        if self.faults.len() < FAULTS_MAX {
            self.faults.push(what.into());
        }
    }

    /// Notes the fault of a step that failed; None then.
    fn sound<T, E: ToString>(&mut self, step: Result<T, E>) -> Option<T> {
        step.map_err(|fault| self.fault(fault.to_string())).ok()
    }
}

/// Verifies the segment at `path`, server or not.
///
/// # Errors
/// Every way in which it can't be had at all: see [`SegmentError`].
pub fn check(path: &Path) -> Result<Report, SegmentError> {
    let (copy, served) = Segment::open_private_copy(path)?;
    if !served {
        return Ok(check_copy(&copy)?);
    }
    drop(copy);
    let view = SegmentView::open(path)?;
    let mut report = check_view(&view)?;
    for _ in 1..WALKS_MAX {
        if report.fault_count == 0 {
            break;
        }
        std::thread::sleep(WALK_PAUSE);
        let mut again = check_view(&view)?;
        again.faults.retain(|fault| report.faults.contains(fault));
        again.fault_count = again.faults.len() as u64;
        report = again;
    }
    report.served = true;
    Ok(report)
}

/// Recovers `copy`, which is this process's own, as a data server would, and verifies it.
///
/// # Errors
/// [`Damaged`] when the header lies outside.
pub fn check_copy(copy: &Segment) -> Result<Report, Damaged> {
    let mut recovery = Report::default();
    for index in 0..copy.header()?.worker_slots_reserved.load().min(crate::limits::WORKERS_MAX as u64) {
        let slot: &WorkerSlot = copy.memory().object(copy.regions().worker(index))?;
        match transaction::recover(copy.memory(), slot)? {
            Recovered::Nothing => {}
            Recovered::Completed(_) => recovery.intents += 1,
            Recovered::Damaged => recovery.fault(format!("worker {index}: its log contradicts itself")),
        }
    }
    let mut report = check_view(&SegmentView::of(copy))?;
    report.intents = recovery.intents;
    report.fault_count += recovery.fault_count;
    report.faults.splice(0..0, recovery.faults);
    Ok(report)
}

/// Verifies what `view` shows, whatever it is.
///
/// # Errors
/// [`Damaged`] when the header lies outside.
pub fn check_view(view: &SegmentView) -> Result<Report, Damaged> {
    let header = view.header()?;
    let mut report = Report::default();
    let regions = view.regions();
    let extents = header.extents_reserved.load();
    if extents > regions.extent_count {
        report.fault(format!(
            "header: {extents} extents are said to be reserved, of {} that can be",
            regions.extent_count
        ));
        return Ok(report);
    }
    report.extents = extents;
    let mut walk = Walk {
        view,
        report,
        blocks: Blocks::new(regions, extents),
        slabs: Slabs::default(),
        key: Vec::new(),
    };
    walk.free_blocks()?;
    walk.partial_lists()?;
    let buckets_bytes = walk.shards()?;
    walk.workers(header)?;
    walk.connections(header)?;
    walk.sessions(header)?;
    walk.finish_slabs()?;
    walk.finish_blocks();
    let reserved = buckets_bytes.saturating_add(regions.workers + extents * EXTENT_BYTES);
    if header.reserved_bytes.load() != reserved {
        walk.report.fault(format!(
            "header: {} bytes are said to be reserved, {reserved} are",
            header.reserved_bytes.load()
        ));
    }
    Ok(walk.report)
}

/// One walk over a segment.
struct Walk<'v> {
    view: &'v SegmentView,
    report: Report,
    blocks: Blocks,
    slabs: Slabs,
    /// The key that is being looked at.
    key: Vec<u8>,
}

/// A count that a damaged header may say is anything, cut to what there can be.
fn bounded(report: &mut Report, what: &str, count: u64, most: u64) -> u64 {
    if count > most {
        report.fault(format!("header: {count} {what} are said to be reserved, of {most} that can be"));
    }
    count.min(most)
}

/// Says what is wrong with something in memory.
fn outside(what: &str) -> impl Fn(Damaged) -> String + '_ {
    move |damaged| format!("{what}: {damaged}")
}

/// The header, for the modules of this walk.
fn header_of(view: &SegmentView) -> Result<&Header, Damaged> {
    view.header()
}
