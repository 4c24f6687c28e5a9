//! What the front server and the data server say to each other.
//!
//! One message is one packet of a `SOCK_SEQPACKET` pair, in postcard's encoding, with the descriptors it speaks of.
//! Whoever launches the other holds one end, and the one launched finds the other end as its standard input.
//!
//! ```text
//! front                                 data, launched by it
//!   │ Start     + estate, liveness page, (segment) │
//!   │─────────────────────────────────────────────►│
//!   │ Ready                            + segment   │     or Failed, and it ends
//!   │◄─────────────────────────────────────────────│
//!   │ Adopt     + client sockets                   │
//!   │─────────────────────────────────────────────►│
//!   │ Closed                                       │
//!   │◄─────────────────────────────────────────────│
//!   │ Ending, Stop                                 │
//!   │─────────────────────────────────────────────►│     Stopped, and it ends
//!
//! front, launched by it                 data
//!   │ Inherit   + estate, liveness page, process, segment
//!   │◄─────────────────────────────────────────────│
//!   │ Supervising                                  │
//!   │─────────────────────────────────────────────►│
//!   │ Introduce + client sockets                   │
//!   │◄─────────────────────────────────────────────│     and on as above
//!
//! data, which serves                    standby
//!   │ Active + epolls of its workers               │     over a link that the front server made
//!   │─────────────────────────────────────────────►│
//!   │ Introduce + client sockets, Closed, NewFront │
//!   │─────────────────────────────────────────────►│     Standing, Holds, Ready: to the front server
//! ```
//!
//! Invariants
//! - Both ends are the same release: either server starts the other one that lies beside it.
//! - A packet is taken whole or refused, and it is refused when it has not the descriptors it speaks of. Refused ones are
//!   closed.
//! - The first message is in the socket before the process that shall read it is launched: one that lives has all it needs to
//!   go on alone.
//!
//! No lock: the kernel keeps packets apart, so any thread may send; one thread at each end receives. A crash loses what
//! its sender had not sent; the other end sees everything before, and then the end.

use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::limits::CONNECTIONS_MAX_LIMIT;
use crate::sys::fd_passing::{self, DESCRIPTORS_PER_MESSAGE_MAX, PassingError, Wait};
use crate::sys::process::ProcessIdentity;

/// Longest message, in bytes; also the size of the buffer to receive with.
pub const MESSAGE_BYTES_MAX: usize = 64 << 10;
/// Most sockets in one Adopt.
pub const ADOPTED_MAX: usize = 64;
/// Most connections told of in one Closed.
pub const CLOSED_MAX: usize = 1024;
/// Most connections told of in one Holds.
pub const HOLDS_MAX: usize = 512;
/// Most clients told of in one Clients.
pub const CLIENTS_MAX: usize = 256;

const _: () = assert!(ADOPTED_MAX <= DESCRIPTORS_PER_MESSAGE_MAX);

/// How a client is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// The unix socket.
    Unix,
}

impl std::fmt::Display for Transport {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Transport::Tcp => "tcp",
            Transport::Unix => "unix",
        })
    }
}

/// A connection whose socket comes with the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adopted {
    /// Its number, never used again.
    pub connection: u64,
    /// How the client came.
    pub transport: Transport,
}

/// A connection that is served, and where in the segment. Its socket comes with the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seat {
    /// The connection.
    pub adopted: Adopted,
    /// Its slot.
    pub slot: u64,
}

/// Bits of a place in a token.
const PLACE_BITS: u32 = 18;
const _: () = assert!(CONNECTIONS_MAX_LIMIT < 1 << PLACE_BITS);

/// What a worker's epoll says of a client: its place at the worker, and above that the number of its connection, by which a data server
/// that goes on with the epoll knows who is meant. The highest bits of a number are left out, which are 0 for some years from the start
/// of the machine on.
pub const fn token(place: usize, connection: u64) -> u64 {
    connection << PLACE_BITS | place as u64 & ((1 << PLACE_BITS) - 1)
}

/// The place in a token.
#[inline]
pub const fn token_place(token: u64) -> usize {
    (token & ((1 << PLACE_BITS) - 1)) as usize
}

/// The connection in a token.
pub const fn token_connection(token: u64) -> u64 {
    token >> PLACE_BITS
}

/// Version of the messages; raised with every change of one, so that an upgrade does not put two releases together that don't
/// understand each other.
pub const CONTROL_VERSION: u32 = 5;

/// What a data server is launched for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// To serve. Nobody has served the segment before, or no client of that time is left.
    First,
    /// To serve a segment of which no process is left, though somebody has kept its clients' sockets, which follow.
    Heir,
    /// To serve in the place of one that died, whose clients' sockets follow. Descriptors: the segment, and the epolls of its workers if it
    /// had passed them.
    Successor {
        /// How many workers those are of; 0 if it hadn't.
        workers: u32,
    },
    /// To take over when the one that serves dies. Descriptors: the segment, the liveness page of the one that serves, and the
    /// end of a link to it.
    Standby,
}

impl Role {
    /// How many descriptors go with it.
    pub const fn descriptors(self) -> usize {
        match self {
            Role::First | Role::Heir => 0,
            Role::Successor { workers } => 1 + workers as usize,
            Role::Standby => 3,
        }
    }
}

/// The file of a unix socket, told from any other that may have its path later.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketFileMark {
    /// Its path, which need not be text.
    pub path: Vec<u8>,
    /// Device and inode.
    pub place: (u64, u64),
    /// When it was made, in seconds and nanoseconds; an inode's number alone is soon used again.
    pub made: (i64, i64),
}

/// What outlives the front server: the data server keeps it for the next one. Descriptors: the listening sockets for TCP
/// clients, local clients and operators, and the operator's standard input if there is a console on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EstateMark {
    /// The file of the local clients' socket.
    pub unix: SocketFileMark,
    /// The file of the operators' socket.
    pub console: SocketFileMark,
    /// Whether there is a console on standard input.
    pub has_input: bool,
}

impl EstateMark {
    /// How many descriptors go with it.
    pub fn descriptors(&self) -> usize {
        3 + usize::from(self.has_input)
    }
}

/// From the front server to the data server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FrontMessage {
    /// The first message to a data server. Descriptors: the estate's, the front server's process and liveness page, the data server's liveness
    /// page, and those of its role.
    Start {
        /// The front server.
        front: ProcessIdentity,
        /// Its process group, which the terminal may belong to.
        group: u32,
        /// Where TCP clients connect.
        tcp_address: String,
        /// Where local clients connect.
        unix_path: String,
        /// What it is launched for.
        role: Role,
        /// What the next front server gets.
        estate: EstateMark,
    },
    /// A front server that the data server launched has taken over. Descriptor: its liveness page.
    Supervising {
        /// Its process group.
        group: u32,
    },
    /// Clients to be served, those of a data server that died among them: the segment tells which. Descriptors: a socket for
    /// each, in order.
    Adopt {
        /// The clients.
        connections: Vec<Adopted>,
    },
    /// All clients of the data server that died have been passed.
    Restored,
    /// Asks for all clients to be introduced: this front server doesn't know them all.
    Introduce,
    /// A standby was launched, which is to be told of all clients. Descriptors: the end of a link to it, its process, its
    /// liveness page.
    Standby {
        /// It.
        process: ProcessIdentity,
    },
    /// The standby is gone.
    NoStandby,
    /// To a standby, from a front server that took over: who it is. Descriptors: its process, its liveness page.
    Watching {
        /// It.
        front: ProcessIdentity,
        /// Its process group.
        group: u32,
    },
    /// Asks for the counters.
    Stats {
        /// Given back with the answer.
        ticket: u32,
    },
    /// Asks who is connected.
    Clients {
        /// Given back with the answer.
        ticket: u32,
    },
    /// The store ends: when this front server dies now, no other one is launched.
    Ending,
    /// Finish what is being served, and end.
    Stop,
}

/// How the store came to its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum StartKind {
    /// The segment was there.
    Attached,
    /// From the backup file.
    Loaded,
    /// There was nothing.
    New,
}

impl std::fmt::Display for StartKind {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            StartKind::Attached => "attached",
            StartKind::Loaded => "loaded",
            StartKind::New => "new",
        })
    }
}

/// The value of a counter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum StatisticOwned {
    /// A number.
    Number(u64),
    /// A text.
    Text(String),
    /// Nothing now.
    Absent,
}

/// A connected client, for the operator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientInfo {
    /// Number of the connection.
    pub connection: u64,
    /// How it came.
    pub transport: Transport,
    /// What it calls itself; empty before its hello.
    pub name: String,
    /// Its process id as it told, 0 before its hello.
    pub pid: u32,
    /// Bytes taken from it.
    pub received: u64,
    /// Bytes given to it.
    pub sent: u64,
}

/// From the data server to the front server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DataMessage {
    /// The first message to a front server that takes the place of a dead one. Descriptors: the estate's, the data server's
    /// liveness page and process, the segment; and if there is a standby a socket to it, its process, its liveness page.
    Inherit {
        /// The data server.
        process: ProcessIdentity,
        /// Process group of the dead front server.
        group: u32,
        /// Worker threads of the data server, each of which introduces its clients.
        workers: u32,
        /// What the dead front server left.
        estate: EstateMark,
        /// The standby.
        standby: Option<ProcessIdentity>,
    },
    /// The first message to a standby over its link. Descriptors: the epolls of its workers, in which its clients are, and stay when it
    /// dies.
    Active {
        /// Worker threads, each of which introduces its clients.
        workers: u32,
    },
    /// To a standby over its link: another front server is about to be launched. Descriptor: a socket to it.
    NewFront,
    /// A standby has all clients' sockets and could take over.
    Standing,
    /// A data server that took over has the sockets of these clients.
    Holds {
        /// Their numbers.
        connections: Vec<u64>,
    },
    /// Clients that are served already. Descriptors: a duplicate of each one's socket, in order.
    Introduce {
        /// The clients.
        connections: Vec<Seat>,
        /// Whether the worker has introduced all its clients with these.
        last: bool,
    },
    /// The data server was told by a signal that the store shall end.
    Quit,
    /// It serves. Descriptor: the segment, whose lock it and the front server share from now on.
    Ready {
        /// The data server.
        process: ProcessIdentity,
        /// Entries in the table.
        entries: u64,
        /// Where they come from.
        start: StartKind,
        /// From its first instruction to here, in microseconds.
        took_us: u64,
        /// Connections that may wait for an answer: those that the data server before was just serving, and those who have sent something
        /// since.
        waiting: Vec<u64>,
    },
    /// Descriptors: the epolls of its workers, which the front server keeps for the next data server.
    Epolls {
        /// Its worker threads.
        workers: u32,
    },
    /// It can't serve, and ends.
    Failed {
        /// Why, and what to do.
        message: String,
    },
    /// These connections are closed; the duplicates of their sockets can go.
    Closed {
        /// Their numbers.
        connections: Vec<u64>,
    },
    /// The counters.
    Stats {
        /// As asked.
        ticket: u32,
        /// Name and value each.
        statistics: Vec<(String, StatisticOwned)>,
    },
    /// Who is connected.
    Clients {
        /// As asked.
        ticket: u32,
        /// Some of them.
        clients: Vec<ClientInfo>,
        /// Whether these are the last.
        last: bool,
    },
    /// All is finished; it ends.
    Stopped,
}

/// What both kinds of messages have in common.
pub trait Message: Serialize + DeserializeOwned {
    /// How many descriptors the message speaks of.
    fn descriptors(&self) -> usize;
}

impl Message for FrontMessage {
    fn descriptors(&self) -> usize {
        match self {
            FrontMessage::Start { estate, role, .. } => estate.descriptors() + 3 + role.descriptors(),
            FrontMessage::Adopt { connections } => connections.len(),
            FrontMessage::Standby { .. } => 3,
            FrontMessage::Watching { .. } => 2,
            FrontMessage::Supervising { .. } => 1,
            FrontMessage::Restored
            | FrontMessage::Introduce
            | FrontMessage::NoStandby
            | FrontMessage::Stats { .. }
            | FrontMessage::Clients { .. }
            | FrontMessage::Ending
            | FrontMessage::Stop => 0,
        }
    }
}

impl Message for DataMessage {
    fn descriptors(&self) -> usize {
        match self {
            DataMessage::Inherit { estate, standby, .. } => {
                estate.descriptors() + 3 + if standby.is_some() { 3 } else { 0 }
            }
            DataMessage::Introduce { connections, .. } => connections.len(),
            DataMessage::Active { workers } | DataMessage::Epolls { workers } => *workers as usize,
            DataMessage::Ready { .. } | DataMessage::NewFront => 1,
            _ => 0,
        }
    }
}

/// Why a message was not sent or received.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// The socket between the servers.
    #[error(transparent)]
    Passing(#[from] PassingError),
    /// What came is no message of this release.
    #[error("the other server sent what this release does not know; are both of the same release?")]
    Unknown,
    /// A message has not the descriptors it speaks of.
    #[error(
        "a message between the servers came with {found} descriptors, not the {expected} it speaks of; \
         are both of the same release?"
    )]
    Descriptors {
        /// How many it should have.
        expected: usize,
        /// How many it has.
        found: usize,
    },
    /// A message is too long to be sent.
    #[error(
        "a message of {0} bytes to the other server is too long; this is a defect of kvs, please report it"
    )]
    TooLong(usize),
}

/// Both ends of a socket that messages go over.
///
/// # Errors
/// No descriptors are left.
pub fn socket_pair() -> rustix::io::Result<(OwnedFd, OwnedFd)> {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
}

/// Sends `message` with `descriptors`; waits while the other end has no room.
///
/// # Errors
/// [`ControlError`]; nothing was sent then.
pub fn send<M: Message>(
    socket: BorrowedFd<'_>,
    message: &M,
    descriptors: &[BorrowedFd<'_>],
) -> Result<(), ControlError> {
    send_or(socket, message, descriptors, Wait::Yes)
}

/// Sends `message` with `descriptors` if there is room for it just now: for a thread that waits for nobody.
///
/// # Errors
/// [`ControlError`], [`PassingError::WouldBlock`] when there is no room; nothing was sent then.
pub fn try_send<M: Message>(
    socket: BorrowedFd<'_>,
    message: &M,
    descriptors: &[BorrowedFd<'_>],
) -> Result<(), ControlError> {
    send_or(socket, message, descriptors, Wait::No)
}

fn send_or<M: Message>(
    socket: BorrowedFd<'_>,
    message: &M,
    descriptors: &[BorrowedFd<'_>],
    wait: Wait,
) -> Result<(), ControlError> {
    check_descriptors(message, descriptors.len())?;
    let bytes = postcard::to_stdvec(message).map_err(|_| ControlError::Unknown)?;
    if bytes.len() > MESSAGE_BYTES_MAX {
        return Err(ControlError::TooLong(bytes.len()));
    }
    Ok(fd_passing::send(socket, &bytes, descriptors, wait)?)
}

/// Receives the next message with its descriptors; None at the end: the other server has ended or died.
///
/// # Errors
/// [`ControlError`]; what was received is lost then.
pub fn receive<M: Message>(socket: BorrowedFd<'_>) -> Result<Option<(M, Vec<OwnedFd>)>, ControlError> {
    receive_or(socket, Wait::Yes)
}

/// Receives the next message if there is one: [`PassingError::WouldBlock`] when there is none just now.
///
/// # Errors
/// As [`receive`].
pub fn try_receive<M: Message>(socket: BorrowedFd<'_>) -> Result<Option<(M, Vec<OwnedFd>)>, ControlError> {
    receive_or(socket, Wait::No)
}

fn receive_or<M: Message>(
    socket: BorrowedFd<'_>,
    wait: Wait,
) -> Result<Option<(M, Vec<OwnedFd>)>, ControlError> {
    let mut buffer = vec![0; MESSAGE_BYTES_MAX];
    let received = fd_passing::receive(socket, &mut buffer, DESCRIPTORS_PER_MESSAGE_MAX, wait)?;
    let Some(received) = received else { return Ok(None) };
    match postcard::take_from_bytes::<M>(&buffer[..received.length]) {
        Ok((message, [])) => {
            check_descriptors(&message, received.descriptors.len())?;
            Ok(Some((message, received.descriptors)))
        }
        _ => Err(ControlError::Unknown),
    }
}

fn check_descriptors<M: Message>(message: &M, found: usize) -> Result<(), ControlError> {
    let expected = message.descriptors();
    if expected == found { Ok(()) } else { Err(ControlError::Descriptors { expected, found }) }
}

#[cfg(all(test, not(miri), not(feature = "shuttle")))]
mod tests {
    //! Goal: a message arrives whole with its descriptors, or is refused. Method: a socket pair inside the test.

    use std::os::fd::AsFd;

    use proptest::prelude::*;

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        socket_pair().expect("a pair")
    }

    #[test]
    fn control_messages_arrive_with_their_descriptors() {
        let (front, data) = pair();
        let file = tempfile::tempfile().expect("a file");
        let adopt =
            FrontMessage::Adopt { connections: vec![Adopted { connection: 7, transport: Transport::Unix }] };
        send(front.as_fd(), &adopt, &[file.as_fd()]).expect("room");
        let (message, descriptors) = receive::<FrontMessage>(data.as_fd()).expect("sent").expect("open");
        assert_eq!((message, descriptors.len()), (adopt, 1));
        drop(front);
        assert!(receive::<FrontMessage>(data.as_fd()).expect("the end").is_none());
    }

    #[test]
    fn control_garbage_is_refused() {
        let (front, data) = pair();
        for garbage in [&[250u8][..], &[4, 0, 0], &[2, 200, 200, 200, 200, 1]] {
            fd_passing::send(front.as_fd(), garbage, &[], Wait::Yes).expect("room");
            assert!(matches!(receive::<FrontMessage>(data.as_fd()), Err(ControlError::Unknown)));
        }
    }

    proptest! {
        #[test]
        fn control_random_bytes_are_a_message_or_refused(bytes in prop::collection::vec(any::<u8>(), 1..200)) {
            let (front, data) = pair();
            fd_passing::send(front.as_fd(), &bytes, &[], Wait::Yes).expect("room");
            let _ = receive::<FrontMessage>(data.as_fd());
            fd_passing::send(data.as_fd(), &bytes, &[], Wait::Yes).expect("room");
            let _ = receive::<DataMessage>(front.as_fd());
        }
    }

    #[test]
    fn control_a_message_without_its_descriptors_is_refused_both_ways() {
        let (front, data) = pair();
        let adopted = Adopted { connection: 7, transport: Transport::Tcp };
        let adopt = FrontMessage::Adopt { connections: vec![adopted; 2] };
        let refused = send(front.as_fd(), &adopt, &[front.as_fd()]);
        assert!(matches!(refused, Err(ControlError::Descriptors { found: 1, .. })), "{refused:?}");
        for (message, descriptors) in [(&adopt, 1), (&adopt, 3), (&FrontMessage::Stop, 1)] {
            let bytes = postcard::to_stdvec(message).expect("encoded");
            fd_passing::send(front.as_fd(), &bytes, &vec![front.as_fd(); descriptors], Wait::Yes)
                .expect("room");
            let refused = receive::<FrontMessage>(data.as_fd());
            assert!(matches!(refused, Err(ControlError::Descriptors { .. })), "{refused:?}");
        }
        send(front.as_fd(), &FrontMessage::Stop, &[]).expect("room");
        assert!(receive::<FrontMessage>(data.as_fd()).expect("sent").is_some(), "the next one is not hurt");
    }

    #[test]
    fn control_the_longest_messages_fit() {
        let (front, data) = pair();
        let client = ClientInfo {
            connection: u64::MAX,
            transport: Transport::Tcp,
            name: "n".repeat(32),
            pid: u32::MAX,
            received: u64::MAX,
            sent: u64::MAX,
        };
        let clients = DataMessage::Clients { ticket: 1, clients: vec![client; CLIENTS_MAX], last: true };
        send(data.as_fd(), &clients, &[]).expect("fits");
        let closed = DataMessage::Closed { connections: vec![u64::MAX; CLOSED_MAX] };
        send(data.as_fd(), &closed, &[]).expect("fits");
        assert_eq!(receive::<DataMessage>(front.as_fd()).expect("sent").expect("open").0, clients);
        assert_eq!(receive::<DataMessage>(front.as_fd()).expect("sent").expect("open").0, closed);
    }
}
