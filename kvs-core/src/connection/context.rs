//! What all connections of a worker share: the table, the worker's slot, buffers that are used again and again.

use std::io::IoSlice;
use std::os::fd::BorrowedFd;

use super::Fatal;
use super::look_ahead::{LookAhead, Read};
use super::ring::{RING_ORDER, Ring};
use super::slot::SlotIndex;
use crate::backup::gate::{Admission, Gate};
use crate::backup::ring;
use crate::control::StatisticOwned;
use crate::instance::ByteSize;
use crate::limits::KEY_BYTES_MAX;
use crate::segment::layout::{RingPlace, WorkerSlot};
use crate::session::Sessions;
use crate::sys::counted_send::{CountedSend, UNKNOWN};
use crate::table::{KeyHash, Table};

/// Homes of the table that a connection looks at in one turn, for pages of keys: it bounds the time others wait.
const TURN_HOMES_MAX: usize = 1024;

/// Which counter of a worker's slot counts which request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Counter {
    /// Reads.
    Get,
    /// Sets, conditional ones too.
    Set,
    /// Deletes.
    Delete,
    /// Increments.
    Increment,
    /// Pages of keys.
    List,
}

/// All counters with their names in the statistics.
pub const COUNTERS: [(Counter, &str); 5] = [
    (Counter::Get, "requests_get"),
    (Counter::Set, "requests_set"),
    (Counter::Delete, "requests_delete"),
    (Counter::Increment, "requests_increment"),
    (Counter::List, "requests_list"),
];

/// Where the counters of the store come from.
pub trait Statistics {
    /// Name and value of each, in the order in which they are shown.
    fn statistics(&self) -> Vec<(String, StatisticOwned)>;
}

/// What a worker's connections share.
pub struct Context<'s> {
    pub(super) table: &'s Table,
    pub(super) slot: &'s WorkerSlot,
    pub(super) statistics: &'s dyn Statistics,
    pub(super) value_bytes_max: u64,
    /// The gate, and which of its rings is this worker's.
    gate: Option<(&'s Gate, usize)>,
    counted: Option<CountedSend>,
    /// The sessions of clients, if they are kept.
    pub(super) sessions: Option<&'s Sessions>,
    pub(super) scratch: Vec<u8>,
    pub(super) response: Vec<u8>,
    /// The frame at hand needs a larger input ring.
    pub(super) enlarge: bool,
    /// Homes of the table that may still be looked at for pages of keys in this turn.
    pub(super) homes_left: usize,
    rings_held: u64,
    rings_max: u64,
    /// Requests that were looked at ahead.
    ahead: LookAhead,
}

impl<'s> Context<'s> {
    /// For the worker of `slot`, which keeps up to `rings_max` rings for clients that are silent just now.
    pub fn new(
        table: &'s Table,
        slot: &'s WorkerSlot,
        statistics: &'s dyn Statistics,
        value_bytes_max: u64,
        rings_max: u64,
    ) -> Self {
        Self {
            table,
            slot,
            statistics,
            value_bytes_max,
            gate: None,
            counted: None,
            sessions: None,
            scratch: Vec::new(),
            response: Vec::new(),
            enlarge: false,
            homes_left: 0,
            rings_held: 0,
            rings_max,
            ahead: LookAhead::new(),
        }
    }

    /// The same, for a table that is backed up: changes are made as `gate` lets them.
    #[must_use]
    pub fn behind(self, gate: &'s Gate, worker: usize) -> Self {
        Self { gate: Some((gate, worker)), ..self }
    }

    /// The same, for a worker that sends on unix sockets: what it sends is counted in the segment by the kernel.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn counting(self) -> std::io::Result<Self> {
        let segment = self.table.segment();
        let offset = segment.memory().offset_of(&self.slot.unix_sent);
        let (Some(file), Some(offset)) = (segment.file(), offset) else {
            return Err(std::io::ErrorKind::Unsupported.into());
        };
        Ok(Self { counted: Some(CountedSend::map(file, offset)?), ..self })
    }

    /// From now on the connection in slot `index` is served: should this process die, the kernel knows more of its stream
    /// than its slot does.
    #[inline]
    pub fn serves(&self, index: SlotIndex) {
        let memory = self.table.segment().memory();
        // What is there is of the one served before.
        memory.store(&self.slot.unix_sent, UNKNOWN);
        memory.store(&self.slot.serving, index + 1);
    }

    /// The connection in slot `index` is the wave's `place`th: should this process die before it is answered, it is among the first
    /// that are gone on with.
    ///
    /// # Panics
    /// When `place` is [`WAVE_MAX`] or more.
    #[inline]
    pub fn joins_wave(&self, index: SlotIndex, place: usize) {
        self.table.segment().memory().store(&self.slot.wave[place], index + 1);
    }

    /// From now on nobody is: every slot says what is.
    #[inline]
    pub fn serves_nobody(&self) {
        self.table.segment().memory().store(&self.slot.serving, 0);
    }

    /// Sends `parts` on the unix socket of a connection that has been sent `from` bytes so far.
    ///
    /// # Errors
    /// What the kernel says; nothing was sent then.
    pub fn send_counted(
        &mut self,
        from: u64,
        socket: BorrowedFd<'_>,
        parts: &[IoSlice<'_>],
    ) -> rustix::io::Result<usize> {
        let memory = self.table.segment().memory();
        let Some(sender) = &mut self.counted else { return Err(rustix::io::Errno::NOTSUP) };
        // First, so that the last count never goes with the new beginning.
        memory.store(&self.slot.unix_sent, UNKNOWN);
        memory.store(&self.slot.unix_sent_from, from);
        sender.send(memory, &self.slot.unix_sent, socket, parts)
    }

    /// The same, where clients have sessions.
    #[must_use]
    pub fn with_sessions(self, sessions: &'s Sessions) -> Self {
        Self { sessions: Some(sessions), ..self }
    }

    /// What is in every ring, if answers wait for the disk; nothing else.
    pub(super) fn unsynced_rings(&self) -> Vec<u64> {
        let segment = self.table.segment();
        let rings = segment.header().map_or(0, |header| header.backup_rings_reserved.load());
        let slot = |index| segment.memory().object::<WorkerSlot>(segment.regions().worker(index)).ok();
        let waits = self.waits_for_sync();
        (0..rings).take_while(|_| waits).filter_map(slot).map(|slot| slot.ring_head.load()).collect()
    }

    /// Whether every ring is on disk up to what `heads` says, which are forgotten then.
    pub(super) fn is_all_synced(&self, heads: &mut Vec<u64>) -> bool {
        let Some((gate, _)) = self.gate else { return true };
        let synced = heads.iter().enumerate().all(|(index, &head)| gate.synced(index) >= head);
        if synced {
            heads.clear();
        }
        synced
    }

    /// Whether answers to changes wait until these are on disk.
    pub fn waits_for_sync(&self) -> bool {
        self.gate.is_some_and(|(gate, _)| gate.waits_for_sync())
    }

    /// Whether what was put into the ring up to `position` is on disk.
    pub fn is_synced(&self, position: u64) -> bool {
        self.gate.is_none_or(|(gate, worker)| gate.synced(worker) >= position)
    }

    /// Whether everything that was in the rings when this process took over is on disk.
    pub fn is_inheritance_synced(&self) -> bool {
        self.gate.is_none_or(|(gate, _)| gate.is_inheritance_synced())
    }

    /// Whether a change that found no room in the ring may be tried again: it has room, or will be refused.
    pub fn may_change(&self) -> bool {
        self.admission_of_large(KEY_BYTES_MAX) != Admission::Wait
    }

    /// Whether a large value may be stored now.
    pub(super) fn admission_of_large(&self, key_length: usize) -> Admission {
        match self.gate {
            Some((gate, _)) if self.table.holds_too_much_for_backup() => gate.admission(false),
            _ => self.admission(key_length, 0),
        }
    }

    /// Whether a change of a key and a value that goes into the ring may be made now.
    #[inline]
    pub(super) fn admission(&self, key_length: usize, value_length: usize) -> Admission {
        match self.gate {
            None => Admission::Go,
            Some((gate, _)) => {
                gate.admission(ring::has_room(self.slot, ring::bytes_needed(key_length, value_length)))
            }
        }
    }

    /// Bytes ever put into the worker's backup ring.
    #[inline]
    pub fn ring_head(&self) -> u64 {
        self.slot.ring_head.load()
    }

    pub(super) fn count(&self, counter: Counter) {
        let word = &self.slot.counters[counter as usize];
        self.table.segment().memory().store(word, word.load().wrapping_add(1));
    }

    pub(super) fn value_too_long(&self, found: u64) -> String {
        format!(
            "a value of {found} bytes is longer than the limit of {} bytes ({}); send a smaller one or start the \
             server with a larger --max-value",
            self.value_bytes_max,
            ByteSize(self.value_bytes_max)
        )
    }

    pub(super) fn take_ring(&mut self, owner: &RingPlace) -> Result<Ring, Fatal> {
        self.rings_held += 1;
        Ok(Ring::take(self.table.segment(), self.slot, owner, RING_ORDER)?)
    }

    /// Rings that a dead data server took are held from now on.
    pub(super) fn adopt_rings(&mut self, rings: [&Option<Ring>; 2]) {
        self.rings_held += rings.into_iter().flatten().count() as u64;
    }

    pub(super) fn give_back_ring(&mut self, ring: Ring, owner: &RingPlace) -> Result<(), Fatal> {
        self.rings_held -= 1;
        Ok(ring.give_back(self.table.segment(), self.slot, owner)?)
    }

    /// Whether silent clients should give their rings back, at leisure.
    pub fn holds_many_rings(&self) -> bool {
        self.rings_held > self.rings_max
    }

    /// Whether rings must be given back at once.
    pub(super) fn holds_far_too_many_rings(&self) -> bool {
        self.rings_held > 2 * self.rings_max
    }

    /// A wave begins: the requests of several clients are looked at ahead, and executed then.
    pub fn begin_wave(&mut self) {
        self.ahead.clear();
    }

    /// Whether the wave has as many requests as are worth looking at together.
    pub fn is_wave_full(&self) -> bool {
        self.ahead.is_full()
    }

    /// Nothing more comes to the wave.
    pub fn end_wave(&mut self) {
        self.ahead.fetch(self.table);
    }

    /// Brings near what the frames in `bytes`, which begin at stream position `at` of the connection, will need. They are part
    /// of the wave that is being made.
    pub(super) fn add_to_wave(&mut self, connection: u64, at: u64, bytes: &[u8]) {
        self.ahead.look(self.table, connection, at, bytes);
    }

    /// The same, of a connection that is being served. Does nothing while an earlier look is not used up.
    pub(super) fn look_ahead(&mut self, connection: u64, at: u64, bytes: &[u8]) {
        if self.ahead.find(connection, at).is_some() {
            return;
        }
        self.ahead.clear();
        self.ahead.look(self.table, connection, at, bytes);
        self.ahead.fetch(self.table);
    }

    /// The read at stream position `at` of the connection, if it was decoded ahead.
    #[inline]
    pub(super) fn read_ahead(&mut self, connection: u64, at: u64) -> Option<Read> {
        self.ahead.find(connection, at)?.read.clone()
    }

    /// The hash of the key of the request at stream position `at` of the connection.
    pub(super) fn hash_of(&mut self, connection: u64, at: u64, key: &[u8]) -> KeyHash {
        match self.ahead.find(connection, at) {
            Some(seen) => seen.hash,
            None => self.table.hash_of(key),
        }
    }

    /// The turn of a connection begins.
    pub(super) fn begin_turn(&mut self) {
        self.homes_left = TURN_HOMES_MAX;
    }
}
