//! How to talk to each of the three stores: a dozen lines each, so that the client is never what is measured.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use kvs_core::limits::VALUE_BYTES_MAX_LIMIT;
use kvs_core::wire::{
    PROTOCOL, Request, RequestBody, ResponseBody, SetCondition, decode_response, encode_request, peek,
    response_length_max,
};

/// The key that is counted up.
const COUNTER: &str = "counter";
/// Longest wait for an answer. Who loads may be silent for long.
const PATIENCE: Duration = Duration::from_secs(120);
/// Sets sent at once when a store is filled.
const AT_ONCE: u64 = 1_000;

/// A protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Speak {
    /// Ours.
    Kvs,
    /// RESP.
    Redis,
    /// memcached's text protocol.
    Memcached,
}

/// What an increment is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The sum.
    Number(i64),
    /// There is no such key.
    Missing,
    /// Not now: it loads.
    Later,
}

impl Speak {
    /// An increment of the counter.
    pub fn increment(self) -> Vec<u8> {
        match self {
            Speak::Kvs => frame(RequestBody::Increment { key: COUNTER.as_bytes(), by: 1 }),
            Speak::Redis => b"*2\r\n$4\r\nINCR\r\n$7\r\ncounter\r\n".to_vec(),
            Speak::Memcached => b"incr counter 1\r\n".to_vec(),
        }
    }

    /// A set.
    fn set(self, key: &str, value: &str) -> Vec<u8> {
        match self {
            Speak::Kvs => frame(RequestBody::Set {
                condition: SetCondition::Always,
                key: key.as_bytes(),
                value: value.as_bytes(),
            }),
            Speak::Redis => {
                format!("*3\r\n$3\r\nSET\r\n${}\r\n{key}\r\n${}\r\n{value}\r\n", key.len(), value.len())
                    .into_bytes()
            }
            Speak::Memcached => format!("set {key} 0 0 {}\r\n{value}\r\n", value.len()).into_bytes(),
        }
    }

    /// Bytes of the answer to a set.
    fn stored_bytes(self) -> usize {
        match self {
            Speak::Kvs => 7,
            Speak::Redis => "+OK\r\n".len(),
            Speak::Memcached => "STORED\r\n".len(),
        }
    }

    /// The first answer to an increment in `bytes`, if it is whole.
    fn answer(self, bytes: &[u8]) -> io::Result<Option<Answer>> {
        if self == Speak::Kvs {
            return answer_in_frame(bytes);
        }
        let Some(line) = bytes.strip_suffix(b"\r\n") else { return Ok(None) };
        let line = String::from_utf8_lossy(line);
        let number = if self == Speak::Redis { line.strip_prefix(':') } else { Some(&*line) };
        match number.and_then(|text| text.trim().parse().ok()) {
            Some(number) => Ok(Some(Answer::Number(number))),
            None if line == "NOT_FOUND" => Ok(Some(Answer::Missing)),
            None if line.starts_with("-LOADING") => Ok(Some(Answer::Later)),
            None => Err(io::Error::other(format!("unexpected answer: {line}"))),
        }
    }
}

fn frame(body: RequestBody<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_request(&mut bytes, &Request { number: 1, body });
    bytes
}

fn answer_in_frame(bytes: &[u8]) -> io::Result<Option<Answer>> {
    let extent = peek(bytes, response_length_max(VALUE_BYTES_MAX_LIMIT)).map_err(io::Error::other)?;
    let Some(payload) = extent.and_then(|extent| extent.payload(bytes)) else { return Ok(None) };
    match decode_response(payload).map_err(io::Error::other)?.body {
        ResponseBody::Number { value } => Ok(Some(Answer::Number(value))),
        other => Err(io::Error::other(format!("unexpected answer: {other:?}"))),
    }
}

/// A connection.
pub struct Wire {
    speak: Speak,
    stream: TcpStream,
    increment: Vec<u8>,
    input: Vec<u8>,
}

impl Wire {
    /// Connects, and says hello where that is asked for.
    pub fn connect(speak: Speak, address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut wire = Self { speak, stream, increment: speak.increment(), input: vec![0; 4096] };
        if speak == Speak::Kvs {
            let hello = RequestBody::Hello { protocol: PROTOCOL, name: "pauses", pid: std::process::id() };
            wire.stream.write_all(&frame(hello))?;
            wire.receive(|bytes| {
                let extent = peek(bytes, response_length_max(1 << 10)).map_err(io::Error::other)?;
                let Some(payload) = extent.and_then(|extent| extent.payload(bytes)) else { return Ok(None) };
                let body = decode_response(payload).map_err(io::Error::other)?.body;
                if matches!(body, ResponseBody::Welcome { .. }) {
                    return Ok(Some(()));
                }
                Err(io::Error::other(format!("no welcome but {body:?}")))
            })?;
        }
        Ok(wire)
    }

    /// Counts up by one.
    pub fn increment(&mut self) -> io::Result<Answer> {
        self.stream.write_all(&self.increment)?;
        let speak = self.speak;
        self.receive(|bytes| speak.answer(bytes))
    }

    /// Reads until `whole` makes something of it.
    fn receive<T>(&mut self, whole: impl Fn(&[u8]) -> io::Result<Option<T>>) -> io::Result<T> {
        let mut filled = 0;
        loop {
            match self.stream.read(&mut self.input[filled..])? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => filled += count,
            }
            if let Some(found) = whole(&self.input[..filled])? {
                return Ok(found);
            }
        }
    }

    /// Sends a line and returns the first line of the answer that begins with `start`, without that.
    pub fn line(&mut self, line: &str, start: &str) -> io::Result<String> {
        self.stream.write_all(format!("{line}\r\n").as_bytes())?;
        self.receive(|bytes| {
            let text = String::from_utf8_lossy(bytes);
            if text.starts_with('-') && text.ends_with("\r\n") {
                return Err(io::Error::other(format!("{line}: {}", text.trim())));
            }
            let found =
                text.split_inclusive("\r\n").find_map(|line| line.strip_prefix(start)?.strip_suffix("\r\n"));
            Ok(found.map(str::to_owned))
        })
    }

    /// Stores `entries` entries of 16 + 32 bytes.
    pub fn fill(&mut self, entries: u64) -> io::Result<()> {
        let value = "v".repeat(32);
        let mut answers = vec![0; self.speak.stored_bytes()];
        for start in (0..entries).step_by(AT_ONCE as usize) {
            let numbers = start..(start + AT_ONCE).min(entries);
            answers.resize(self.speak.stored_bytes() * (numbers.end - numbers.start) as usize, 0);
            let sets: Vec<u8> =
                numbers.flat_map(|number| self.speak.set(&format!("fill{number:012}"), &value)).collect();
            self.stream.write_all(&sets)?;
            self.stream.read_exact(&mut answers)?;
        }
        Ok(())
    }

    /// Sets the counter to 0.
    pub fn set_counter(&mut self) -> io::Result<()> {
        self.stream.write_all(&self.speak.set(COUNTER, "0"))?;
        self.stream.read_exact(&mut vec![0; self.speak.stored_bytes()])
    }
}
