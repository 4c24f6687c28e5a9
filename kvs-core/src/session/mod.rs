//! Sessions: what is remembered of a client beyond its connection, so that what it repeats is not executed twice.
//!
//! ```text
//! client ── Session(token, attempt) ──► head: whose, which connection ──► window: results of its last changes
//!           change number n ──────────► executed already?  yes: the same answer
//!                                                           no:  one transaction: change, answer, result, consumption
//! ```
//!
//! | module | what it is |
//! |---|---|
//! | [`record`] | the results of a session's changes, in its window |
//! | [`registry`] | which session is whose: found by token, taken, given back |
//!
//! Invariants
//! - A change's result is stored by the transaction of the change: executed and remembered are the same, whatever
//!   instruction the process dies at.
//! - A session has one connection, its owner, and only that one changes anything for it; it looks whether it still is, and
//!   changes, under the session's lock.
//! - A record that is free, or that nobody has claimed yet, means nothing but that.
//!
//! Locks: the registry's, then the session's, then those of a transaction. The first two are memory of the process: only one
//! process at a time serves a segment, and its locks die with it. What is made under them is decided by one transaction,
//! which recovery completes before anybody looks.
//!
//! A crash
//! 1. while a record is being taken: its state is still free; whoever takes it next begins anew;
//! 2. before the transaction that gives it to its client: the client asks again;
//! 3. after that: it is known, with the new owner;
//! 4. at the end of a connection: until the transaction that takes the session from it, it is that connection's.

pub mod record;
pub mod registry;
#[cfg(all(test, not(miri), not(feature = "shuttle")))]
mod tests;

use crate::segment::Segment;
use crate::segment::layout::{ConnectionSlot, SessionHead, SessionWindow, WorkerSlot};
use crate::sys::memory::Damaged;
use crate::transaction::{Transaction, TransactionError};
use record::Ledger;
pub use registry::Sessions;

/// Index of a session's record.
pub type SessionIndex = u64;

/// `state` of a head that is nobody's.
pub(crate) const FREE: u64 = 0;
/// `state` of a head that is somebody's.
pub(crate) const USED: u64 = 1;

/// The session that the connection of `slot` was given, if it was given one. Whether it still has it is another question:
/// see [`Membership::is_owner`].
pub fn of(slot: &ConnectionSlot) -> Option<SessionIndex> {
    slot.session.load().checked_sub(1)
}

/// A connection's part in a session.
pub struct Membership<'s> {
    index: SessionIndex,
    head: &'s SessionHead,
    window: &'s SessionWindow,
    /// Read from the window when it is needed first.
    ledger: Option<Ledger<'s>>,
    /// What was in the backup rings when the session came to this connection: results from before are acknowledged when
    /// that much is on disk. Empty where nobody waits for the disk, or no longer.
    pub(crate) unsynced: Vec<u64>,
}

impl<'s> Membership<'s> {
    /// In session `index`.
    ///
    /// # Errors
    /// [`Damaged`] when there is no such session.
    pub fn new(segment: &'s Segment, index: SessionIndex) -> Result<Self, Damaged> {
        if index >= segment.header()?.sessions_reserved.load().min(crate::limits::SESSIONS_MAX) {
            return Err(Damaged { offset: segment.regions().session_head(index).bytes() });
        }
        Ok(Self {
            index,
            head: segment.memory().object(segment.regions().session_head(index))?,
            window: segment.memory().object(segment.regions().session_window(index))?,
            ledger: None,
            unsynced: Vec::new(),
        })
    }

    /// The one that `slot` names, for a connection that is taken over from a data server that died.
    ///
    /// # Errors
    /// [`Damaged`] when it names what can't be.
    pub fn of(segment: &'s Segment, slot: &ConnectionSlot) -> Result<Option<Self>, Damaged> {
        of(slot).map(|index| Self::new(segment, index)).transpose()
    }

    /// Which session.
    pub fn index(&self) -> SessionIndex {
        self.index
    }

    /// Whether connection `id` is the one that may change something for it. Asked under the session's lock.
    pub fn is_owner(&self, id: u64) -> bool {
        self.head.state.load() == USED && self.head.owner.load() == id
    }

    /// The results. While this connection is the owner, nobody else's changes come between.
    pub fn ledger(&mut self) -> &mut Ledger<'s> {
        self.ledger.get_or_insert_with(|| Ledger::open(self.window))
    }
}

/// Notes that the connection of `slot` has no session any more, and that its session, if it is still its owner, is without
/// a connection since `now_ms`. Under the session's lock, or where nobody else is.
///
/// # Errors
/// [`TransactionError`] when the transaction can't go on.
pub fn leave(
    segment: &Segment,
    worker: &WorkerSlot,
    slot: &ConnectionSlot,
    now_ms: u64,
) -> Result<(), TransactionError> {
    let Some(index) = of(slot) else { return Ok(()) };
    let mut transaction = Transaction::begin(segment, worker);
    // A word that names no session is damage that costs nothing: it is cleared.
    if let Ok(member) = Membership::new(segment, index)
        && member.is_owner(slot.id.load())
    {
        transaction.store(&member.head.owner, 0);
        transaction.store(&member.head.since_ms, now_ms);
    }
    transaction.store(&slot.session, 0);
    transaction.commit()
}

/// Milliseconds since the machine was started, as every process counts them.
pub fn now_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    now.tv_sec.unsigned_abs() * 1000 + now.tv_nsec.unsigned_abs() / 1_000_000
}
