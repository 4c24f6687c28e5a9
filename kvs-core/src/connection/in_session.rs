//! What a connection does for its client's session: joining and ending it, and executing a change once.
//!
//! A change of a session is executed under the session's lock, from the look whether it was executed before to the commit
//! that stores its result. The result is that of the answer: whatever answers a change is remembered with it.

use std::sync::MutexGuard;

use super::context::Context;
use super::{Connection, Fatal, Step};
use crate::limits::SESSION_WINDOW;
use crate::session::Sessions;
use crate::session::record::{Known, Outcome};
use crate::session::registry::JoinError;
use crate::transaction::{Transaction, TransactionError};
use crate::wire::{ErrorCode, Response, ResponseBody, SessionToken};

const SUPERSEDED: &str = "this connection may not change anything: a newer connection of the same client has its session, or the \
     session is over; connect again";
const OUT_OF_REACH: &str = "the request's number has no place in the session: number changes one by one, and have no more of them \
     unanswered than Session said";
const NO_TOKEN: &str = "a session needs a token of random bytes";
const NO_MEMORY: &str =
    "no memory for another session: /dev/shm is full; what is asked is executed, but not remembered";
const NO_SESSIONS: &str = "sessions are not kept here";

/// How it is with a change.
pub(super) enum Turn<'s> {
    /// It is to be executed, with this to be held meanwhile.
    Execute(Option<MutexGuard<'s, ()>>),
    /// It was executed; this came of it.
    Answer(Outcome),
    /// The connection can't go on.
    Refuse(&'static str),
    /// What came of it may not be told yet.
    Wait,
}

impl From<JoinError> for Joined {
    fn from(error: JoinError) -> Self {
        Self::Join(error)
    }
}

impl From<Fatal> for Joined {
    fn from(fatal: Fatal) -> Self {
        Self::Fatal(fatal)
    }
}

/// Why a session was not joined.
enum Joined {
    Join(JoinError),
    Fatal(Fatal),
}

impl<'s> Connection<'s> {
    /// Joins the session of `token`.
    pub(super) fn join_session(
        &mut self,
        context: &mut Context<'s>,
        end: u64,
        number: u32,
        (token, attempt): (SessionToken, u64),
    ) -> Result<Step, Fatal> {
        let refused = |code, message| Response { number, body: ResponseBody::Error { code, message } };
        let Some(sessions) = context.sessions else {
            return self.answer(context, end, &refused(ErrorCode::UnknownMessage, NO_SESSIONS));
        };
        if token.is_zero() {
            return self.refuse(context, number, ErrorCode::Session, NO_TOKEN);
        }
        // One that it is in already, for clients that change their mind.
        self.leave_session(context)?;
        let (segment, worker, slot) = (self.segment, context.slot, self.slot);
        let joined = sessions.join(
            segment,
            (worker, slot),
            (token, attempt),
            |transaction, resumed| -> Result<(), Joined> {
                let body = ResponseBody::Session { resumed, window: SESSION_WINDOW as u32 };
                Ok(self.commit_answer(context, transaction, end, &Response { number, body })?)
            },
        );
        match joined {
            Ok(mut member) => {
                member.unsynced = context.unsynced_rings();
                self.session = Some(member);
                Ok(Step::Done)
            }
            Err(Joined::Join(JoinError::Superseded)) => {
                self.refuse(context, number, ErrorCode::Session, SUPERSEDED)
            }
            Err(Joined::Join(JoinError::Full(_))) => {
                self.answer(context, end, &refused(ErrorCode::StoreFull, NO_MEMORY))
            }
            Err(Joined::Join(JoinError::Transaction(error))) => Err(error.into()),
            Err(Joined::Fatal(fatal)) => Err(fatal),
        }
    }

    /// Ends the session for good: its client has all its answers.
    pub(super) fn end_session(
        &mut self,
        context: &mut Context<'s>,
        end: u64,
        number: u32,
    ) -> Result<Step, Fatal> {
        let response = Response { number, body: ResponseBody::Session { resumed: false, window: 0 } };
        let (Some(sessions), Some(member)) = (context.sessions, self.session.take()) else {
            return self.answer(context, end, &response);
        };
        let (segment, worker, slot) = (self.segment, context.slot, self.slot);
        sessions.end(segment, (worker, slot), &member, |transaction| {
            self.commit_answer(context, transaction, end, &response)
        })?;
        Ok(Step::Done)
    }

    /// Leaves the session to the client's next connection.
    pub(super) fn leave_session(&mut self, context: &Context<'s>) -> Result<(), TransactionError> {
        let Some(member) = self.session.take() else { return Ok(()) };
        let leave = || crate::session::leave(self.segment, context.slot, self.slot, crate::session::now_ms());
        context.sessions.map_or_else(leave, |sessions| sessions.leave(&member, leave))
    }

    /// How it is with the change that carries `number`; notes where its result goes if it is to be executed.
    pub(super) fn begin_change(&mut self, context: &Context<'s>, number: u32) -> Turn<'s> {
        self.place = None;
        let Some(member) = &mut self.session else { return Turn::Execute(None) };
        let Some(sessions) = context.sessions else { return Turn::Refuse(NO_SESSIONS) };
        let lock = Sessions::lock(sessions, member.index());
        if !member.is_owner(self.id) {
            return Turn::Refuse(SUPERSEDED);
        }
        match member.ledger().look_up(number) {
            Known::New(place) => {
                self.place = Some(place);
                Turn::Execute(Some(lock))
            }
            // It may have been made a moment before the server died, and have to be synced still.
            Known::Before(_) if !context.is_all_synced(&mut member.unsynced) => Turn::Wait,
            Known::Before(outcome) => Turn::Answer(outcome),
            Known::OutOfReach => Turn::Refuse(OUT_OF_REACH),
        }
    }

    /// Adds the result of the change at hand to the transaction that answers it. Returns its place, if it has one.
    pub(super) fn note_result(
        &mut self,
        transaction: &mut Transaction<'s>,
        body: &ResponseBody<'_>,
    ) -> Option<u64> {
        let (place, outcome) = (self.place?, Outcome::of(body)?);
        self.session.as_mut()?.ledger().note(transaction, place, outcome);
        Some(place)
    }

    /// The transaction is committed.
    pub(super) fn result_noted(&mut self, place: Option<u64>) {
        if let (Some(place), Some(member)) = (place, &mut self.session) {
            member.ledger().noted(place);
        }
    }
}
