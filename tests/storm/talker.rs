//! A client that is never to notice anything: one connection, opened once.
//!
//! Invariant: answers come in the order of their requests, one each, and every one is the one that must come. The connection is never
//! opened again, so any end of it is a fault.

use std::io::Write;
use std::net::Shutdown;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use kvs_core::wire::{Request, RequestBody, SetCondition, encode_request};
use kvs_harness::connection::{Answer, Connection, Socket};
use kvs_harness::random::Random;
use kvs_harness::store::Ready;
use kvs_harness::wait::SOON;

use super::weather::Weather;

/// One client.
pub struct Talker<'a> {
    name: String,
    weather: &'a Weather,
    /// For whatever the client decides.
    pub random: Random,
    connection: Connection,
    /// Number of the last request.
    asked: u32,
    /// Number of the last answer.
    answered: u32,
    /// Requests that are encoded and not sent.
    queued: Vec<u8>,
}

/// How a client reaches the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// Over TCP.
    Tcp,
    /// Over the unix socket.
    Unix,
}

impl<'a> Talker<'a> {
    /// Connects and is welcomed. A server that dies in the microseconds in which nobody else holds the socket takes the connection
    /// with it; so until the welcome it may be lost, and is opened again. Being refused is a fault.
    pub fn connect(
        name: String,
        ready: &Ready,
        transport: Transport,
        weather: &'a Weather,
        random: &mut Random,
    ) -> Result<Self> {
        let end = Instant::now() + SOON;
        let connection = loop {
            let opened = match transport {
                Transport::Tcp => Connection::tcp(ready.tcp),
                Transport::Unix => Connection::unix(&ready.unix),
            };
            let mut opened = opened.context("connecting")?;
            match opened.ask(&kvs_harness::connection::hello()) {
                Ok(Answer::Welcome { .. }) => break opened,
                Ok(other) => bail!("no welcome but {other:?}"),
                Err(error) => {
                    ensure!(weather.kills() > 0 && Instant::now() < end, "before the welcome: {error}");
                }
            }
        };
        let random = Random::new(random.number());
        Ok(Self { name, weather, random, connection, asked: 1, answered: 1, queued: Vec::new() })
    }

    /// What the client calls itself, for keys of its own.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The storm it is in.
    pub fn weather(&self) -> &'a Weather {
        self.weather
    }

    /// Its socket.
    pub fn socket(&mut self) -> &mut Socket {
        self.connection.socket()
    }

    /// Adds a request to what is sent next.
    pub fn queue(&mut self, body: RequestBody<'_>) {
        self.asked = self.asked.wrapping_add(1);
        encode_request(&mut self.queued, &Request { number: self.asked, body });
    }

    /// Takes what was queued, to be sent by hand.
    pub fn take_queued(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.queued)
    }

    /// Sends what was queued.
    pub fn send(&mut self) -> Result<()> {
        let sent = self.connection.socket().write_all(&self.queued);
        self.queued.clear();
        sent.context("sending")
    }

    /// Sends bytes as they are.
    pub fn send_raw(&mut self, bytes: &[u8]) -> Result<()> {
        self.connection.send_raw(bytes).context("sending")
    }

    /// The next answer.
    pub fn take(&mut self) -> Result<Answer> {
        let due = self.answered.wrapping_add(1);
        let (number, answer) =
            self.connection.receive().with_context(|| format!("waiting for answer {due}"))?;
        ensure!(number == due, "answer {number} came where {due} was due: {}", brief(&answer));
        self.answered = due;
        self.weather.answered(1);
        Ok(answer)
    }

    /// The next answer, which must be `expected`.
    pub fn expect(&mut self, expected: &Answer) -> Result<()> {
        let found = self.take()?;
        ensure!(found == *expected, "answer {}: {}, not {}", self.answered, brief(&found), brief(expected));
        Ok(())
    }

    /// Asks for one thing and demands an answer.
    pub fn demand(&mut self, body: RequestBody<'_>, expected: &Answer) -> Result<()> {
        self.queue(body);
        self.send()?;
        self.expect(expected)
    }

    /// A pause of less than `most`.
    pub fn pause(&mut self, most: Duration) {
        std::thread::sleep(Duration::from_micros(self.random.below(most.as_micros() as u64)));
    }

    /// Ends the sending side.
    pub fn half_close(&mut self) -> Result<()> {
        self.connection.socket().shutdown(Shutdown::Write).context("half closing")
    }

    /// Demands the end of the connection, and nothing before it.
    pub fn expect_end(&mut self) -> Result<()> {
        let rest = self.connection.read_to_end().context("waiting for the end")?;
        ensure!(rest.is_empty(), "{} bytes behind the last answer", rest.len());
        Ok(())
    }
}

/// An answer in a few words: a value may have megabytes.
fn brief(answer: &Answer) -> String {
    match answer {
        Answer::Value(bytes) if bytes.len() > 40 => format!("a value of {} bytes", bytes.len()),
        Answer::Value(bytes) => format!("value {:?}", String::from_utf8_lossy(bytes)),
        other => format!("{other:?}"),
    }
}

/// A request to store a value under a key that must not exist.
pub fn insert<'a>(key: &'a [u8], value: &'a [u8]) -> RequestBody<'a> {
    RequestBody::Set { condition: SetCondition::IfAbsent, key, value }
}
