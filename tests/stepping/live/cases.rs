//! What the client does while the worker is stepped, and what must come of it.

use kvs_core::control::Transport;
use kvs_core::wire::{RequestBody, ResponseBody, SetCondition};
use kvs_harness::connection::{get, increment, set};

use super::servers::Servers;
use super::talk::Talk;

/// Bytes of a value whose answer takes several sends.
const LARGE_READ: usize = 4 << 20;
/// Bytes of a value that takes several receives.
const LARGE_STORED: usize = 40_000;
/// Bytes of a large answer that a client takes at once.
const SOME: usize = 64 << 10;
/// Where a frame is cut in two.
const HALF: usize = 9;

/// What happens from one wait of the worker to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// One request.
    Increment,
    /// An increment, a set and a read at once.
    Pipeline,
    /// Half a frame.
    FirstHalf,
    /// The rest of a frame whose first half was received.
    SecondHalf,
    /// A read of a large value, up to where the client's kernel takes no more.
    LargeAnswer,
    /// On from there, when the client has taken some.
    MoreOfLargeAnswer,
    /// A large value is stored: received in pieces.
    LargeValue,
    /// A request and the end of the client's input.
    LastRequest,
}

/// All kinds, with their names.
pub const KINDS: [(Kind, &str); 8] = [
    (Kind::Increment, "increment"),
    (Kind::Pipeline, "pipeline of three"),
    (Kind::FirstHalf, "first half of a frame"),
    (Kind::SecondHalf, "second half of a frame"),
    (Kind::LargeAnswer, "large answer"),
    (Kind::MoreOfLargeAnswer, "large answer, further on"),
    (Kind::LargeValue, "large value stored"),
    (Kind::LastRequest, "request and end of input"),
];

/// The client of one kind over one transport.
pub struct Case {
    kind: Kind,
    transport: Transport,
    /// None where each try has a connection of its own.
    talk: Option<Talk>,
    key: Vec<u8>,
    count: i64,
    large: Vec<u8>,
}

impl Case {
    /// Connects it, and stores what it needs.
    ///
    /// # Errors
    /// A violation when an answer is wrong.
    pub fn new(servers: &Servers, kind: Kind, transport: Transport) -> anyhow::Result<Self> {
        let key = format!("{kind:?} {transport:?}").into_bytes();
        let mut case = Self { kind, transport, talk: None, key, count: 0, large: Vec::new() };
        let mut talk = case.connect(servers)?;
        case.large = match kind {
            Kind::LargeAnswer | Kind::MoreOfLargeAnswer => pattern(LARGE_READ, 1),
            _ => Vec::new(),
        };
        if !case.large.is_empty() {
            talk.queue(set(b"large", &case.large), ResponseBody::Stored);
        }
        talk.finish()?;
        case.talk = Some(talk);
        Ok(case)
    }

    fn connect(&self, servers: &Servers) -> anyhow::Result<Talk> {
        let is_slow = matches!(self.kind, Kind::LargeAnswer | Kind::MoreOfLargeAnswer);
        Talk::new(servers.store.ready(), self.transport, is_slow)
    }

    fn increment(&mut self, talk: &mut Talk) {
        self.count += 1;
        talk.queue(increment(&self.key, 1), ResponseBody::Number { value: self.count });
    }

    /// Gets ready for a try, while the worker runs.
    ///
    /// # Errors
    /// A violation when an answer is wrong.
    pub fn prepare(&mut self, servers: &Servers) -> anyhow::Result<Talk> {
        let mut talk = match self.talk.take() {
            Some(talk) => talk,
            None => self.connect(servers)?,
        };
        match self.kind {
            Kind::Increment | Kind::FirstHalf | Kind::LastRequest => self.increment(&mut talk),
            Kind::Pipeline => {
                self.increment(&mut talk);
                let value = format!("value {}", self.count);
                talk.queue(set(b"of three", value.as_bytes()), ResponseBody::Stored);
                talk.queue(get(b"of three"), ResponseBody::Value { value: value.as_bytes() });
            }
            Kind::SecondHalf => {
                self.increment(&mut talk);
                talk.send(HALF)?;
                servers.await_received(talk.id, talk.written)?;
            }
            Kind::LargeAnswer => talk.queue(get(b"large"), ResponseBody::Value { value: &self.large }),
            Kind::MoreOfLargeAnswer => {
                talk.queue(get(b"large"), ResponseBody::Value { value: &self.large });
                talk.send(usize::MAX)?;
                servers.await_received(talk.id, talk.written)?;
            }
            Kind::LargeValue => {
                self.count += 1;
                self.large = pattern(LARGE_STORED, self.count as u64);
                let condition = SetCondition::Always;
                let body = RequestBody::Set { condition, key: &self.key, value: &self.large };
                talk.queue(body, ResponseBody::Stored);
            }
        }
        Ok(talk)
    }

    /// Does what wakes the worker.
    ///
    /// # Errors
    /// A violation when the connection is gone.
    pub fn act(&self, talk: &mut Talk) -> anyhow::Result<()> {
        match self.kind {
            Kind::Increment | Kind::Pipeline | Kind::SecondHalf | Kind::LargeAnswer | Kind::LargeValue => {
                talk.send(usize::MAX)
            }
            Kind::FirstHalf => talk.send(HALF),
            Kind::MoreOfLargeAnswer => Ok(()),
            Kind::LastRequest => {
                talk.send(usize::MAX)?;
                talk.end()
            }
        }
    }

    /// Does more of it while the worker still sleeps.
    ///
    /// # Errors
    /// A violation when what comes is wrong.
    pub fn act_on(&self, talk: &mut Talk) -> anyhow::Result<()> {
        if self.kind == Kind::MoreOfLargeAnswer {
            talk.take(SOME)?;
        }
        Ok(())
    }

    /// Takes all answers, and asks for more on the same connection.
    ///
    /// # Errors
    /// A violation when an answer is wrong or missing.
    pub fn finish(&mut self, mut talk: Talk) -> anyhow::Result<()> {
        talk.finish()?;
        match self.kind {
            Kind::LastRequest => return talk.await_end(),
            Kind::LargeValue => talk.queue(get(&self.key), ResponseBody::Value { value: &self.large }),
            _ => self.increment(&mut talk),
        }
        talk.finish()?;
        self.talk = Some(talk);
        Ok(())
    }
}

/// Bytes of which no two stretches are alike.
fn pattern(length: usize, seed: u64) -> Vec<u8> {
    kvs_harness::random::Random::new(seed).bytes(length)
}
