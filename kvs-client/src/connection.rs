//! One connection: frames out and in.
//!
//! Invariants
//! - While there is something to send, whatever the server says is taken too. So however long a pipeline is, client and server
//!   never wait for each other with both directions full.
//! - No more changes are unanswered than the server remembers results of. Each answer lets more be sent, so this waits for
//!   the server only, and that for nothing.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Instant;

use kvs_core::limits::VALUE_BYTES_MAX_LIMIT;
use kvs_core::wire::{
    self, ErrorCode, PROTOCOL, Request, RequestBody, Response, ResponseBody, SessionToken, decode_response,
    encode_request, looks_like_http,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::Error;
use crate::address::Address;

/// Bytes asked for at once.
const RECEIVE_BYTES: usize = 64 << 10;
/// A buffer larger than this is not kept when it is empty.
const BUFFER_KEPT_BYTES: usize = 1 << 20;

/// How a connection is with its client's session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Membership {
    /// The server was not asked yet.
    Unasked,
    /// The server remembers results of this many changes.
    Joined {
        /// So many.
        window: usize,
    },
    /// The server remembers nothing.
    Refused,
}

/// A connection that was welcomed.
pub struct Connection {
    socket: OwnedFd,
    input: Vec<u8>,
    /// Where what is not taken yet begins in `input`.
    start: usize,
    /// Until when an answer is waited for; for ever when None.
    deadline: Option<Instant>,
    /// The server's number for this connection.
    pub number: u64,
    /// Longest value the server takes.
    pub value_bytes_max: u64,
    /// How it is with the session.
    pub membership: Membership,
}

/// How making a connection failed.
pub enum OpenError {
    /// It may work in a moment.
    Later(io::Error),
    /// The server has too many connections now.
    Full(Error),
    /// It won't.
    Never(Error),
}

impl From<io::Error> for OpenError {
    fn from(error: io::Error) -> Self {
        Self::Later(error)
    }
}

/// How an exchange ended early.
pub enum Broken {
    /// The connection is lost; this many bytes were given to the kernel.
    Lost {
        /// What the system says.
        source: io::Error,
        /// Bytes the server may have seen.
        sent: usize,
    },
    /// The server does not make sense.
    Nonsense(Error),
}

/// One of the requests that are sent together.
#[derive(Debug, Clone, Copy)]
pub struct Outgoing {
    /// Where its frame ends.
    pub end: usize,
    /// Whether the server remembers its result.
    pub is_change: bool,
}

/// How far may be sent.
struct Horizon<'a> {
    requests: &'a [Outgoing],
    window: usize,
    /// Requests that may be sent.
    open: usize,
    /// Changes among them that are not answered.
    unanswered: usize,
}

impl Horizon<'_> {
    /// Bytes that may be sent. It moves when half of the window is free, not with every answer: pieces of a size worth a
    /// system call.
    fn bytes(&mut self) -> usize {
        if self.unanswered <= self.window / 2 {
            while let Some(request) = self.requests.get(self.open) {
                if request.is_change && self.unanswered == self.window {
                    break;
                }
                self.unanswered += usize::from(request.is_change);
                self.open += 1;
            }
        }
        self.open.checked_sub(1).map_or(0, |last| self.requests[last].end)
    }

    fn answered(&mut self, requests: &[Outgoing]) {
        self.unanswered -= requests.iter().filter(|request| request.is_change).count();
    }
}

impl Connection {
    /// Whether the server has closed it.
    pub fn is_lost(&self) -> bool {
        let mut look = [PollFd::new(&self.socket, PollFlags::RDHUP)];
        let closed = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        poll(&mut look, Some(&Timespec::default())).is_ok_and(|_| look[0].revents().intersects(closed))
    }

    /// Connects and says hello, by `deadline` if there is one.
    pub fn open(address: &Address, name: &str, deadline: Option<Instant>) -> Result<Self, OpenError> {
        let socket = address.connect(deadline)?;
        let mut connection = Self {
            socket,
            input: Vec::new(),
            start: 0,
            deadline,
            number: 0,
            value_bytes_max: 0,
            membership: Membership::Unasked,
        };
        let body = RequestBody::Hello { protocol: PROTOCOL, name, pid: std::process::id() };
        let mut welcome = None;
        let exchanged = connection.ask(body, &mut |response| {
            welcome = Some(match response.body {
                ResponseBody::Welcome { connection, value_bytes_max, .. } => {
                    Ok((connection, value_bytes_max))
                }
                ResponseBody::Error { code: ErrorCode::ShuttingDown, message } => {
                    Err(OpenError::Later(io::Error::other(message.to_owned())))
                }
                ResponseBody::Error { code: code @ ErrorCode::TooManyConnections, message } => {
                    Err(OpenError::Full(Error::from_answer(code, message)))
                }
                ResponseBody::Error { code, message } => {
                    Err(OpenError::Never(Error::from_answer(code, message)))
                }
                _ => Err(OpenError::Never(Error::Protocol("no welcome".into()))),
            });
        });
        connection.deadline = None;
        match (exchanged, welcome) {
            (_, Some(Ok((number, value_bytes_max)))) => {
                (connection.number, connection.value_bytes_max) = (number, value_bytes_max);
                Ok(connection)
            }
            (_, Some(Err(error))) => Err(error),
            (Err(Broken::Lost { source, .. }), None) => Err(OpenError::Later(source)),
            (Err(Broken::Nonsense(error)), None) => {
                let (address, reason) = (address.to_string(), error.to_string());
                Err(OpenError::Never(Error::NotKvs { address, reason }))
            }
            (Ok(()), None) => Err(OpenError::Never(Error::Protocol("no welcome".into()))),
        }
    }

    /// Makes the changes that follow those of the session of `token`; by `deadline`, if there is one. Whether the server knew
    /// it already. One that remembers nothing serves all the same.
    pub fn join(
        &mut self,
        (token, attempt): (SessionToken, u64),
        deadline: Option<Instant>,
    ) -> Result<bool, Broken> {
        self.deadline = deadline;
        let mut answer = (false, Membership::Refused);
        let asked = self.ask(RequestBody::Session { token, attempt }, &mut |response| {
            if let ResponseBody::Session { resumed, window } = response.body {
                answer = (resumed, Membership::Joined { window: window as usize });
            }
        });
        self.deadline = None;
        asked?;
        self.membership = answer.1;
        Ok(answer.0)
    }

    /// Says that the session is over, if there is one, and does not wait for an answer.
    pub fn end_session(&self) {
        if let Membership::Joined { .. } = self.membership {
            let mut frame = Vec::new();
            encode_request(&mut frame, &Request { number: 0, body: RequestBody::EndSession });
            // If it doesn't get there, the server finds out in time.
            let _ = self.send_some(&frame);
        }
    }

    /// Asks one thing.
    fn ask(&mut self, body: RequestBody<'_>, take: &mut dyn FnMut(&Response<'_>)) -> Result<(), Broken> {
        let mut frame = Vec::new();
        encode_request(&mut frame, &Request { number: 0, body });
        let request = Outgoing { end: frame.len(), is_change: false };
        self.exchange(&frame, &[request], &mut |response| {
            take(response);
            Ok(())
        })
    }

    /// Sends `requests`, whose frames are `bytes`, and takes an answer to each, in any interleaving that goes on.
    pub fn exchange(
        &mut self,
        bytes: &[u8],
        requests: &[Outgoing],
        take: &mut dyn FnMut(&Response<'_>) -> Result<(), Error>,
    ) -> Result<(), Broken> {
        let window = match self.membership {
            Membership::Joined { window } => window,
            _ => usize::MAX,
        };
        let mut horizon = Horizon { requests, window, open: 0, unanswered: 0 };
        let (mut sent, mut taken) = (0, 0);
        loop {
            let open = horizon.bytes();
            let lost = |source, sent| Broken::Lost { source, sent };
            if sent < open {
                sent += self.send_some(&bytes[sent..open]).map_err(|source| lost(source, sent))?;
            }
            let count = self.take_frames(requests.len() - taken, take).map_err(|refused| match refused {
                Refused::Superseded(message) => lost(io::Error::other(message), sent),
                Refused::Nonsense(error) => Broken::Nonsense(error),
            })?;
            horizon.answered(&requests[taken..taken + count]);
            taken += count;
            if taken == requests.len() {
                return Ok(());
            }
            // What just came may let more be sent.
            if count == 0 {
                self.receive_some(sent < open).map_err(|source| lost(source, sent))?;
            }
        }
    }

    /// Gives the kernel what it takes now.
    fn send_some(&self, bytes: &[u8]) -> io::Result<usize> {
        match send(&self.socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(count) => Ok(count),
            Err(Errno::AGAIN | Errno::INTR) => Ok(0),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Waits until something came, or, if there is more to send, until it can be sent.
    fn receive_some(&mut self, sending: bool) -> io::Result<()> {
        let mut flags = RecvFlags::empty();
        if sending || self.deadline.is_some() {
            self.wait(if sending { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN })?;
            flags = RecvFlags::DONTWAIT;
        }
        self.make_room();
        let filled = self.input.len();
        self.input.resize(filled + RECEIVE_BYTES, 0);
        let received = recv(&self.socket, &mut self.input[filled..], flags);
        self.input.truncate(filled + received.as_ref().map_or(0, |(_, count)| *count));
        match received {
            Ok((_, 0)) => {
                Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed the connection"))
            }
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn wait(&self, wanted: PollFlags) -> io::Result<()> {
        let left = self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the server says nothing"));
        }
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut [PollFd::new(&self.socket, wanted)], timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Forgets what was taken; moves bytes only when there are few of them.
    fn make_room(&mut self) {
        if self.start == self.input.len() {
            self.input.clear();
            self.start = 0;
            if self.input.capacity() > BUFFER_KEPT_BYTES {
                self.input.shrink_to(BUFFER_KEPT_BYTES);
            }
        } else if self.start > self.input.len() / 2 {
            self.input.drain(..self.start);
            self.start = 0;
        }
    }

    /// Takes up to `count` whole frames; returns how many there were.
    fn take_frames(
        &mut self,
        count: usize,
        take: &mut dyn FnMut(&Response<'_>) -> Result<(), Error>,
    ) -> Result<usize, Refused> {
        let mut taken = 0;
        while taken < count {
            let bytes = &self.input[self.start..];
            if looks_like_http(bytes) {
                return Err(Error::Protocol("it speaks HTTP".into()).into());
            }
            let extent = match wire::peek(bytes, wire::response_length_max(VALUE_BYTES_MAX_LIMIT)) {
                Ok(Some(extent)) => extent,
                Ok(None) => break,
                Err(error) => return Err(Error::Protocol(error.to_string()).into()),
            };
            let Some(payload) = extent.payload(bytes) else { break };
            let response = decode_response(payload).map_err(|error| Error::Protocol(error.to_string()))?;
            if let ResponseBody::Error { code: ErrorCode::Session, message } = response.body {
                return Err(Refused::Superseded(message.to_owned()));
            }
            take(&response)?;
            self.start += extent.total;
            taken += 1;
        }
        Ok(taken)
    }
}

/// Why an answer is none.
enum Refused {
    /// The connection may not do what was asked; another may.
    Superseded(String),
    /// It makes no sense.
    Nonsense(Error),
}

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        Self::Nonsense(error)
    }
}
