//! The socket to the data server, and the answers that are awaited from it.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender};
use kvs_core::control::{
    self, ADOPTED_MAX, Adopted, ClientInfo, ControlError, DataMessage, FrontMessage, StatisticOwned,
};

use crate::clients::Clients;

/// How long the operator waits for the data server's answer.
const ANSWER_PATIENCE: Duration = Duration::from_secs(3);

/// An answer to the operator.
pub enum Reply {
    /// The counters.
    Statistics(Vec<(String, StatisticOwned)>),
    /// Some of the clients, and whether these are the last.
    Clients(Vec<ClientInfo>, bool),
}

/// The link to the data server that serves now, if one does.
pub struct Link {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    socket: Option<Arc<OwnedFd>>,
    next_ticket: u32,
    awaited: HashMap<u32, Sender<Reply>>,
}

impl Link {
    /// To nobody.
    pub fn new() -> Self {
        Self { state: Mutex::new(State::default()) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on to this one.
    pub fn connect(&self, socket: Arc<OwnedFd>) {
        self.state().socket = Some(socket);
    }

    /// From now on to nobody; answers that are awaited won't come.
    pub fn disconnect(&self) {
        let mut state = self.state();
        state.socket = None;
        state.awaited.clear();
    }

    /// Sends a message without descriptors; false when nobody is there.
    pub fn send(&self, message: &FrontMessage) -> bool {
        let Some(socket) = self.state().socket.clone() else { return false };
        match control::send(socket.as_fd(), message, &[]) {
            Ok(()) => true,
            Err(error) => {
                log::debug!("can't tell the data server: {error}");
                false
            }
        }
    }

    /// Hands all clients over that no data server has. When there is none they wait.
    pub fn hand_over_waiting(&self, clients: &Clients) {
        let Some(socket) = self.state().socket.clone() else { return };
        for numbers in clients.waiting().chunks(ADOPTED_MAX) {
            if let Err(error) = hand_over(&socket, clients, numbers) {
                log::debug!("clients wait for the next data server: {error}");
                return;
            }
        }
    }

    /// Takes a message from the data server that answers the operator.
    pub fn answer(&self, message: DataMessage) {
        let (ticket, reply, last) = match message {
            DataMessage::Stats { ticket, statistics } => (ticket, Reply::Statistics(statistics), true),
            DataMessage::Clients { ticket, clients, last } => (ticket, Reply::Clients(clients, last), last),
            _ => return,
        };
        let mut state = self.state();
        let waiter = if last { state.awaited.remove(&ticket) } else { state.awaited.get(&ticket).cloned() };
        if let Some(waiter) = waiter {
            // Whoever asked may have given up.
            let _ = waiter.send(reply);
        }
    }

    fn ask(&self, message: impl FnOnce(u32) -> FrontMessage) -> Option<Receiver<Reply>> {
        let (sender, receiver) = crossbeam_channel::unbounded();
        let ticket = {
            let mut state = self.state();
            state.next_ticket = state.next_ticket.wrapping_add(1);
            let ticket = state.next_ticket;
            state.awaited.insert(ticket, sender);
            ticket
        };
        if self.send(&message(ticket)) {
            return Some(receiver);
        }
        self.state().awaited.remove(&ticket);
        None
    }

    /// The counters of the data server; None when it doesn't answer.
    pub fn statistics(&self) -> Option<Vec<(String, StatisticOwned)>> {
        match self.ask(|ticket| FrontMessage::Stats { ticket })?.recv_timeout(ANSWER_PATIENCE) {
            Ok(Reply::Statistics(statistics)) => Some(statistics),
            _ => None,
        }
    }

    /// Who is connected; None when the data server doesn't answer.
    pub fn clients(&self) -> Option<Vec<ClientInfo>> {
        let replies = self.ask(|ticket| FrontMessage::Clients { ticket })?;
        let mut all = Vec::new();
        loop {
            match replies.recv_timeout(ANSWER_PATIENCE) {
                Ok(Reply::Clients(clients, last)) => {
                    all.extend(clients);
                    if last {
                        return Some(all);
                    }
                }
                _ => return None,
            }
        }
    }
}

fn hand_over(socket: &OwnedFd, clients: &Clients, numbers: &[u64]) -> Result<(), ControlError> {
    clients.hand_over(numbers, |chosen| {
        let connections = chosen
            .iter()
            .map(|(number, client)| Adopted { connection: *number, transport: client.transport })
            .collect();
        let sockets: Vec<BorrowedFd<'_>> = chosen.iter().map(|(_, client)| client.socket.as_fd()).collect();
        control::send(socket.as_fd(), &FrontMessage::Adopt { connections }, &sockets)
    })
}
