//! The link to the data server that serves: clients handed over, answers awaited.
//!
//! Invariants
//! - One thread at a time hands clients over, in the order of the queue.
//! - What could not be sent goes back to the head of the queue: a client is lost only with the data server that has it.
//!
//! Locks: `handing` is taken first and held while a batch is sent; `state`, and the clients' own, for a moment only. A
//! send waits for [`SEND_PATIENCE`] at most, also for a data server that hangs.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender};
use kvs_core::control::{
    self, ADOPTED_MAX, Adopted, ClientInfo, ControlError, DataMessage, FrontMessage, StatisticOwned,
};

use kvs_core::sys::fd_passing::PassingError;
use kvs_core::sys::priority::BREATH;

use crate::clients::{Client, Clients, Number};

/// How long a send to the data server may wait for room.
pub const SEND_PATIENCE: Duration = Duration::from_secs(1);
/// How long the operator waits for the data server's answer.
const ANSWER_PATIENCE: Duration = Duration::from_secs(3);

/// An answer to the operator.
enum Reply {
    /// The counters.
    Statistics(Vec<(String, StatisticOwned)>),
    /// Some of the clients, and whether these are the last.
    Clients(Vec<ClientInfo>, bool),
}

/// What became of an attempt to hand clients over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HandOver {
    /// Nobody is left to be handed over, or nobody is there to take them; whoever comes next takes all.
    Done,
    /// The data server took none; it is to be tried again.
    Refused,
}

/// The link to the data server that serves now, if one does.
pub struct Link {
    handing: Mutex<()>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    server: Option<Peer>,
    next_ticket: u32,
    awaited: HashMap<u32, Sender<Reply>>,
}

#[derive(Clone)]
struct Peer {
    generation: u64,
    socket: Arc<OwnedFd>,
}

impl Link {
    /// To nobody.
    pub fn new() -> Self {
        Self { handing: Mutex::new(()), state: Mutex::new(State::default()) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on to the data server of this generation.
    pub fn connect(&self, generation: u64, socket: Arc<OwnedFd>) {
        self.state().server = Some(Peer { generation, socket });
    }

    /// From now on to nobody; answers that are awaited won't come.
    pub fn disconnect(&self) {
        let mut state = self.state();
        state.server = None;
        state.awaited.clear();
    }

    /// Hands all waiting clients over. When no data server is there they go on waiting.
    pub fn hand_over(&self, clients: &Clients) -> HandOver {
        let _turn = self.handing.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let Some(Peer { generation, socket }) = self.state().server.clone() else {
                return HandOver::Done;
            };
            let taken = clients.take_waiting(ADOPTED_MAX, generation);
            if taken.is_empty() {
                return HandOver::Done;
            }
            if let Err(error) = send_clients(socket.as_fd(), &taken) {
                log::debug!("{} clients go on waiting: {error}", taken.len());
                clients.put_back(&taken);
                return HandOver::Refused;
            }
            if taken.len() == ADOPTED_MAX {
                std::thread::sleep(BREATH);
            }
        }
    }

    /// Hands all clients over that the data servers before had, the `first` first, and tells the one of this generation that these
    /// were all.
    ///
    /// # Errors
    /// It is dead, or takes none: the next one gets them.
    pub fn restore(&self, clients: &Clients, generation: u64, first: &[Number]) -> Result<(), ControlError> {
        clients.requeue(generation, first);
        if self.hand_over(clients) == HandOver::Refused {
            return Err(PassingError::WouldBlock.into());
        }
        let Some(peer) = self.state().server.clone() else { return Err(PassingError::Disconnected.into()) };
        control::send(peer.socket.as_fd(), &FrontMessage::Restored, &[])
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

    fn ask(&self, message: impl FnOnce(u32) -> FrontMessage) -> Option<Awaited<'_>> {
        let (sender, replies) = crossbeam_channel::unbounded();
        let (ticket, socket) = {
            let mut state = self.state();
            let socket = Arc::clone(&state.server.as_ref()?.socket);
            state.next_ticket = state.next_ticket.wrapping_add(1);
            let ticket = state.next_ticket;
            state.awaited.insert(ticket, sender);
            (ticket, socket)
        };
        let awaited = Awaited { link: self, ticket, replies };
        match control::send(socket.as_fd(), &message(ticket), &[]) {
            Ok(()) => Some(awaited),
            Err(error) => {
                log::debug!("can't ask the data server: {error}");
                None
            }
        }
    }

    /// The counters of the data server; None when it doesn't answer.
    pub fn statistics(&self) -> Option<Vec<(String, StatisticOwned)>> {
        match self.ask(|ticket| FrontMessage::Stats { ticket })?.next()? {
            Reply::Statistics(statistics) => Some(statistics),
            Reply::Clients(..) => None,
        }
    }

    /// Who is connected; None when the data server doesn't answer.
    pub fn clients(&self) -> Option<Vec<ClientInfo>> {
        let replies = self.ask(|ticket| FrontMessage::Clients { ticket })?;
        let mut all = Vec::new();
        loop {
            match replies.next()? {
                Reply::Clients(clients, last) => {
                    all.extend(clients);
                    if last {
                        return Some(all);
                    }
                }
                Reply::Statistics(_) => return None,
            }
        }
    }
}

/// Answers that are awaited until this is dropped.
struct Awaited<'l> {
    link: &'l Link,
    ticket: u32,
    replies: Receiver<Reply>,
}

impl Awaited<'_> {
    fn next(&self) -> Option<Reply> {
        self.replies.recv_timeout(ANSWER_PATIENCE).ok()
    }
}

impl Drop for Awaited<'_> {
    fn drop(&mut self) {
        self.link.state().awaited.remove(&self.ticket);
    }
}

fn send_clients(socket: BorrowedFd<'_>, taken: &[(Number, Client)]) -> Result<(), ControlError> {
    let connections = taken
        .iter()
        .map(|(number, client)| Adopted { connection: *number, transport: client.transport })
        .collect();
    let sockets: Vec<BorrowedFd<'_>> = taken.iter().map(|(_, client)| client.socket.as_fd()).collect();
    control::send(socket, &FrontMessage::Adopt { connections }, &sockets)
}

#[cfg(test)]
mod tests {
    //! Goal: clients reach the data server or go on waiting, and answers reach who asked. Method: a data server played by
    //! the test, on a socket pair.

    use kvs_core::control::Transport;
    use rustix::net::sockopt;

    use super::*;

    fn pair() -> (Arc<OwnedFd>, OwnedFd) {
        let (own, theirs) = control::socket_pair().expect("a pair");
        let patience = Some(Duration::from_millis(20));
        sockopt::set_socket_timeout(&own, sockopt::Timeout::Send, patience).expect("a time-out");
        (Arc::new(own), theirs)
    }

    fn add(clients: &Clients, count: usize) {
        for _ in 0..count {
            let socket = std::fs::File::open("/dev/null").expect("a descriptor");
            clients.add(Transport::Tcp, socket.into(), u32::MAX).expect("room");
        }
    }

    fn adopted(theirs: &OwnedFd) -> usize {
        match control::receive::<FrontMessage>(theirs.as_fd()).expect("a message").expect("open").0 {
            FrontMessage::Adopt { connections } => connections.len(),
            other => panic!("not {other:?}"),
        }
    }

    #[test]
    fn link_to_nobody_keeps_clients_waiting_for_whoever_comes() {
        let (link, clients) = (Link::new(), Clients::new());
        add(&clients, ADOPTED_MAX + 1);
        assert_eq!(link.hand_over(&clients), HandOver::Done);
        assert_eq!(clients.count().waiting, ADOPTED_MAX + 1);
        let (own, theirs) = pair();
        link.connect(1, own);
        assert_eq!(link.hand_over(&clients), HandOver::Done);
        assert_eq!((adopted(&theirs), adopted(&theirs)), (ADOPTED_MAX, 1));
        assert_eq!(clients.count().waiting, 0);
    }

    #[test]
    fn link_to_one_who_hangs_or_died_puts_clients_back() {
        let (link, clients) = (Link::new(), Clients::new());
        let (own, theirs) = pair();
        link.connect(1, own);
        let mut sent = 0;
        let refused = loop {
            add(&clients, ADOPTED_MAX);
            if link.hand_over(&clients) == HandOver::Refused {
                break clients.count().waiting;
            }
            sent += 1;
            assert!(sent < 10_000, "a socket holds so much only");
        };
        assert_eq!(refused, ADOPTED_MAX);
        assert_eq!(adopted(&theirs), ADOPTED_MAX);
        assert_eq!(link.hand_over(&clients), HandOver::Done, "there is room again");
        drop(theirs);
        add(&clients, 1);
        assert_eq!(link.hand_over(&clients), HandOver::Refused);
        link.disconnect();
        assert_eq!(clients.requeue(2, &[]), (sent + 1) * ADOPTED_MAX);
        assert_eq!(clients.count().waiting, (sent + 1) * ADOPTED_MAX + 1);
    }

    #[test]
    fn link_answers_go_to_who_asked_and_end_with_the_data_server() {
        let link = Link::new();
        assert!(link.statistics().is_none(), "nobody is there");
        let (own, theirs) = pair();
        link.connect(1, own);
        std::thread::scope(|scope| {
            let asking = scope.spawn(|| link.statistics());
            let (message, _) =
                control::receive::<FrontMessage>(theirs.as_fd()).expect("asked").expect("open");
            let FrontMessage::Stats { ticket } = message else { panic!("not {message:?}") };
            link.answer(DataMessage::Stats { ticket: ticket + 1, statistics: Vec::new() });
            let statistics = vec![("entries".to_owned(), StatisticOwned::Number(7))];
            link.answer(DataMessage::Stats { ticket, statistics: statistics.clone() });
            assert_eq!(asking.join().expect("no panic"), Some(statistics));
            let asking = scope.spawn(|| link.clients());
            let _ = control::receive::<FrontMessage>(theirs.as_fd()).expect("asked");
            link.disconnect();
            assert!(asking.join().expect("no panic").is_none());
        });
        assert!(link.state().awaited.is_empty());
    }
}
