//! Who keeps duplicates of the clients' sockets besides this process: the front server, and the standby.
//!
//! Invariants
//! - A keeper learns of a client before it learns that the client is closed: both go over one socket, and a worker tells both,
//!   or the main thread tells the first before the worker has the client.
//! - A keeper that takes nothing delays nobody: it is told later. One that is gone is told nothing more.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvs_core::control::{self, ADOPTED_MAX, CLOSED_MAX, ControlError, DataMessage, Seat};
use kvs_core::sys::fd_passing::PassingError;

/// Pause between two messages with clients: whoever is told has the other core meanwhile, which clients may need as well.
const INTRODUCTION_PAUSE: Duration = Duration::from_millis(1);
/// A keeper is told of a closed client so much later at most: of those that are closed meanwhile, too, in one message. To tell it of
/// each would wake it as often, on a core that whoever connects next may wait for.
const CLOSED_PAUSE: Duration = Duration::from_millis(1);
/// Pause before a keeper is told again what it had no room for.
pub const RETRY_PAUSE: Duration = Duration::from_millis(10);

/// A keeper, as a worker tells it of its clients.
pub struct Keeper {
    socket: Arc<OwnedFd>,
    /// Clients in places from here on are still to be introduced.
    strangers_from: Option<usize>,
    /// When the next of them are.
    introduce_at: Instant,
    /// Closed, and it doesn't know yet.
    closed: Vec<u64>,
    /// When it is told so.
    tell_at: Instant,
}

impl Keeper {
    /// One that knows all clients.
    pub fn informed(socket: Arc<OwnedFd>) -> Self {
        let now = Instant::now();
        Self { socket, strangers_from: None, introduce_at: now, closed: Vec::new(), tell_at: now }
    }

    /// One that knows none.
    pub fn ignorant(socket: Arc<OwnedFd>) -> Self {
        Self { strangers_from: Some(0), ..Self::informed(socket) }
    }

    /// A client was closed.
    pub fn note_closed(&mut self, connection: u64) {
        if self.closed.is_empty() {
            self.tell_at = Instant::now() + CLOSED_PAUSE;
        }
        self.closed.push(connection);
    }

    /// When it is to be told something.
    pub fn due(&self) -> Option<Instant> {
        let untold = (!self.closed.is_empty()).then_some(self.tell_at);
        untold.into_iter().chain(self.strangers_from.map(|_| self.introduce_at)).min()
    }

    /// Lets it drop its duplicates of those that were closed, when it is time or they are many.
    pub fn tell_closed(&mut self) {
        let are_many = self.closed.len() >= CLOSED_MAX;
        // In most rounds there is none, and no reason to look at the clock.
        if !self.closed.is_empty() && (are_many || self.tell_at <= Instant::now()) {
            self.tell_all_closed();
        }
    }

    /// Lets it drop its duplicates of all that were closed.
    pub fn tell_all_closed(&mut self) {
        while !self.closed.is_empty() {
            let from = self.closed.len().saturating_sub(CLOSED_MAX);
            let told = DataMessage::Closed { connections: self.closed[from..].to_vec() };
            match control::try_send(self.socket.as_fd(), &told, &[]) {
                Ok(()) => self.closed.truncate(from),
                Err(ControlError::Passing(PassingError::WouldBlock)) => {
                    self.tell_at = Instant::now() + RETRY_PAUSE;
                    return;
                }
                // It is gone, and its duplicates with it.
                Err(_) => self.closed.clear(),
            }
        }
    }

    /// Gives it duplicates of some more sockets, one message's worth: clients that are served wait no longer than that takes; `places` are all clients by their place.
    pub fn introduce<'c>(&mut self, places: impl Fn(usize) -> Option<(Seat, BorrowedFd<'c>)>, count: usize) {
        let Some(from) = self.strangers_from.filter(|_| self.introduce_at <= Instant::now()) else { return };
        let mut rest = (from..count).filter_map(|place| Some((place, places(place)?)));
        let batch: Vec<(usize, (Seat, BorrowedFd<'c>))> = rest.by_ref().take(ADOPTED_MAX).collect();
        let last = rest.next().is_none();
        let next = batch.last().map_or(from, |(place, _)| place + 1);
        let connections = batch.iter().map(|(_, (seat, _))| *seat).collect();
        let sockets: Vec<BorrowedFd<'_>> = batch.iter().map(|(_, (_, socket))| *socket).collect();
        self.introduce_at = Instant::now() + INTRODUCTION_PAUSE;
        match control::try_send(self.socket.as_fd(), &DataMessage::Introduce { connections, last }, &sockets)
        {
            Ok(()) => self.strangers_from = (!last).then_some(next),
            // It is gone, and the next one is told of all again.
            Err(ControlError::Passing(PassingError::Disconnected)) => self.strangers_from = None,
            // No room, or the kernel is short of memory just now.
            Err(_) => self.introduce_at = Instant::now() + RETRY_PAUSE,
        }
    }
}
