//! Which session is whose: found by token, taken, given back.
//!
//! The heads in the segment are the truth. What this process looks up in is made from them when the first client asks, so
//! a data server that takes over connections that know their sessions needs none of it.
//!
//! Who gets a record when one is needed, the first that applies:
//! 1. a free one;
//! 2. that of the session longest without a connection, if that is longer than [`SESSION_KEPT`]: its client would have come
//!    back, or has ended without a word;
//! 3. one that was never used;
//! 4. that of the session longest without a connection;
//! 5. nobody: each has a connection. There are as many records as connections, so this is for damaged segments.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{FREE, Membership, SessionIndex, USED, now_ms, record};
use crate::limits::{SESSION_KEPT, SESSIONS_MAX};
use crate::segment::layout::{ConnectionSlot, SessionHead, WorkerSlot};
use crate::segment::{OutOfMemory, Segment};
use crate::sys::memory::{Damaged, Memory};
use crate::transaction::{Transaction, TransactionError};
use crate::wire::SessionToken;

/// Locks that the sessions share. Two workers that meet on one wait for each other no longer than a change takes.
const LOCKS: usize = 256;

/// One to a cache line.
#[derive(Default)]
#[repr(align(64))]
struct Lock(Mutex<()>);

/// Why a client doesn't get its session.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JoinError {
    /// A newer connection of the same client has it.
    #[error("a newer connection of this client has its session")]
    Superseded,
    /// There is no memory for another.
    #[error(transparent)]
    Full(#[from] OutOfMemory),
    /// A transaction can't go on.
    #[error(transparent)]
    Transaction(#[from] TransactionError),
}

impl From<Damaged> for JoinError {
    fn from(damaged: Damaged) -> Self {
        Self::Transaction(damaged.into())
    }
}

/// The sessions of a segment, as the threads of the process that serves it share them.
pub struct Sessions {
    registry: Mutex<Option<Registry>>,
    locks: Box<[Lock]>,
}

impl Default for Sessions {
    fn default() -> Self {
        Self { registry: Mutex::new(None), locks: (0..LOCKS).map(|_| Lock::default()).collect() }
    }
}

impl Sessions {
    /// The lock of session `index`; taken after the registry's, before those of a transaction.
    pub fn lock(&self, index: SessionIndex) -> MutexGuard<'_, ()> {
        hold(&self.locks[index as usize % LOCKS].0)
    }

    /// Finds the session of `token` for a connection, or takes a record for it, and lets `decide` commit the transaction that
    /// gives it to the connection. `decide` is told whether the session was known.
    ///
    /// # Errors
    /// [`JoinError`]; nothing has happened then.
    pub fn join<'s, E: From<JoinError>>(
        &self,
        segment: &'s Segment,
        (worker, slot): (&'s WorkerSlot, &'s ConnectionSlot),
        (token, attempt): (SessionToken, u64),
        decide: impl FnOnce(Transaction<'s>, bool) -> Result<(), E>,
    ) -> Result<Membership<'s>, E> {
        let mut registry = hold(&self.registry);
        let registry = match &mut *registry {
            Some(registry) => registry,
            none => none.insert(Registry::read(segment).map_err(JoinError::from)?),
        };
        let known = registry.by_token.get(&token).copied();
        let index = match known {
            Some(index) => index,
            None => registry.take(segment)?,
        };
        let _lock = self.lock(index);
        let member = Membership::new(segment, index).map_err(JoinError::from)?;
        let (head, connection) = (member.head, slot.id.load());
        let since_ms = head.since_ms.load();
        if known.is_some() && head.attempt.load() >= attempt && head.owner.load() != connection {
            return Err(JoinError::Superseded.into());
        }
        let mut transaction = Transaction::begin(segment, worker);
        transaction.store(&head.state, USED);
        for (word, value) in head.token.iter().zip(token.words()) {
            transaction.store(word, value);
        }
        transaction.store(&head.owner, connection);
        transaction.store(&head.attempt, attempt);
        transaction.store(&slot.session, index + 1);
        decide(transaction, known.is_some())?;
        registry.resting.remove(&(since_ms, index));
        registry.by_token.insert(token, index);
        Ok(member)
    }

    /// Lets `leave` take its session from a connection, and notes that it has none if so.
    ///
    /// # Errors
    /// What `leave` says.
    pub fn leave<E>(&self, member: &Membership<'_>, leave: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        let mut registry = hold(&self.registry);
        let _lock = self.lock(member.index);
        leave()?;
        if let Some(registry) = &mut *registry
            && member.head.state.load() == USED
            && member.head.owner.load() == 0
        {
            registry.resting.insert((member.head.since_ms.load(), member.index));
        }
        Ok(())
    }

    /// Lets `decide` commit the transaction that ends the session of connection `id`, if it is its owner; else it gets an
    /// empty one.
    ///
    /// # Errors
    /// What `decide` says.
    pub fn end<'s, E>(
        &self,
        segment: &'s Segment,
        (worker, slot): (&'s WorkerSlot, &'s ConnectionSlot),
        member: &Membership<'s>,
        decide: impl FnOnce(Transaction<'s>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut registry = hold(&self.registry);
        let _lock = self.lock(member.index);
        let is_owner = member.is_owner(slot.id.load());
        let token = token_of(member.head);
        let mut transaction = Transaction::begin(segment, worker);
        if is_owner {
            transaction.store(&member.head.state, FREE);
            transaction.store(&member.head.token[0], 0);
            transaction.store(&member.head.token[1], 0);
            transaction.store(&member.head.owner, 0);
        }
        transaction.store(&slot.session, 0);
        decide(transaction)?;
        if let Some(registry) = registry.as_mut().filter(|_| is_owner) {
            registry.by_token.remove(&token);
            registry.free.push(member.index);
        }
        Ok(())
    }
}

/// Whoever panicked while holding it has left nothing half done in it: what it guards is in the segment.
fn hold<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn token_of(head: &SessionHead) -> SessionToken {
    SessionToken::from_words([head.token[0].load(), head.token[1].load()])
}

/// What is looked up in.
#[derive(Default)]
struct Registry {
    by_token: HashMap<SessionToken, SessionIndex>,
    free: Vec<SessionIndex>,
    /// Those without a connection, the one longest without first.
    resting: BTreeSet<(u64, SessionIndex)>,
}

impl Registry {
    fn read(segment: &Segment) -> Result<Self, Damaged> {
        let mut registry = Self::default();
        for index in 0..segment.header()?.sessions_reserved.load().min(SESSIONS_MAX) {
            let head: &SessionHead = segment.memory().object(segment.regions().session_head(index))?;
            if head.state.load() != USED {
                registry.free.push(index);
                continue;
            }
            registry.by_token.insert(token_of(head), index);
            if head.owner.load() == 0 {
                registry.resting.insert((head.since_ms.load(), index));
            }
        }
        Ok(registry)
    }

    /// A record that is free and empty; it is not in `free` any more, and on its way to a client. If that fails, it is found
    /// free by the next data server.
    fn take(&mut self, segment: &Segment) -> Result<SessionIndex, JoinError> {
        let index = self.choose(segment)?;
        let (memory, regions) = (segment.memory(), segment.regions());
        let head: &SessionHead = memory.object(regions.session_head(index))?;
        self.forget(memory, head);
        record::clear(memory, memory.object(regions.session_window(index))?);
        Ok(index)
    }

    fn choose(&mut self, segment: &Segment) -> Result<SessionIndex, JoinError> {
        if let Some(index) = self.free.pop() {
            return Ok(index);
        }
        let long_ago = now_ms().saturating_sub(SESSION_KEPT.as_millis() as u64);
        let is_over = |(since_ms, _): &&(u64, SessionIndex)| *since_ms < long_ago;
        if self.resting.first().filter(is_over).is_none()
            && let Ok(index) = segment.claim_session()
        {
            return Ok(index);
        }
        let (_, index) = self.resting.pop_first().ok_or(OutOfMemory)?;
        Ok(index)
    }

    fn forget(&mut self, memory: &Memory, head: &SessionHead) {
        if head.state.load() != FREE {
            self.by_token.remove(&token_of(head));
            memory.store(&head.state, FREE);
        }
    }
}
