//! A client on a plain socket: it knows every byte that must come.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use kvs_core::control::Transport;
use kvs_core::wire::{Request, RequestBody, Response, ResponseBody, encode_request, encode_response};
use kvs_harness::connection::{Answer, Connection, Socket, hello};
use kvs_harness::store::Ready;
use rustix::net::sockopt::set_socket_recv_buffer_size;
use rustix::net::{AddressFamily, SocketType};

use crate::violation::{demand, violation};

/// How long the next byte may take to come.
const PATIENCE: Duration = Duration::from_secs(30);
/// Pause between two looks for it.
const PAUSE: Duration = Duration::from_micros(50);
/// Receive buffer of a client that is slow, in bytes: answers take several sends.
const SMALL_BUFFER: usize = 64 << 10;

/// A connection that was welcomed.
pub struct Talk {
    socket: Socket,
    /// Its number at the server.
    pub id: u64,
    number: u32,
    /// Still to be sent.
    unsent: Vec<u8>,
    /// Bytes sent so far.
    pub written: u64,
    /// What must come, from `taken` on.
    expected: Vec<u8>,
    taken: usize,
    /// It has sent its last byte.
    has_ended: bool,
    scratch: Vec<u8>,
}

impl Talk {
    /// Connects; the kernel takes little of an answer ahead if it `is_slow`.
    ///
    /// # Errors
    /// When it is not welcomed.
    pub fn new(ready: &Ready, transport: Transport, is_slow: bool) -> anyhow::Result<Self> {
        let socket = match transport {
            Transport::Tcp => Socket::Tcp(connect_tcp(ready, is_slow)?),
            Transport::Unix => Socket::Unix(UnixStream::connect(&ready.unix)?),
        };
        let mut connection = Connection::from_socket(socket.try_clone()?)?;
        let greeting = hello();
        let mut bytes = Vec::new();
        encode_request(&mut bytes, &Request { number: 1, body: greeting.clone() });
        let Answer::Welcome { connection: id, .. } = connection.ask(&greeting).context("no welcome")? else {
            return Err(violation("the hello was not answered with a welcome"));
        };
        match &socket {
            Socket::Tcp(stream) => stream.set_nonblocking(true)?,
            Socket::Unix(stream) => stream.set_nonblocking(true)?,
        }
        let written = bytes.len() as u64;
        let scratch = vec![0; 256 << 10];
        Ok(Self {
            socket,
            id,
            number: 1,
            unsent: Vec::new(),
            written,
            expected: Vec::new(),
            taken: 0,
            has_ended: false,
            scratch,
        })
    }

    /// Notes a request to be sent, and what must come of it.
    pub fn queue(&mut self, body: RequestBody<'_>, answer: ResponseBody<'_>) {
        self.number = self.number.wrapping_add(1);
        encode_request(&mut self.unsent, &Request { number: self.number, body });
        encode_response(&mut self.expected, &Response { number: self.number, body: answer });
    }

    /// Sends what was queued, up to `most` bytes, as far as the kernel takes it.
    ///
    /// # Errors
    /// A violation when the connection is gone.
    pub fn send(&mut self, most: usize) -> anyhow::Result<()> {
        let most = most.min(self.unsent.len());
        let mut sent = 0;
        while sent < most {
            match self.socket.write(&self.unsent[sent..most]) {
                Ok(count) => sent += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(violation(format!("the client can't send: {error}"))),
            }
        }
        self.written += sent as u64;
        self.unsent.drain(..sent);
        Ok(())
    }

    /// Has sent its last byte.
    ///
    /// # Errors
    /// A violation when the connection is gone.
    pub fn end(&mut self) -> anyhow::Result<()> {
        self.has_ended = true;
        let ended = self.socket.shutdown(Shutdown::Write);
        ended.map_err(|error| violation(format!("the client can't end: {error}")))
    }

    /// Takes what has come of the answers, up to `most` bytes, and returns how much it was.
    ///
    /// # Errors
    /// A violation when it is not what must come, or the connection is gone.
    pub fn take(&mut self, most: usize) -> anyhow::Result<usize> {
        let mut taken = 0;
        while taken < most {
            let room = self.scratch.len().min(most - taken);
            match self.socket.read(&mut self.scratch[..room]) {
                Ok(0) if self.has_ended && self.expected.is_empty() => break,
                Ok(0) => return Err(violation(format!("the client's connection ended, {}", self.place()))),
                Ok(count) => {
                    self.compare(count)?;
                    taken += count;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(violation(format!("{error} at the client, {}", self.place()))),
            }
        }
        Ok(taken)
    }

    fn compare(&mut self, count: usize) -> anyhow::Result<()> {
        let (found, due) = (&self.scratch[..count], &self.expected[self.taken..]);
        demand!(count <= due.len(), "{} bytes too many came, {}", count - due.len(), self.place());
        if let Some(at) = found.iter().zip(due).position(|(found, due)| found != due) {
            self.taken += at;
            return Err(violation(format!("a wrong byte came, {}", self.place())));
        }
        self.taken += count;
        if self.taken == self.expected.len() {
            self.taken = 0;
            self.expected.clear();
        }
        Ok(())
    }

    fn place(&self) -> String {
        format!("after {} of {} bytes of answers", self.taken, self.expected.len())
    }

    /// Sends all that is left, and takes all answers.
    ///
    /// # Errors
    /// A violation when something else comes, or nothing for too long.
    pub fn finish(&mut self) -> anyhow::Result<()> {
        let mut until = Instant::now() + PATIENCE;
        while !self.unsent.is_empty() || !self.expected.is_empty() {
            let before = self.unsent.len();
            self.send(usize::MAX)?;
            if self.take(usize::MAX)? > 0 || before != self.unsent.len() {
                until = Instant::now() + PATIENCE;
                continue;
            }
            demand!(Instant::now() < until, "nothing came for {PATIENCE:?}, {}", self.place());
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// Waits for the end of the connection, before which nothing may come any more.
    ///
    /// # Errors
    /// A violation when something comes, or no end.
    pub fn await_end(&mut self) -> anyhow::Result<()> {
        let until = Instant::now() + PATIENCE;
        loop {
            match self.socket.read(&mut self.scratch) {
                Ok(0) => return Ok(()),
                Ok(count) => return Err(violation(format!("{count} bytes came behind the last answer"))),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(violation(format!("{error} where the end was due"))),
            }
            demand!(Instant::now() < until, "the connection did not end within {PATIENCE:?}");
            std::thread::sleep(PAUSE);
        }
    }
}

fn connect_tcp(ready: &Ready, is_slow: bool) -> anyhow::Result<TcpStream> {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None)?;
    if is_slow {
        // Before it connects: the window is made from it.
        set_socket_recv_buffer_size(&socket, SMALL_BUFFER)?;
    }
    rustix::net::connect(&socket, &ready.tcp)?;
    let stream = TcpStream::from(socket);
    stream.set_nodelay(true)?;
    Ok(stream)
}
