//! The results of a session's changes, in its window.
//!
//! A change's number is 32 bits and comes round; its *place* is the number carried on to 48 bits. The result of place p is
//! in slot p modulo the window's length, with the place in it: a slot says itself what it holds.
//!
//! ```text
//!          next - 256               next
//! ─ forgotten ──┼── remembered ──────┼── not executed yet ──►
//! ```
//!
//! Invariants
//! - The highest place in the window belongs to the last change that was executed.
//! - Requests of a connection are executed in order, and a client repeats from the first that was not answered on. So a
//!   place below `next` without a result is of a request that was refused before it was one of the session's changes.

use crate::limits::SESSION_WINDOW;
use crate::segment::layout::{SessionResult, SessionWindow};
use crate::sys::memory::Memory;
use crate::transaction::Transaction;
use crate::wire::{ErrorCode, ResponseBody};

/// Bits of the outcome word below the place.
const PLACE_SHIFT: u32 = 16;
const CODE_SHIFT: u32 = 8;
/// Places begin with one above this, so that none is 0 and there is room for earlier ones.
const PLACES_BEFORE: u64 = 1 << 32;
/// Places there are. A client that makes a million changes a second needs nine years for them.
const PLACES_MAX: u64 = 1 << (u64::BITS - PLACE_SHIFT);

const STORED: u64 = 1;
const EXISTS: u64 = 2;
const DELETED: u64 = 3;
const MISSING: u64 = 4;
const NUMBER: u64 = 5;
const FAILED: u64 = 6;

/// What a client is told of a change that failed when it was executed first.
const FAILED_BEFORE: &str =
    "the request failed when it came over the connection before this one, and nothing was changed";

/// What came of a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The value is stored.
    Stored,
    /// The key exists, so nothing was stored.
    Exists,
    /// The key is removed.
    Deleted,
    /// There was no such key.
    Missing,
    /// The sum.
    Number(i64),
    /// Nothing was changed.
    Failed(ErrorCode),
}

impl Outcome {
    /// What `body` says of a change; None when it is no answer to one.
    pub fn of(body: &ResponseBody<'_>) -> Option<Self> {
        Some(match body {
            ResponseBody::Stored => Self::Stored,
            ResponseBody::Exists => Self::Exists,
            ResponseBody::Deleted => Self::Deleted,
            ResponseBody::Missing => Self::Missing,
            ResponseBody::Number { value } => Self::Number(*value),
            ResponseBody::Error { code, .. } => Self::Failed(*code),
            _ => return None,
        })
    }

    /// The answer.
    pub fn body(self) -> ResponseBody<'static> {
        match self {
            Self::Stored => ResponseBody::Stored,
            Self::Exists => ResponseBody::Exists,
            Self::Deleted => ResponseBody::Deleted,
            Self::Missing => ResponseBody::Missing,
            Self::Number(value) => ResponseBody::Number { value },
            Self::Failed(code) => ResponseBody::Error { code, message: FAILED_BEFORE },
        }
    }

    fn words(self, place: u64) -> (u64, Option<u64>) {
        let (kind, code, value) = match self {
            Self::Stored => (STORED, 0, None),
            Self::Exists => (EXISTS, 0, None),
            Self::Deleted => (DELETED, 0, None),
            Self::Missing => (MISSING, 0, None),
            Self::Number(value) => (NUMBER, 0, Some(value as u64)),
            Self::Failed(code) => (FAILED, u64::from(code.index()), None),
        };
        (place << PLACE_SHIFT | code << CODE_SHIFT | kind, value)
    }

    fn decode(word: u64, value: u64) -> Option<Self> {
        let code = (word >> CODE_SHIFT) as u8;
        Some(match word & 0xff {
            FAILED => Self::Failed(ErrorCode::from_index(code)?),
            _ if code != 0 => return None,
            STORED => Self::Stored,
            EXISTS => Self::Exists,
            DELETED => Self::Deleted,
            MISSING => Self::Missing,
            NUMBER => Self::Number(value as i64),
            _ => return None,
        })
    }
}

/// What is known of a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Known {
    /// Nothing: it is to be executed, and its result goes to this place.
    New(u64),
    /// It was executed.
    Before(Outcome),
    /// It is so old that its result was forgotten, or so far ahead that there is no place for it. No client that keeps to
    /// its window asks for it.
    OutOfReach,
}

/// The results of a session, for the one connection that may add to them.
pub struct Ledger<'s> {
    window: &'s SessionWindow,
    /// One above the highest place that is taken; 0 while none is.
    next: u64,
}

impl<'s> Ledger<'s> {
    /// Reads where the window ends.
    pub fn open(window: &'s SessionWindow) -> Self {
        let places = window.results.iter().map(|result| result.outcome.load() >> PLACE_SHIFT);
        let highest = places.max().unwrap_or(0);
        Self { window, next: if highest == 0 { 0 } else { highest + 1 } }
    }

    /// What is known of the change with this number.
    pub fn look_up(&self, number: u32) -> Known {
        let place = match self.next {
            0 => PLACES_BEFORE + u64::from(number),
            next => next.wrapping_add_signed(i64::from(number.wrapping_sub(next as u32) as i32)),
        };
        // Places that can be begin above 2^32, and no distance is longer than 2^31.
        if place >= PLACES_MAX || place == 0 || place + SESSION_WINDOW < self.next {
            return Known::OutOfReach;
        }
        if place >= self.next {
            return Known::New(place);
        }
        let result = self.slot(place);
        let word = result.outcome.load();
        if word >> PLACE_SHIFT != place {
            return Known::Before(Outcome::Failed(ErrorCode::Internal));
        }
        // A result that can't be read is damage: what came of the change can't be told, and it is not done again.
        let outcome = Outcome::decode(word, result.value.load());
        Known::Before(outcome.unwrap_or(Outcome::Failed(ErrorCode::Damaged)))
    }

    /// Notes the result of the change at `place`, which is new.
    pub fn note(&self, transaction: &mut Transaction<'_>, place: u64, outcome: Outcome) {
        let result = self.slot(place);
        let (word, value) = outcome.words(place);
        if let Some(value) = value {
            transaction.store_first(&result.value, value);
        }
        transaction.store_first(&result.outcome, word);
    }

    /// The transaction with the result at `place` is committed.
    pub fn noted(&mut self, place: u64) {
        self.next = self.next.max(place + 1);
    }

    fn slot(&self, place: u64) -> &'s SessionResult {
        &self.window.results[(place % SESSION_WINDOW) as usize]
    }
}

/// Forgets all results; the record is free.
pub(super) fn clear(memory: &Memory, window: &SessionWindow) {
    for result in window.results.iter().filter(|result| result.outcome.load() != 0) {
        memory.store(&result.outcome, 0);
    }
}

/// Whether the record's results can be what sessions leave; else what is wrong.
///
/// # Errors
/// What is wrong.
pub fn verify(window: &SessionWindow) -> Result<(), String> {
    for (slot, result) in (0u64..).zip(&window.results) {
        let word = result.outcome.load();
        let place = word >> PLACE_SHIFT;
        if word != 0 && (place % SESSION_WINDOW != slot || place < PLACES_BEFORE / 2) {
            return Err(format!("result {slot} says that it is of place {place}"));
        }
        if word != 0 && Outcome::decode(word, 0).is_none() {
            return Err(format!("result {slot} is none: {word:#x}"));
        }
    }
    Ok(())
}
