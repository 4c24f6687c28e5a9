//! Recovery: what a data server that died left behind becomes a segment that can be served.
//!
//! Invariants
//! - The caller has proven that every thread of the dead data server is dead, and the segment's lock keeps all others out:
//!   what is found is nobody's any more.
//! - All of it costs O(shards + workers + connections), never O(entries).
//!
//! A crash in it, after
//! 1. some redo logs were completed: those are clear, the others still stand; the next recovery completes them;
//! 2. some locks were made anew: nobody waits for one, and the next recovery makes all of them anew;
//! 3. the backup rings were looked at: pins are this process's own, and are made anew;
//! 4. some connections were noted to have been served: each in one transaction with the end of that note at its worker;
//! 5. some replaced values were freed: each is taken off its list in the transaction that frees it;
//! 6. some connections were ended: a slot is marked free last, and what it no longer names is free.

use crate::backup::ring;
use crate::connection::slot::{self, SlotIndex};
use crate::segment::layout::{ConnectionSlot, WorkerSlot};
use crate::segment::{Segment, SegmentError};
use crate::sys::counted_send;
use crate::sys::memory::Damaged;
use crate::table::Table;
use crate::transaction::{self, Recovered, Transaction, TransactionError};

/// Why a segment can't be recovered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecoverError {
    /// The redo log of a worker is damaged.
    #[error("the log of worker slot {worker} contradicts itself, so the segment can't be trusted")]
    DamagedLog {
        /// Whose.
        worker: u64,
    },
    /// No lock can be made.
    #[error(transparent)]
    Locks(#[from] SegmentError),
    /// A transaction can't go on.
    #[error("can't free what a dead data server held: {0}")]
    Transaction(#[from] TransactionError),
    /// Something in the segment can't be.
    #[error(transparent)]
    Damaged(#[from] Damaged),
}

/// Recovers the segment of `table` for a data server to which nobody passes the sockets of the dead one: completes what was
/// decided, makes every lock anew, frees replaced values, and ends the connections.
///
/// # Errors
/// [`RecoverError`]; the segment is not to be served then.
pub fn recover(table: &Table) -> Result<(), RecoverError> {
    take_over(table)?;
    let slots = worker_slots(table.segment())?;
    // The first slot always exists; nobody else works yet.
    slots.first().map_or(Ok(()), |worker| end_connections(table.segment(), worker))?;
    table.release_garbage();
    collect_garbage(table, 0)
}

/// Recovers the segment of `table` for a data server that goes on with the connections of the dead one. Until they all are
/// resumed, or given up, nothing that was replaced is freed: see [`Table::release_garbage`] and [`collect_garbage`]. Gives the
/// slots of the connections that were just being served, or had just been taken input from: nothing may come from those clients before
/// they have their answers.
///
/// # Errors
/// [`RecoverError`]; the segment is not to be served then.
pub fn take_over(table: &Table) -> Result<Vec<SlotIndex>, RecoverError> {
    let segment = table.segment();
    table.hold_garbage();
    let slots = worker_slots(segment)?;
    complete_logs(segment, &slots)?;
    segment.initialize_locks()?;
    for (worker, slot) in (0u64..).zip(&slots).take(segment.header()?.backup_rings_reserved.load() as usize) {
        take_up_ring(table, worker, slot)?;
    }
    let mut served = Vec::new();
    for slot in &slots {
        served.extend(note_served(segment, slot)?);
        served.extend(slot.wave.iter().filter_map(|index| index.load().checked_sub(1)));
    }
    let reserved = segment.header()?.connection_slots_reserved.load();
    served.retain(|&index| index < reserved);
    Ok(served)
}

/// Frees what was replaced by workers whose slots nobody works in: those from `from` on.
///
/// # Errors
/// [`RecoverError`]; the segment is not to be served then.
pub fn collect_garbage(table: &Table, from: usize) -> Result<(), RecoverError> {
    let segment = table.segment();
    for (index, slot) in worker_slots(segment)?.into_iter().enumerate().skip(from) {
        match table.collect_garbage(slot) {
            Ok(()) => {}
            Err(error @ TransactionError::Damaged(_)) => {
                log::error!("replaced values of worker {index}: {error}; their blocks are not used again");
                segment.memory().store(&slot.garbage, 0);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Notes at the connection that a worker was serving that the kernel is to be asked how far its stream got; and for a unix socket
/// what the send came to that may have been under way.
fn note_served(segment: &Segment, worker: &WorkerSlot) -> Result<Option<SlotIndex>, RecoverError> {
    let Some(index) = worker.serving.load().checked_sub(1) else { return Ok(None) };
    let mut transaction = Transaction::begin(segment, worker);
    if index < segment.header()?.connection_slots_reserved.load() {
        let slot: &ConnectionSlot = segment.memory().object(segment.regions().connection(index))?;
        if slot::is_used(slot) {
            transaction.store(&slot.uncertain, 1);
            if let Some(sent) = counted_send::count_of(worker.unix_sent.load()) {
                transaction.store(&slot.sent, worker.unix_sent_from.load() + u64::from(sent));
            }
        }
    }
    transaction.store(&worker.serving, 0);
    transaction.commit()?;
    Ok(Some(index))
}

/// Pins what waits in the ring for the backup file. What can't be read there is in the table: a new file will have it.
fn take_up_ring(table: &Table, worker: u64, slot: &WorkerSlot) -> Result<(), RecoverError> {
    if let Err(damaged) = ring::pin_all(table, slot) {
        let memory = table.segment().memory();
        log::error!(
            "the backup ring of worker {worker}: {damaged}; a new backup file will be written from memory"
        );
        memory.store(&table.segment().header()?.backup.position, 0);
        memory.store(&slot.ring_tail, slot.ring_head.load());
    }
    Ok(())
}

fn worker_slots(segment: &Segment) -> Result<Vec<&WorkerSlot>, Damaged> {
    let reserved = segment.header()?.worker_slots_reserved.load();
    (0..reserved).map(|index| segment.memory().object(segment.regions().worker(index))).collect()
}

fn complete_logs(segment: &Segment, slots: &[&WorkerSlot]) -> Result<(), RecoverError> {
    for (worker, slot) in (0u64..).zip(slots) {
        match transaction::recover(segment.memory(), slot)? {
            Recovered::Nothing => {}
            Recovered::Completed(words) => log::info!("worker {worker}: completed a change of {words} words"),
            Recovered::Damaged => return Err(RecoverError::DamagedLog { worker }),
        }
    }
    Ok(())
}

/// Ends the connections that the dead data server had: the clients connect again.
fn end_connections(segment: &Segment, worker: &WorkerSlot) -> Result<(), RecoverError> {
    let reserved = segment.header()?.connection_slots_reserved.load();
    for index in 0..reserved {
        let slot: &ConnectionSlot = segment.memory().object(segment.regions().connection(index))?;
        if !slot::is_used(slot) {
            continue;
        }
        match slot::release(segment, worker, slot) {
            Ok(()) => {}
            Err(error @ TransactionError::Damaged(_)) => {
                log::error!("connection slot {index}: {error}; its blocks are not used again");
                slot::abandon(segment, worker, slot)?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
