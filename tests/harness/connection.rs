//! A plain connection to a store that says exactly what a test wants said, right or wrong, and promises nothing.
//!
//! The client library hides lost connections and repeats requests; tests that count what was acknowledged need to see them.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use kvs_core::limits::VALUE_BYTES_MAX_LIMIT;
use kvs_core::wire::{
    ErrorCode, PROTOCOL, Request, RequestBody, ResponseBody, SetCondition, decode_response, encode_request,
    peek, response_length_max,
};

/// Longest wait for an answer.
const ANSWER_PATIENCE: Duration = Duration::from_secs(30);
/// Least room for one read.
const READ_BYTES_MIN: usize = 16 << 10;

/// A TCP or a unix stream socket.
#[derive(Debug)]
pub enum Socket {
    /// Over TCP.
    Tcp(TcpStream),
    /// Over a unix socket.
    Unix(UnixStream),
}

impl Socket {
    /// Another handle of the same socket, for a thread that reads while this one writes.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Socket::Tcp(stream) => Socket::Tcp(stream.try_clone()?),
            Socket::Unix(stream) => Socket::Unix(stream.try_clone()?),
        })
    }

    /// Ends one or both directions.
    ///
    /// # Errors
    /// The connection is lost already.
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        match self {
            Socket::Tcp(stream) => stream.shutdown(how),
            Socket::Unix(stream) => stream.shutdown(how),
        }
    }

    /// Sets how long reading and writing may take.
    ///
    /// # Errors
    /// The socket refuses it.
    pub fn set_patience(&self, patience: Duration) -> io::Result<()> {
        match self {
            Socket::Tcp(stream) => {
                stream.set_read_timeout(Some(patience))?;
                stream.set_write_timeout(Some(patience))
            }
            Socket::Unix(stream) => {
                stream.set_read_timeout(Some(patience))?;
                stream.set_write_timeout(Some(patience))
            }
        }
    }
}

impl Read for Socket {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(stream) => stream.read(into),
            Socket::Unix(stream) => stream.read(into),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(stream) => stream.write(bytes),
            Socket::Unix(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// An answer with its bytes copied out of the frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The connection is served.
    Welcome {
        /// Number of the connection.
        connection: u64,
        /// Longest value.
        value_bytes_max: u64,
    },
    /// A value.
    Value(Vec<u8>),
    /// Stored.
    Stored,
    /// Deleted.
    Deleted,
    /// No such key.
    Missing,
    /// The key exists.
    Exists,
    /// A number.
    Number(i64),
    /// A page of keys.
    Keys(Vec<Vec<u8>>, Option<u64>),
    /// Names of statistics and their numbers, where they are numbers.
    Stats(Vec<(String, Option<u64>)>),
    /// An error.
    Error(ErrorCode, String),
    /// Whether the session was known, and how many changes may be unanswered.
    Session(bool, u32),
}

impl Answer {
    /// The code, when this is an error.
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            Answer::Error(code, _) => Some(*code),
            _ => None,
        }
    }

    fn copy(body: &ResponseBody<'_>) -> Self {
        use kvs_core::wire::StatisticValue::Number;
        match body {
            ResponseBody::Welcome { connection, value_bytes_max, .. } => {
                Answer::Welcome { connection: *connection, value_bytes_max: *value_bytes_max }
            }
            ResponseBody::Value { value } => Answer::Value(value.to_vec()),
            ResponseBody::Stored => Answer::Stored,
            ResponseBody::Deleted => Answer::Deleted,
            ResponseBody::Missing => Answer::Missing,
            ResponseBody::Exists => Answer::Exists,
            ResponseBody::Number { value } => Answer::Number(*value),
            ResponseBody::Keys { keys, next } => {
                Answer::Keys(keys.iter().map(|key| key.0.to_vec()).collect(), *next)
            }
            ResponseBody::Stats { statistics } => Answer::Stats(
                statistics
                    .iter()
                    .map(|one| (one.name.to_owned(), if let Number(n) = one.value { Some(n) } else { None }))
                    .collect(),
            ),
            ResponseBody::Error { code, message } => Answer::Error(*code, (*message).to_owned()),
            ResponseBody::Session { resumed, window } => Answer::Session(*resumed, *window),
        }
    }
}

/// A connection and what has been read from it but not been asked for.
#[derive(Debug)]
pub struct Connection {
    socket: Socket,
    output: Vec<u8>,
    /// Read bytes are in `input[consumed..filled]`; behind that is room.
    input: Vec<u8>,
    consumed: usize,
    filled: usize,
    number: u32,
}

impl Connection {
    /// Connects over TCP and says nothing.
    ///
    /// # Errors
    /// The connection is refused.
    pub fn tcp(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, ANSWER_PATIENCE)?;
        stream.set_nodelay(true)?;
        Self::from_socket(Socket::Tcp(stream))
    }

    /// Connects to a unix socket and says nothing.
    ///
    /// # Errors
    /// The connection is refused.
    pub fn unix(path: &Path) -> io::Result<Self> {
        Self::from_socket(Socket::Unix(UnixStream::connect(path)?))
    }

    /// Connects over TCP and is welcomed.
    ///
    /// # Errors
    /// The connection is refused or lost, or the answer is not a welcome.
    pub fn welcomed_tcp(address: SocketAddr) -> io::Result<Self> {
        Self::tcp(address)?.welcomed()
    }

    /// Connects to a unix socket and is welcomed.
    ///
    /// # Errors
    /// The connection is refused or lost, or the answer is not a welcome.
    pub fn welcomed_unix(path: &Path) -> io::Result<Self> {
        Self::unix(path)?.welcomed()
    }

    /// A connection over a socket that is connected already.
    ///
    /// # Errors
    /// The socket takes no time-outs.
    pub fn from_socket(socket: Socket) -> io::Result<Self> {
        socket.set_patience(ANSWER_PATIENCE)?;
        Ok(Self { socket, output: Vec::new(), input: Vec::new(), consumed: 0, filled: 0, number: 0 })
    }

    fn welcomed(mut self) -> io::Result<Self> {
        match self.ask(&hello())? {
            Answer::Welcome { .. } => Ok(self),
            other => Err(io::Error::other(format!("no welcome but {other:?}"))),
        }
    }

    /// The socket, to be used in ways a client would not.
    pub fn socket(&mut self) -> &mut Socket {
        &mut self.socket
    }

    /// Sets the number of the last request, so that the next one carries one more.
    pub fn set_number(&mut self, last: u32) {
        self.number = last;
    }

    /// Adds a request to what the next [`flush`](Self::flush) sends, and returns its number.
    pub fn queue(&mut self, body: &RequestBody<'_>) -> u32 {
        self.number = self.number.wrapping_add(1);
        encode_request(&mut self.output, &Request { number: self.number, body: body.clone() });
        self.number
    }

    /// Sends what was queued.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn flush(&mut self) -> io::Result<()> {
        let sent = self.socket.write_all(&self.output);
        self.output.clear();
        sent
    }

    /// Takes what was queued, to be sent by hand.
    pub fn take_queued(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }

    /// Sends bytes as they are.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn send_raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.socket.write_all(bytes)
    }

    /// Sends a request and waits for its answer.
    ///
    /// # Errors
    /// The connection is lost, or the answer is that of another request.
    pub fn ask(&mut self, body: &RequestBody<'_>) -> io::Result<Answer> {
        let asked = self.queue(body);
        self.flush()?;
        let (number, answer) = self.receive()?;
        // A refusal before anything was read carries 0.
        if number != asked && number != 0 {
            return Err(io::Error::other(format!("asked {asked}, answered {number}: {answer:?}")));
        }
        Ok(answer)
    }

    /// The next answer and the number of its request.
    ///
    /// # Errors
    /// The connection ended, is silent for too long, or what came is no answer.
    pub fn receive(&mut self) -> io::Result<(u32, Answer)> {
        loop {
            if let Some(answer) = self.take_answer()? {
                return Ok(answer);
            }
            self.read_more()?;
        }
    }

    fn take_answer(&mut self) -> io::Result<Option<(u32, Answer)>> {
        let bytes = &self.input[self.consumed..self.filled];
        let extent = peek(bytes, response_length_max(VALUE_BYTES_MAX_LIMIT)).map_err(io::Error::other)?;
        let Some((extent, payload)) = extent.and_then(|extent| Some((extent, extent.payload(bytes)?))) else {
            return Ok(None);
        };
        let response = decode_response(payload).map_err(io::Error::other)?;
        let answer = (response.number, Answer::copy(&response.body));
        self.consumed += extent.total;
        Ok(Some(answer))
    }

    fn read_more(&mut self) -> io::Result<()> {
        self.input.copy_within(self.consumed..self.filled, 0);
        self.filled -= std::mem::take(&mut self.consumed);
        if self.input.len() - self.filled < READ_BYTES_MIN {
            self.input.resize((2 * self.input.len()).max(4 * READ_BYTES_MIN), 0);
        }
        match self.socket.read(&mut self.input[self.filled..])? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            count => {
                self.filled += count;
                Ok(())
            }
        }
    }

    /// Waits for the end of the connection; returns what came before it that was not asked for.
    ///
    /// # Errors
    /// The other side keeps the connection open.
    pub fn read_to_end(&mut self) -> io::Result<Vec<u8>> {
        let mut rest = self.input[self.consumed..self.filled].to_vec();
        match self.socket.read_to_end(&mut rest) {
            Ok(_) => Ok(rest),
            // Input the server never read makes its kernel answer with a reset. That is an end as well.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(rest),
            Err(error) => Err(error),
        }
    }
}

/// The first message of a connection.
pub fn hello() -> RequestBody<'static> {
    RequestBody::Hello { protocol: PROTOCOL, name: "test", pid: std::process::id() }
}

/// A request for a value.
pub fn get(key: &[u8]) -> RequestBody<'_> {
    RequestBody::Get { key }
}

/// A request to store a value.
pub fn set<'a>(key: &'a [u8], value: &'a [u8]) -> RequestBody<'a> {
    RequestBody::Set { condition: SetCondition::Always, key, value }
}

/// A request to remove a key.
pub fn delete(key: &[u8]) -> RequestBody<'_> {
    RequestBody::Delete { key }
}

/// A request to add to a number.
pub fn increment(key: &[u8], by: i64) -> RequestBody<'_> {
    RequestBody::Increment { key, by }
}
