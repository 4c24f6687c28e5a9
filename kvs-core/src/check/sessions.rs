//! Sessions: each is one client's, its owner is the connection that says so too, and its results are where they belong.

use std::collections::{HashMap, HashSet};

use super::Walk;
use crate::connection::slot;
use crate::limits::{CONNECTIONS_MAX_LIMIT, SESSIONS_MAX};
use crate::segment::layout::{ConnectionSlot, Header, SessionHead, SessionWindow};
use crate::session::{self, FREE, USED, record};
use crate::sys::memory::Damaged;
use crate::wire::SessionToken;

impl Walk<'_> {
    /// Holds sessions and connections against each other.
    pub(super) fn sessions(&mut self, header: &Header) -> Result<(), Damaged> {
        let count = header.sessions_reserved.load();
        let count = super::bounded(&mut self.report, "sessions", count, SESSIONS_MAX);
        let named = self.named_sessions(header, count)?;
        let mut tokens = HashSet::new();
        for index in 0..count {
            let head: &SessionHead = self.view.view().object(self.view.regions().session_head(index))?;
            let window: &SessionWindow =
                self.view.view().object(self.view.regions().session_window(index))?;
            let verified = verify(head, window, &mut tokens, |owner| named.get(&owner) == Some(&index));
            self.report.sessions += u64::from(head.state.load() == USED);
            self.report.sound(verified.map_err(|fault| format!("session {index}: {fault}")));
        }
        Ok(())
    }

    /// The session that each connection names.
    fn named_sessions(&mut self, header: &Header, count: u64) -> Result<HashMap<u64, u64>, Damaged> {
        let mut named = HashMap::new();
        let slots = header.connection_slots_reserved.load().min(u64::from(CONNECTIONS_MAX_LIMIT));
        for index in 0..slots {
            let slot: &ConnectionSlot = self.view.view().object(self.view.regions().connection(index))?;
            match session::of(slot) {
                None => {}
                Some(session) if slot::is_used(slot) && session < count => {
                    named.insert(slot.id.load(), session);
                }
                Some(session) => self.report.fault(format!(
                    "connection slot {index}: it names session {session}, which it can't have"
                )),
            }
        }
        Ok(named)
    }
}

/// Verifies one record. What is found is told without the token, which is a secret.
fn verify(
    head: &SessionHead,
    window: &SessionWindow,
    tokens: &mut HashSet<SessionToken>,
    has: impl Fn(u64) -> bool,
) -> Result<(), String> {
    match head.state.load() {
        FREE => return Ok(()),
        USED => {}
        state => return Err(format!("its state is {state}")),
    }
    let token = SessionToken::from_words([head.token[0].load(), head.token[1].load()]);
    if token.is_zero() {
        return Err("it has no token".into());
    }
    if !tokens.insert(token) {
        return Err("it has the token of another".into());
    }
    let owner = head.owner.load();
    if owner != 0 && !has(owner) {
        return Err(format!("it is said to be connection {owner}'s, which knows nothing of it"));
    }
    record::verify(window)
}
