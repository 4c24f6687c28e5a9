//! Workers, connections and sessions.

use crate::connection::context::COUNTERS;
use crate::connection::slot;
use crate::control::Transport;
use crate::limits::{CONNECTIONS_MAX_LIMIT, SESSIONS_MAX, WORKERS_MAX};
use crate::segment::layout::{ConnectionSlot, SessionHead, WorkerSlot};
use crate::segment::{SegmentView, text_of};
use crate::sys::memory::Damaged;
use crate::table::entry::Entry;
use crate::transaction::{self, Recovered};

/// Most values waiting to be freed that are counted: a damaged list may have no end.
const GARBAGE_MAX: u64 = 1 << 20;

/// A worker's slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerFigures {
    /// Which one.
    pub index: u64,
    /// What its log asks of recovery, or of the worker that is just at it.
    pub intent: Recovered,
    /// Replaced values that wait to be freed.
    pub garbage: u64,
    /// Requests served, with the names of the statistics.
    pub requests: [(&'static str, u64); COUNTERS.len()],
}

/// A connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectionFigures {
    /// Its slot.
    pub slot: u64,
    /// Its number.
    pub id: u64,
    /// How it came.
    pub transport: Transport,
    /// What the client calls itself.
    pub name: String,
    /// The client's process; 0 when unknown.
    pub pid: u32,
    /// How far the conversation is.
    pub phase: &'static str,
    /// Bytes of input taken from the socket.
    pub received: u64,
    /// Bytes of output given to the socket.
    pub sent: u64,
    /// Input that waits to be executed, in bytes.
    pub input_waiting: u64,
    /// Answers that wait to be sent, in bytes.
    pub output_waiting: u64,
}

/// How many clients are remembered beyond their connections. Nothing of what they are known by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SessionFigures {
    /// Sessions with a connection.
    pub connected: u64,
    /// Sessions whose client may come back.
    pub resting: u64,
    /// Records that memory was taken for.
    pub reserved: u64,
}

/// Sessions.
///
/// # Errors
/// [`Damaged`] when they lie outside.
pub fn sessions(view: &SegmentView) -> Result<SessionFigures, Damaged> {
    let reserved = view.header()?.sessions_reserved.load().min(SESSIONS_MAX);
    let mut figures = SessionFigures { reserved, ..SessionFigures::default() };
    for index in 0..reserved {
        let head: &SessionHead = view.view().object(view.regions().session_head(index))?;
        let used = head.state.load() == crate::session::USED;
        let connected = used && head.owner.load() != 0;
        figures.connected += u64::from(connected);
        figures.resting += u64::from(used && !connected);
    }
    Ok(figures)
}

/// All worker slots that were ever used.
///
/// # Errors
/// [`Damaged`] when they lie outside.
pub fn workers(view: &SegmentView) -> Result<Vec<WorkerFigures>, Damaged> {
    let count = view.header()?.worker_slots_reserved.load().min(WORKERS_MAX as u64);
    (0..count)
        .map(|index| {
            let slot: &WorkerSlot = view.view().object(view.regions().worker(index))?;
            let requests = COUNTERS.map(|(counter, name)| (name, slot.counters[counter as usize].load()));
            let intent = transaction::pending(view.view(), slot);
            Ok(WorkerFigures { index, intent, garbage: garbage(view, slot), requests })
        })
        .collect()
}

fn garbage(view: &SegmentView, slot: &WorkerSlot) -> u64 {
    let (mut offset, mut count) = (slot.garbage.load(), 0);
    while offset != 0 && count < GARBAGE_MAX {
        let entry = Entry::load(view.view(), offset).ok().flatten();
        let next = entry.filter(Entry::is_chunked).and_then(|entry| entry.garbage_word().ok());
        count += 1;
        let Some(next) = next else { break };
        offset = next.load();
    }
    count
}

/// All connections.
///
/// # Errors
/// [`Damaged`] when they lie outside.
pub fn connections(view: &SegmentView) -> Result<Vec<ConnectionFigures>, Damaged> {
    let count = view.header()?.connection_slots_reserved.load().min(u64::from(CONNECTIONS_MAX_LIMIT));
    let mut all = Vec::new();
    for index in 0..count {
        let slot: &ConnectionSlot = view.view().object(view.regions().connection(index))?;
        if slot::is_used(slot) {
            all.push(connection(index, slot));
        }
    }
    Ok(all)
}

fn connection(index: u64, slot: &ConnectionSlot) -> ConnectionFigures {
    let (executed, produced) = slot::unpack(slot.committed.load());
    let (received, sent) = (slot.received.load(), slot.sent.load());
    let (pid, transport) = slot::unpack_client(slot.client.load());
    let phase = match slot.state.load() {
        1 => "greeting",
        2 => "open",
        3 => "refused",
        _ => "unknown",
    };
    ConnectionFigures {
        slot: index,
        id: slot.id.load(),
        transport,
        name: text_of(&slot.client_name),
        pid,
        phase,
        received,
        sent,
        // Positions are kept modulo 2^32; what waits is far less.
        input_waiting: u64::from((received as u32).wrapping_sub(executed)),
        output_waiting: u64::from(produced.wrapping_sub(sent as u32)),
    }
}
