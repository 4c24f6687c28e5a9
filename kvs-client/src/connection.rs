//! One connection: frames out and in.
//!
//! Invariant: while there is something to send, whatever the server says is taken too. So however long a pipeline is, client and
//! server never wait for each other with both directions full.

use std::io;
use std::os::fd::OwnedFd;

use kvs_core::limits::VALUE_BYTES_MAX_LIMIT;
use kvs_core::wire::{
    self, ErrorCode, PROTOCOL, Request, RequestBody, Response, ResponseBody, decode_response, encode_request,
    looks_like_http,
};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::Error;
use crate::address::Address;

/// Bytes asked for at once.
const RECEIVE_BYTES: usize = 64 << 10;
/// A buffer larger than this is not kept when it is empty.
const BUFFER_KEPT_BYTES: usize = 1 << 20;

/// A connection that was welcomed.
pub struct Connection {
    socket: OwnedFd,
    input: Vec<u8>,
    /// Where what is not taken yet begins in `input`.
    start: usize,
    /// The server's number for this connection.
    pub number: u64,
    /// Longest value the server takes.
    pub value_bytes_max: u64,
}

/// How making a connection failed.
pub enum OpenError {
    /// It may work in a moment.
    Later(io::Error),
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

impl Connection {
    /// Connects and says hello.
    pub fn open(address: &Address, name: &str) -> Result<Self, OpenError> {
        let socket = address.connect()?;
        let mut connection = Self { socket, input: Vec::new(), start: 0, number: 0, value_bytes_max: 0 };
        let mut hello = Vec::new();
        let body = RequestBody::Hello { protocol: PROTOCOL, name, pid: std::process::id() };
        encode_request(&mut hello, &Request { number: 0, body });
        let mut welcome = None;
        let exchanged = connection.exchange(&hello, 1, &mut |response| {
            welcome = Some(match response.body {
                ResponseBody::Welcome { connection, value_bytes_max, .. } => {
                    Ok((connection, value_bytes_max))
                }
                ResponseBody::Error { code: ErrorCode::ShuttingDown, message } => {
                    Err(OpenError::Later(io::Error::other(message.to_owned())))
                }
                ResponseBody::Error { code, message } => {
                    Err(OpenError::Never(Error::from_answer(code, message)))
                }
                _ => Err(OpenError::Never(Error::Protocol("no welcome".into()))),
            });
            Ok(())
        });
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

    /// Sends `out` and takes `count` answers, in any interleaving that goes on.
    pub fn exchange(
        &mut self,
        out: &[u8],
        count: usize,
        take: &mut dyn FnMut(&Response<'_>) -> Result<(), Error>,
    ) -> Result<(), Broken> {
        let (mut sent, mut taken) = (0, 0);
        loop {
            if sent < out.len() {
                sent += self.send_some(&out[sent..]).map_err(|source| Broken::Lost { source, sent })?;
            }
            taken += self.take_frames(count - taken, take).map_err(Broken::Nonsense)?;
            if taken == count {
                return Ok(());
            }
            self.receive_some(sent < out.len()).map_err(|source| Broken::Lost { source, sent })?;
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
        if sending {
            let wanted = PollFlags::IN | PollFlags::OUT;
            let mut sockets = [PollFd::new(&self.socket, wanted)];
            match poll(&mut sockets, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
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
    ) -> Result<usize, Error> {
        let mut taken = 0;
        while taken < count {
            let bytes = &self.input[self.start..];
            if looks_like_http(bytes) {
                return Err(Error::Protocol("it speaks HTTP".into()));
            }
            let extent = match wire::peek(bytes, wire::response_length_max(VALUE_BYTES_MAX_LIMIT)) {
                Ok(Some(extent)) => extent,
                Ok(None) => break,
                Err(error) => return Err(Error::Protocol(error.to_string())),
            };
            let Some(payload) = extent.payload(bytes) else { break };
            take(&decode_response(payload).map_err(|error| Error::Protocol(error.to_string()))?)?;
            self.start += extent.total;
            taken += 1;
        }
        Ok(taken)
    }
}
