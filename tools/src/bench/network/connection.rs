//! A connection of the load generator: what it has asked, what of that isn't sent or answered yet.
//!
//! Invariant: answers come in the order of the requests, so the oldest in `pending` is the next to be answered.

use std::collections::VecDeque;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use rustix::io::Errno;
use rustix::net::sockopt::set_socket_linger;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::protocol::{NUMBER_MAX, Protocol};
use crate::bench::workload::{Operation, Values};

/// How long a server has to take a connection.
const CONNECT_PATIENCE: Duration = Duration::from_secs(10);

/// Where a store listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// On TCP.
    Tcp(SocketAddr),
    /// On a unix socket.
    Unix(PathBuf),
}

impl Address {
    /// A new connection, which blocks.
    ///
    /// # Errors
    /// Nobody takes it.
    pub fn connect(&self) -> anyhow::Result<OwnedFd> {
        let connected = match self {
            Self::Tcp(address) => TcpStream::connect_timeout(address, CONNECT_PATIENCE).and_then(|stream| {
                stream.set_nodelay(true)?;
                // Closed by a reset, so that thousands of connections leave no ports behind that can't be used for a minute.
                set_socket_linger(&stream, Some(Duration::ZERO))?;
                Ok(stream.into())
            }),
            Self::Unix(path) => UnixStream::connect(path).map(OwnedFd::from),
        };
        connected.with_context(|| format!("can't connect to {self}"))
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(address) => write!(formatter, "{address}"),
            Self::Unix(path) => write!(formatter, "{}", path.display()),
        }
    }
}

/// A request that is not answered yet.
#[derive(Debug, Clone, Copy)]
pub struct Pending {
    /// What was asked.
    pub operation: Operation,
    /// Since when its answer is waited for, in the nanoseconds of the thread's clock.
    pub since_ns: u64,
}

/// A connection.
pub struct Connection {
    socket: OwnedFd,
    output: Vec<u8>,
    /// How much of `output` was sent.
    sent: usize,
    /// The beginning of an answer.
    pub rest: Vec<u8>,
    /// What is not answered yet.
    pub pending: VecDeque<Pending>,
    number_asked: u8,
    number_answered: u8,
}

/// The number after this one.
#[inline]
fn next_number(number: u8) -> u8 {
    if number == NUMBER_MAX { 1 } else { number + 1 }
}

impl Connection {
    /// A connection that was greeted, and doesn't block any more.
    ///
    /// # Errors
    /// Nobody takes it, or the store refuses.
    pub fn open(address: &Address, protocol: &dyn Protocol, pipeline: usize) -> anyhow::Result<Self> {
        let socket = address.connect()?;
        protocol.greet(socket.as_fd())?;
        Ok(Self {
            socket,
            output: Vec::new(),
            sent: 0,
            rest: Vec::new(),
            pending: VecDeque::with_capacity(pipeline),
            number_asked: 0,
            number_answered: 0,
        })
    }

    /// The socket.
    pub fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// Adds a request to what is sent next.
    #[inline]
    pub fn ask(&mut self, protocol: &impl Protocol, values: &Values, pending: Pending) {
        self.number_asked = next_number(self.number_asked);
        let Operation { index, is_read } = pending.operation;
        if is_read {
            protocol.ask_read(&mut self.output, self.number_asked, index);
        } else {
            protocol.ask_write(&mut self.output, self.number_asked, index, values.of(index));
        }
        self.pending.push_back(pending);
    }

    /// The number of the request that is answered next; [`answered`](Self::answered) takes it.
    #[inline]
    pub fn number_expected(&self) -> u8 {
        next_number(self.number_answered)
    }

    /// An answer came; to what. None when nothing was asked.
    #[inline]
    pub fn answered(&mut self) -> Option<Pending> {
        self.number_answered = next_number(self.number_answered);
        self.pending.pop_front()
    }

    /// Whether there is something to send.
    pub fn has_unsent(&self) -> bool {
        self.sent < self.output.len()
    }

    /// Sends what the kernel takes.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn flush(&mut self) -> anyhow::Result<()> {
        if !self.has_unsent() {
            return Ok(());
        }
        match send(&self.socket, &self.output[self.sent..], SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(count) => self.sent += count,
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(errno) => return Err(errno).context("a connection is lost while asking"),
        }
        if !self.has_unsent() {
            self.output.clear();
            self.sent = 0;
        }
        Ok(())
    }

    /// Takes what came into `input`, behind what was left before; how much there is now. None when nothing came.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn receive(&mut self, input: &mut [u8]) -> anyhow::Result<Option<usize>> {
        let left = self.rest.len();
        input[..left].copy_from_slice(&self.rest);
        match recv(&self.socket, &mut input[left..], RecvFlags::DONTWAIT) {
            Ok((_, 0)) => anyhow::bail!("the server closed a connection"),
            Ok((_, count)) => Ok(Some(left + count)),
            Err(Errno::AGAIN | Errno::INTR) => Ok(None),
            Err(errno) => Err(errno).context("a connection is lost while waiting for answers"),
        }
    }
}
