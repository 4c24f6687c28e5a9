//! Taking a connection up where the data server died that served it: the slot, and for the one that was just being served
//! the kernel, say everything.
//!
//! ```text
//! input   ─────────── executed ═══ in the ring ═══ received ─── in the socket ───►
//! output  ─────────── sent ═══ in the ring, or outgoing ═══ produced
//! ```
//!
//! Invariants
//! - Every thread of the dead data server is dead, and its decided changes are completed: see [`crate::recover`].
//! - `received` and `sent` of a slot are what really was taken and given, unless the slot says `uncertain`: only while
//!   it is served is the kernel ahead of them.
//! - Bytes up to what the kernel says was received are in the ring, or up to `direct_until` in the list of the value they belong to:
//!   `recv` puts them there, or nothing.
//!
//! A crash in it: what is corrected is stored before `uncertain` is cleared, and asked again it would come out the same. What a
//! list or a pin was for is found in the slot as before.

use std::os::fd::BorrowedFd;

use super::context::Context;
use super::large::{Assembly, Outgoing, Source};
use super::ring::Ring;
use super::slot::{self, NOT_OUTGOING, Phase, SlotIndex};
use super::{Connection, Fatal};
use crate::arena::block_list::BlockList;
use crate::control::{Adopted, Transport};
use crate::limits::{KEY_BYTES_MAX, VALUE_BYTES_MAX_LIMIT};
use crate::segment::Segment;
use crate::segment::layout::ConnectionSlot;
use crate::session::Membership;
use crate::sys::memory::{Damaged, Memory};
use crate::sys::stream_position;
use crate::transaction::TransactionError;
use crate::wire::SetCondition;

/// What `peek_base` says while the kernel's count is being set: nothing is received meanwhile.
pub(super) const COUNT_IS_SET: u64 = u64::MAX;

/// Why a connection can't be gone on with: the client has to connect again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Lost {
    /// Nobody is at the other end any more.
    #[error("the client has gone")]
    Gone,
    /// What was received was in the memory of the dead process.
    #[error("the store was full, and its buffers were the dead data server's own")]
    NoBuffer,
    /// The kernel can't tell.
    #[error("the kernel can't tell how far its stream got: {0}")]
    Kernel(#[from] rustix::io::Errno),
    /// What the slot says can't be.
    #[error(transparent)]
    Damaged(#[from] Damaged),
}

/// Whose a slot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holder {
    /// Nobody's.
    Free,
    /// This connection's.
    This,
    /// Another connection's.
    Another,
}

/// Whether slot `index`, if there is one, is that of the connection.
pub fn holder(segment: &Segment, index: SlotIndex, connection: u64) -> Holder {
    let reserved = segment.header().map_or(0, |header| header.connection_slots_reserved.load());
    let slot = segment.memory().object::<ConnectionSlot>(segment.regions().connection(index));
    match slot {
        Ok(slot) if index < reserved && slot::is_used(slot) => {
            if slot.id.load() == connection {
                Holder::This
            } else {
                Holder::Another
            }
        }
        _ => Holder::Free,
    }
}

/// Number and index of every connection slot that is in use.
///
/// # Errors
/// [`Damaged`].
pub fn survivors(segment: &Segment) -> Result<Vec<(u64, SlotIndex)>, Damaged> {
    let mut survivors = Vec::new();
    for index in 0..segment.header()?.connection_slots_reserved.load() {
        let slot: &ConnectionSlot = segment.memory().object(segment.regions().connection(index))?;
        if slot::is_used(slot) {
            survivors.push((slot.id.load(), index));
        }
    }
    Ok(survivors)
}

/// Frees the slot of a connection that nobody goes on with, and all that it names.
///
/// # Errors
/// [`Fatal`].
pub fn give_up(context: &mut Context<'_>, index: SlotIndex) -> Result<(), Fatal> {
    let segment = context.table.segment();
    let slot: &ConnectionSlot = segment.memory().object(segment.regions().connection(index))?;
    match slot::release(segment, context.slot, slot) {
        Err(error @ TransactionError::Damaged(_)) => {
            log::error!("connection slot {index}: {error}; its blocks are not used again");
            Ok(slot::abandon(segment, context.slot, slot)?)
        }
        released => Ok(released?),
    }
}

impl<'s> Connection<'s> {
    /// Takes up the connection in slot `index`, which is its, on its socket.
    ///
    /// # Errors
    /// [`Lost`] when it can't be gone on with: slot and socket are to be given up then. [`Fatal`] when the data server can't.
    pub fn resume(
        context: &mut Context<'s>,
        index: SlotIndex,
        adopted: Adopted,
        socket: BorrowedFd<'_>,
    ) -> Result<Result<Self, Lost>, Fatal> {
        let segment = context.table.segment();
        let slot: &'s ConnectionSlot = segment.memory().object(segment.regions().connection(index))?;
        match Self::take_up(context, slot, (index, adopted), socket) {
            Ok(mut connection) => {
                connection.tidy(context)?;
                Ok(Ok(connection))
            }
            Err(lost) => Ok(Err(lost)),
        }
    }

    fn take_up(
        context: &mut Context<'s>,
        slot: &'s ConnectionSlot,
        (index, adopted): (SlotIndex, Adopted),
        socket: BorrowedFd<'_>,
    ) -> Result<Self, Lost> {
        let segment = context.table.segment();
        let damaged = Damaged { offset: segment.regions().connection(index).bytes() };
        settle_positions(segment.memory(), slot, adopted.transport, socket)?;
        let (received, sent) = (slot.received.load(), slot.sent.load());
        let (executed, produced) = slot::unpack(slot.committed.load());
        // Both are less than 2^32 away.
        let executed = received.checked_sub(u64::from((received as u32).wrapping_sub(executed)));
        let produced = sent + u64::from(produced.wrapping_sub(sent as u32));
        let mut connection = Self {
            segment,
            slot,
            index,
            id: adopted.connection,
            transport: adopted.transport,
            phase: Phase::of(slot.state.load()).ok_or(damaged)?,
            input: None,
            output: None,
            received,
            executed: executed.ok_or(damaged)?,
            produced,
            sent,
            discard_until: slot.discard_until.load(),
            direct_until: slot.direct_until.load(),
            expects_large: false,
            introduced_until: 0,
            counted_from: slot.peek_base.load(),
            assembly: assembly_of(context, slot)?,
            outgoing: None,
            session: Membership::of(segment, slot)?,
            place: None,
        };
        connection.outgoing = connection.outgoing_of(context)?;
        connection.input = Ring::named(segment, &slot.input)?;
        connection.output = Ring::named(segment, &slot.output)?;
        let in_ring_from = connection.executed.max(connection.direct_until);
        let unread = connection.received.saturating_sub(in_ring_from);
        let ring_end = connection.outgoing.as_ref().map_or(produced, |outgoing| outgoing.start);
        for (ring, bytes) in
            [(&connection.input, unread), (&connection.output, ring_end.saturating_sub(sent))]
        {
            match ring {
                None if bytes > 0 => return Err(Lost::NoBuffer),
                Some(ring) if bytes > ring.capacity() => return Err(damaged.into()),
                _ => {}
            }
        }
        context.adopt_rings([&connection.input, &connection.output]);
        Ok(connection)
    }

    /// What the dead data server was still to give back.
    fn tidy(&mut self, context: &mut Context<'s>) -> Result<(), Fatal> {
        if self.outgoing.is_none() {
            let list = slot::outgoing_list(self.slot.outgoing.load());
            if list != 0 {
                BlockList::open(self.segment, list)?.release(context.slot, &self.slot.outgoing)?;
            } else {
                self.segment.memory().store(&self.slot.outgoing, 0);
            }
        }
        let list = self.slot.assembly.load();
        if self.assembly.is_none() && list != 0 {
            BlockList::open(self.segment, list)?.release(context.slot, &self.slot.assembly)?;
        }
        if self.sent == self.produced {
            self.end_outgoing(context)?;
        }
        Ok(())
    }

    fn outgoing_of(&self, context: &Context<'s>) -> Result<Option<Outgoing>, Damaged> {
        let start = self.slot.outgoing_start.load();
        if start == NOT_OUTGOING {
            return Ok(None);
        }
        let word = self.slot.outgoing.load();
        // Nothing is produced behind it while it is there.
        let length = self.produced.checked_sub(start).ok_or(Damaged { offset: word })?;
        let source = match slot::outgoing_list(word) {
            0 => Source::Value(context.table.pin_again(slot::pinned_entry(word), length)?),
            list => {
                let list = BlockList::open(self.segment, list)?;
                if list.filled()? != length {
                    return Err(Damaged { offset: list.offset() });
                }
                Source::List(list)
            }
        };
        Ok(Some(Outgoing { source, start }))
    }

    /// Has the kernel count the input of a unix socket, from now on.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn count_input(&mut self, socket: BorrowedFd<'_>) -> rustix::io::Result<()> {
        if self.transport == Transport::Unix {
            let memory = self.segment.memory();
            memory.store(&self.slot.peek_base, COUNT_IS_SET);
            stream_position::begin_to_count_unix(socket)?;
            self.counted_from = self.received;
            memory.store(&self.slot.peek_base, self.received);
        }
        Ok(())
    }

    /// Whether the kernel's count is to be set anew before more is received.
    #[inline]
    pub fn must_count_anew(&self) -> bool {
        self.received.wrapping_sub(self.counted_from) > stream_position::PEEK_RENEW_BYTES
            && self.transport == Transport::Unix
    }
}

/// Makes `received` and `sent` of a slot what they really are.
fn settle_positions(
    memory: &Memory,
    slot: &ConnectionSlot,
    transport: Transport,
    socket: BorrowedFd<'_>,
) -> Result<(), Lost> {
    if slot.uncertain.load() == 0 {
        return Ok(());
    }
    match transport {
        Transport::Tcp => {
            let found = stream_position::tcp(socket)?;
            if found.closed {
                return Err(Lost::Gone);
            }
            if found.received < slot.received.load() || found.sent < slot.sent.load() {
                return Err(Lost::Kernel(rustix::io::Errno::NOTSUP));
            }
            memory.store(&slot.received, found.received);
            memory.store(&slot.sent, found.sent);
        }
        Transport::Unix => {
            let base = slot.peek_base.load();
            if base != COUNT_IS_SET {
                memory.store(&slot.received, base + stream_position::unix_received(socket)?);
            }
        }
    }
    memory.store(&slot.uncertain, 0);
    Ok(())
}

/// The value that was on its way in.
fn assembly_of(context: &Context<'_>, slot: &ConnectionSlot) -> Result<Option<Assembly>, Damaged> {
    let end = slot.assembly_end.load();
    if end == 0 {
        return Ok(None);
    }
    let segment = context.table.segment();
    let list = BlockList::open(segment, slot.assembly.load())?;
    let length = slot.assembly_key_bytes.load() as usize;
    if length > KEY_BYTES_MAX || list.length()? > VALUE_BYTES_MAX_LIMIT + KEY_BYTES_MAX as u64 + 8 {
        return Err(Damaged { offset: list.offset() });
    }
    let mut key = vec![0; length];
    let mut filled = 0;
    while filled < length {
        let (offset, room) = list.piece(filled as u64)?;
        let count = (room as usize).min(length - filled);
        if count == 0 {
            return Err(Damaged { offset: list.offset() });
        }
        segment.memory().read_bytes(offset, &mut key[filled..filled + count])?;
        filled += count;
    }
    let (number, condition) = slot::unpack_request(slot.assembly_request.load());
    let condition = if condition == SetCondition::IfAbsent as u64 {
        SetCondition::IfAbsent
    } else {
        SetCondition::Always
    };
    let hash = context.table.hash_of(&key);
    Ok(Some(Assembly { list, key, hash, condition, number, end }))
}
