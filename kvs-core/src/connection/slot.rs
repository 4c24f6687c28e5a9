//! What of a connection lives in the segment: opening a slot, and giving back all that one names.
//!
//! A slot is free when its state word is 0, which is stored last when a connection ends and checked first when the next
//! data server looks for what the dead one left.

use super::ring::give_back_named;
use crate::arena::block_list::BlockList;
use crate::control::{Adopted, Transport};
use crate::segment::layout::{ConnectionSlot, WorkerSlot};
use crate::segment::{OutOfMemory, Segment, store_text};
use crate::session;
use crate::sys::memory::{Memory, Word};
use crate::transaction::{Transaction, TransactionError};
use crate::wire::SetCondition;

/// Index of a connection's slot.
pub type SlotIndex = u64;

const STATE_FREE: u64 = 0;
const HIGH_HALF: u32 = 32;

/// How far the conversation is; as a number, the slot's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Phase {
    /// Hello is awaited.
    Greeting = 1,
    /// Requests are served.
    Open = 2,
    /// The last answer is given; nothing more is executed.
    Refused = 3,
}

impl Phase {
    /// What the state word of a used slot says; None when it can't be.
    pub const fn of(state: u64) -> Option<Self> {
        match state {
            1 => Some(Self::Greeting),
            2 => Some(Self::Open),
            3 => Some(Self::Refused),
            _ => None,
        }
    }
}

/// `outgoing_start` while no list is part of the output.
pub const NOT_OUTGOING: u64 = u64::MAX;

/// Marks an `outgoing` word that names an entry that is pinned, not a list that the slot owns.
const PINNED: u64 = 1;

/// The `outgoing` word of a value that is sent from its entry at `offset`.
pub const fn pinned(offset: u64) -> u64 {
    offset | PINNED
}

/// The list that an `outgoing` word names; 0 when it names none.
pub const fn outgoing_list(word: u64) -> u64 {
    if word & PINNED == 0 { word } else { 0 }
}

/// The entry that an `outgoing` word names that names no list.
pub const fn pinned_entry(word: u64) -> u64 {
    word & !PINNED
}

/// The `committed` word: executed in the low half, produced in the high half, both modulo 2^32.
#[inline(always)]
pub const fn pack(executed: u64, produced: u64) -> u64 {
    executed & 0xffff_ffff | produced << 32
}

/// What the `committed` word says: executed, produced.
pub const fn unpack(word: u64) -> (u32, u32) {
    (word as u32, (word >> 32) as u32)
}

/// Process id and transport that the `client` word says.
pub const fn unpack_client(word: u64) -> (u32, Transport) {
    (word as u32, if word >> HIGH_HALF == 0 { Transport::Tcp } else { Transport::Unix })
}

/// Notes who the client says it is.
pub fn store_client(memory: &Memory, slot: &ConnectionSlot, transport: Transport, name: &str, pid: u32) {
    let unix = u64::from(transport == Transport::Unix);
    memory.store(&slot.client, unix << HIGH_HALF | u64::from(pid));
    store_text(memory, &slot.client_name, name);
}

/// The `assembly_request` word: number and condition of a set.
pub const fn pack_request(number: u32, condition: SetCondition) -> u64 {
    (condition as u64) << HIGH_HALF | number as u64
}

/// What the `assembly_request` word says: number and condition.
pub const fn unpack_request(word: u64) -> (u32, u64) {
    (word as u32, word >> HIGH_HALF)
}

/// Takes slot `index`, which is free, for the connection that was adopted.
///
/// # Errors
/// [`OutOfMemory`] when `/dev/shm` has no room for it.
pub fn open(segment: &Segment, index: SlotIndex, adopted: Adopted) -> Result<&ConnectionSlot, OutOfMemory> {
    let offset = segment.claim_connection(index)?;
    let memory = segment.memory();
    let slot: &ConnectionSlot = memory.object(offset).map_err(|_| OutOfMemory)?;
    let zero: [&Word; 10] = [
        &slot.committed,
        &slot.received,
        &slot.sent,
        &slot.discard_until,
        &slot.assembly_end,
        &slot.input_ended,
        &slot.uncertain,
        &slot.peek_base,
        &slot.session,
        &slot.direct_until,
    ];
    zero.into_iter().for_each(|word| memory.store(word, 0));
    memory.store(&slot.outgoing_start, NOT_OUTGOING);
    memory.store(&slot.id, adopted.connection);
    store_client(memory, slot, adopted.transport, "", 0);
    memory.store(&slot.state, Phase::Greeting as u64);
    Ok(slot)
}

/// Whether the slot is in use.
pub fn is_used(slot: &ConnectionSlot) -> bool {
    slot.state.load() != STATE_FREE
}

/// Gives back all that `slot` names, and the slot itself. Killed on the way, it is done again from the start.
///
/// # Errors
/// [`TransactionError`] when a transaction can't go on or the slot names what can't be.
pub fn release(
    segment: &Segment,
    worker: &WorkerSlot,
    slot: &ConnectionSlot,
) -> Result<(), TransactionError> {
    session::leave(segment, worker, slot, session::now_ms())?;
    for owner in [&slot.assembly, &slot.outgoing] {
        let offset = outgoing_list(owner.load());
        if offset != 0 {
            BlockList::open(segment, offset)?.release(worker, owner)?;
        }
    }
    give_back_named(segment, worker, &slot.input)?;
    give_back_named(segment, worker, &slot.output)?;
    segment.memory().store(&slot.outgoing, 0);
    segment.memory().store(&slot.state, STATE_FREE);
    Ok(())
}

/// Frees the slot although it names what can't be: its blocks are lost until `kvs-tools check` is heeded, and no
/// other connection gets them.
///
/// # Errors
/// [`TransactionError`] when the transaction can't go on.
pub fn abandon(
    segment: &Segment,
    worker: &WorkerSlot,
    slot: &ConnectionSlot,
) -> Result<(), TransactionError> {
    session::leave(segment, worker, slot, session::now_ms())?;
    let mut transaction = Transaction::begin(segment, worker);
    for word in [&slot.assembly, &slot.outgoing, &slot.input.block, &slot.output.block, &slot.state] {
        transaction.store(word, 0);
    }
    transaction.commit()
}
