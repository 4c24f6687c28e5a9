//! The commit protocol: a redo log per worker, and one store that decides.
//!
//! A transaction only *notes* what it wants to change: words and their new values, in its worker's log. Until the
//! decision nothing that anybody else looks at has changed; what is written directly goes into memory that is
//! still free. The decision is one store of the `intent` word. Then the noted words are stored in order, and the
//! intent is cleared.
//!
//! ```text
//! lock shard ─ build the entry in free memory ─ note words ─ intent := (count, checksum) ─ store words ─ intent := 0 ─ unlock
//!                                                            └── the point of decision
//! ```
//!
//! Invariants
//! - The words of a log are absolute values: storing them twice is storing them once.
//! - Every lock that guards a noted word is held from before the word was first read until the intent is cleared.
//! - A log's words are stored in the order in which they were first noted. Readers rely on it: an entry's version
//!   before the slot that publishes it, the slot before its home's sequence number. The bit that says a replaced block is
//!   free may come before both: nobody can take the block until the lock is free, and then all words are stored.
//!
//! A crash
//! 1. before the decision: the log is ignored; whatever was built lies in free memory. Nothing happened.
//! 2. between decision and clearing: recovery stores all words again, in order. It happened, wholly.
//! 3. in recovery: the intent still stands, so the next recovery does the same again.
//! 4. after clearing: nothing is left to do but to free the lock, whose owner is dead.

use crate::segment::Segment;
use crate::segment::layout::{LOG_WORDS, Shard, WorkerSlot};
use crate::sys::memory::{Damaged, Memory, View, Word};
use crate::sys::robust_mutex::{Acquired, LockError, RobustMutex, RobustMutexGuard};

/// Why a transaction could not go on. Nothing of it has happened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransactionError {
    /// A thread of this very process died while it held the lock: the process is being killed.
    #[error("a thread died while it held a lock; this process must end so that its successor recovers")]
    OwnerDied,
    /// The lock can't be had.
    #[error("a lock of the segment failed: {0}")]
    Lock(#[from] LockError),
    /// More words than a log holds.
    #[error("a change needs more than {LOG_WORDS} words; this is a defect of kvs, please report it")]
    LogFull,
    /// Something in the segment can't be.
    #[error(transparent)]
    Damaged(#[from] Damaged),
}

const COUNT_BITS: u32 = 16;
/// Spreads bits: 2^64 divided by the golden ratio.
const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// A change in the making; dropping it abandons it without a trace.
pub struct Transaction<'s> {
    segment: &'s Segment,
    slot: &'s WorkerSlot,
    count: usize,
    /// A bit for each noted word, which other words may share: most that aren't noted are known by it without a search.
    marks: u64,
    overflowed: bool,
    shard: Option<(u64, RobustMutexGuard<'s>)>,
    arena: Option<RobustMutexGuard<'s>>,
}

impl<'s> Transaction<'s> {
    /// Begins one in the log of `slot`, which belongs to the calling thread alone.
    pub fn begin(segment: &'s Segment, slot: &'s WorkerSlot) -> Self {
        Self { segment, slot, count: 0, marks: 0, overflowed: false, shard: None, arena: None }
    }

    /// The segment it changes.
    pub fn segment(&self) -> &'s Segment {
        self.segment
    }

    /// The memory it changes.
    #[inline(always)]
    pub fn memory(&self) -> &'s Memory {
        self.segment.memory()
    }

    /// The slot of the worker it belongs to.
    pub fn worker(&self) -> &'s WorkerSlot {
        self.slot
    }

    /// Takes the lock of shard `index`; held until the transaction ends. At most one shard, and before the arena's lock.
    ///
    /// # Errors
    /// [`TransactionError`] when the lock can't be had or another shard's is held already.
    pub fn lock_shard(&mut self, index: u64) -> Result<&'s Shard, TransactionError> {
        let shard = self.segment.shard(index)?;
        match &self.shard {
            Some((held, _)) if *held == index => {}
            Some(_) => return Err(TransactionError::Lock(LockError::Os(libc::EDEADLK))),
            // Whoever waits for a shard while it holds the arena may be waited for by that shard's holder.
            None if self.arena.is_some() => return Err(TransactionError::Lock(LockError::Os(libc::EDEADLK))),
            None => self.shard = Some((index, acquire(&shard.lock)?)),
        }
        Ok(shard)
    }

    /// Takes the arena's lock; held until the transaction ends or reaches a [checkpoint](Self::checkpoint).
    ///
    /// # Errors
    /// [`TransactionError`] when the lock can't be had.
    pub fn lock_arena(&mut self) -> Result<(), TransactionError> {
        if self.arena.is_none() {
            self.arena = Some(acquire(&self.segment.header()?.arena_lock)?);
        }
        Ok(())
    }

    /// The word's value as this transaction will leave it.
    #[inline]
    pub fn load(&self, word: &Word) -> u64 {
        self.noted(word).map_or_else(|| word.load(), |entry| self.slot.log[entry].value.load())
    }

    /// Notes that `word` becomes `value`.
    #[inline]
    pub fn store(&mut self, word: &Word, value: u64) {
        let index = self.noted(word).unwrap_or(self.count);
        self.note(index, word, value);
    }

    /// Notes that `word`, which was not noted before, becomes `value`. For changes of many words: it spares the search.
    #[inline]
    pub fn store_first(&mut self, word: &Word, value: u64) {
        debug_assert!(self.noted(word).is_none());
        self.note(self.count, word, value);
    }

    #[inline]
    fn note(&mut self, index: usize, word: &Word, value: u64) {
        let memory = self.memory();
        let (Some(entry), Some(offset)) = (self.slot.log.get(index), memory.offset_of(word)) else {
            self.overflowed = true;
            return;
        };
        memory.store(&entry.offset, offset);
        memory.store(&entry.value, value);
        self.marks |= mark_of(offset);
        self.count = self.count.max(index + 1);
    }

    /// Where `word` was noted. A log is rarely longer than a dozen words and in the nearest cache.
    #[inline]
    fn noted(&self, word: &Word) -> Option<usize> {
        let offset = self.memory().offset_of(word)?;
        if self.marks & mark_of(offset) == 0 {
            return None;
        }
        self.slot.log[..self.count].iter().position(|entry| entry.offset.load() == offset)
    }

    /// Decides: from its one store on, everything noted has happened. Frees the locks.
    ///
    /// # Errors
    /// [`TransactionError::LogFull`], and nothing has happened.
    pub fn commit(mut self) -> Result<(), TransactionError> {
        self.decide_and_apply()
    }

    /// Commits what was noted so far and goes on, keeping the shard's lock.
    ///
    /// # Errors
    /// As [`Transaction::commit`].
    pub fn checkpoint(&mut self) -> Result<(), TransactionError> {
        self.decide_and_apply()?;
        self.arena = None;
        Ok(())
    }

    /// Forgets what was noted and goes on, keeping the shard's lock.
    pub fn abandon(&mut self) {
        self.count = 0;
        self.marks = 0;
        self.overflowed = false;
        self.arena = None;
    }

    /// Decides, and leaves the rest to recovery, as a process that dies right then.
    #[cfg(all(test, not(miri), not(feature = "shuttle")))]
    pub(crate) fn decide_only(self) {
        self.memory().store(&self.slot.intent, decided(self.slot, self.count));
    }

    fn decide_and_apply(&mut self) -> Result<(), TransactionError> {
        let count = std::mem::take(&mut self.count);
        self.marks = 0;
        if std::mem::take(&mut self.overflowed) {
            return Err(TransactionError::LogFull);
        }
        let memory = self.memory();
        memory.store(&self.slot.intent, decided(self.slot, count));
        apply(memory, self.slot, count)?;
        memory.store(&self.slot.intent, 0);
        Ok(())
    }
}

/// The bit of the word at `offset` in a transaction's marks.
#[inline]
const fn mark_of(offset: u64) -> u64 {
    1 << ((offset / 8).wrapping_mul(FACTOR) >> 58)
}

/// Takes a lock of the segment.
///
/// # Errors
/// [`TransactionError::OwnerDied`] when the process is dying; else the lock is damaged.
pub(crate) fn acquire(lock: &RobustMutex) -> Result<RobustMutexGuard<'_>, TransactionError> {
    match lock.lock()? {
        Acquired::Clean(guard) => Ok(guard),
        Acquired::OwnerDied(guard) => {
            // Its owner was a thread of this process, so this process is dying: nobody may go on from a change
            // that is half made. The lock stays taken; the successor makes it anew.
            std::mem::forget(guard);
            Err(TransactionError::OwnerDied)
        }
    }
}

/// The intent word of a decided log.
fn decided(slot: &WorkerSlot, count: usize) -> u64 {
    checksum(slot, count) << COUNT_BITS | count as u64
}

/// 48 bits over the first `count` entries; cheap, because a kill can't tear a log and only damage has to be seen. Each entry is mixed
/// on its own, with its place, so that the processor does several at once.
fn checksum(slot: &WorkerSlot, count: usize) -> u64 {
    let sum = (0u32..).zip(&slot.log[..count]).fold(count as u64 + 1, |sum, (place, entry)| {
        let offset = entry.offset.load().wrapping_mul(FACTOR).rotate_left(29);
        sum.wrapping_add((offset ^ entry.value.load()).wrapping_mul(FACTOR).rotate_left(place))
    });
    (sum.wrapping_mul(FACTOR) >> COUNT_BITS) | 1
}

fn apply(memory: &Memory, slot: &WorkerSlot, count: usize) -> Result<(), Damaged> {
    for entry in &slot.log[..count] {
        memory.store(memory.word(entry.offset.load())?, entry.value.load());
    }
    Ok(())
}

/// What recovery found in a worker's log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recovered {
    /// Nothing was decided, so nothing was to do.
    Nothing,
    /// A decided change of so many words was completed.
    Completed(usize),
    /// The log contradicts itself; nothing was stored.
    Damaged,
}

/// What the log of `slot` asks of recovery, without doing it.
pub fn pending(view: &View, slot: &WorkerSlot) -> Recovered {
    let intent = slot.intent.load();
    let count = (intent & ((1 << COUNT_BITS) - 1)) as usize;
    if intent == 0 {
        return Recovered::Nothing;
    }
    let valid = count <= LOG_WORDS
        && decided(slot, count) == intent
        && slot.log[..count].iter().all(|entry| view.word(entry.offset.load()).is_ok());
    if valid { Recovered::Completed(count) } else { Recovered::Damaged }
}

/// Completes what a dead worker had decided. The caller has proven that its process is dead. Doing it twice, or
/// dying in it, changes nothing.
///
/// # Errors
/// [`Damaged`] never: every offset was checked before the first store.
pub fn recover(memory: &Memory, slot: &WorkerSlot) -> Result<Recovered, Damaged> {
    let found = pending(memory, slot);
    if let Recovered::Completed(count) = found {
        apply(memory, slot, count)?;
        memory.store(&slot.intent, 0);
    }
    Ok(found)
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use crate::limits::CAPACITY_BYTES_MIN;

    fn segment() -> Segment {
        Segment::on_heap(CAPACITY_BYTES_MIN).expect("heap memory")
    }

    fn slot(segment: &Segment) -> &WorkerSlot {
        segment.memory().object(segment.regions().worker(0)).expect("worker slots exist")
    }

    #[test]
    fn transaction_abandoned_changes_nothing() {
        let segment = segment();
        let word = segment.memory().word(segment.regions().data).expect("in bounds");
        let mut transaction = Transaction::begin(&segment, slot(&segment));
        transaction.store(word, 7);
        assert_eq!(transaction.load(word), 7);
        assert_eq!(word.load(), 0);
        drop(transaction);
        assert_eq!(recover(segment.memory(), slot(&segment)), Ok(Recovered::Nothing));
        assert_eq!(word.load(), 0);
    }

    #[test]
    fn transaction_decided_is_completed_by_recovery_again_and_again() {
        let segment = segment();
        let (memory, slot) = (segment.memory(), slot(&segment));
        let word = memory.word(segment.regions().data).expect("in bounds");
        let mut transaction = Transaction::begin(&segment, slot);
        transaction.store(word, 7);
        let intent = decided(slot, 1);
        drop(transaction);
        for _ in 0..3 {
            memory.store(&slot.intent, intent);
            memory.store(word, 0);
            assert_eq!(recover(memory, slot), Ok(Recovered::Completed(1)));
            assert_eq!((word.load(), slot.intent.load()), (7, 0));
        }
    }

    #[test]
    fn transaction_damaged_log_is_reported_and_not_applied() {
        let segment = segment();
        let (memory, slot) = (segment.memory(), slot(&segment));
        let word = memory.word(segment.regions().data).expect("in bounds");
        let mut transaction = Transaction::begin(&segment, slot);
        transaction.store(word, 7);
        drop(transaction);
        memory.store(&slot.intent, decided(slot, 1));
        memory.store(&slot.log[0].value, 8);
        assert_eq!(recover(memory, slot), Ok(Recovered::Damaged));
        assert_eq!(word.load(), 0);
        memory.store(&slot.intent, u64::MAX);
        assert_eq!(recover(memory, slot), Ok(Recovered::Damaged));
    }

    #[test]
    fn transaction_too_large_is_refused_whole() {
        let segment = segment();
        let memory = segment.memory();
        let mut transaction = Transaction::begin(&segment, slot(&segment));
        for index in 0..=LOG_WORDS as u64 {
            transaction.store(memory.word(segment.regions().data + index * 8).expect("in bounds"), 1);
        }
        assert!(matches!(transaction.commit(), Err(TransactionError::LogFull)));
        assert_eq!(memory.word(segment.regions().data).expect("in bounds").load(), 0);
    }
}
