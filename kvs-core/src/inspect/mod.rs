//! What is in a segment, for people: a look at each part, read-only, server or not.
//!
//! | module | what it looks at |
//! |---|---|
//! | [`memory`] | where the memory went: size classes, free blocks |
//! | [`shards`] | fill and probe lengths |
//! | [`slots`] | workers, connections and sessions |
//! | [`entries`] | single entries |
//!
//! Figures are as of some moment while it looked: nothing is locked, and a server may go on. Nothing is trusted either:
//! damage makes figures wrong or is an error, and is told by [`check`](crate::check).

pub mod entries;
pub mod memory;
pub mod shards;
pub mod slots;
#[cfg(all(test, not(miri), not(feature = "shuttle")))]
mod tests;

use crate::backup::ring;
use crate::limits::WORKERS_MAX;
use crate::segment::layout::WorkerSlot;
use crate::segment::{SegmentView, text_of};
use crate::sys::memory::Damaged;
use crate::sys::process::ProcessIdentity;

/// What the header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderFacts {
    /// Version of the layout.
    pub layout_version: u64,
    /// Most memory the segment may take, in bytes.
    pub capacity_bytes: u64,
    /// Nanoseconds since the epoch at which it was made.
    pub created_ns: u64,
    /// It was left by an orderly end.
    pub clean: bool,
    /// The data server that serves it, or served it last; None when there was none yet.
    pub data_process: Option<ProcessIdentity>,
    /// The front server, likewise.
    pub front_process: Option<ProcessIdentity>,
    /// Data servers started because one had died.
    pub data_restarts: u64,
    /// Front servers started because one had died.
    pub front_restarts: u64,
    /// Largest value, in bytes.
    pub value_bytes_max: u64,
    /// Which of the backup files that followed one another is written; 0 while there is none.
    pub backup_generation: u64,
    /// Bytes of it that are written; 0 when a new one must be written.
    pub backup_bytes: u64,
    /// Bytes in the rings, on their way to it.
    pub backup_waiting_bytes: u64,
    /// Where TCP clients connect.
    pub tcp_address: String,
    /// Where local clients connect.
    pub unix_path: String,
}

/// What the header says.
///
/// # Errors
/// [`Damaged`] never, on a segment that was opened.
pub fn header(view: &SegmentView) -> Result<HeaderFacts, Damaged> {
    let header = view.header()?;
    let process = |words: &[crate::sys::memory::Word; 2]| {
        let pid = u32::try_from(words[0].load()).ok().filter(|pid| *pid != 0)?;
        Some(ProcessIdentity { pid, start_time: words[1].load() })
    };
    let rings = (0..header.backup_rings_reserved.load().min(WORKERS_MAX as u64))
        .filter_map(|index| view.view().object::<WorkerSlot>(view.regions().worker(index)).ok());
    Ok(HeaderFacts {
        backup_generation: header.backup.generation.load(),
        backup_bytes: header.backup.position.load(),
        backup_waiting_bytes: rings.map(ring::used).sum(),
        layout_version: header.layout_version.load(),
        capacity_bytes: header.capacity_bytes.load(),
        created_ns: header.created_ns.load(),
        clean: header.clean.load() != 0,
        data_process: process(&header.data_process),
        front_process: process(&header.front_process),
        data_restarts: header.data_restarts.load(),
        front_restarts: header.front_restarts.load(),
        value_bytes_max: header.value_bytes_max.load(),
        tcp_address: text_of(&header.tcp_address),
        unix_path: text_of(&header.unix_path),
    })
}
