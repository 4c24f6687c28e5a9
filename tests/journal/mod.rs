//! A writer that keeps a journal: what was acknowledged, and what is in doubt because the connection was lost before its
//! answer. What the store holds later is held against it.
//!
//! Invariant: a key or counter belongs to one writer, and what a lost connection had sent is executed before that connection's
//! server is dead or not at all. So the values of a key come in the order in which they were sent.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use kvs_core::wire::RequestBody;
use kvs_harness::connection::{Answer, Connection, delete, get, increment, set};
use kvs_harness::random::Random;
use kvs_harness::store::Ready;

const KEYS: usize = 200;
const BATCH: usize = 16;

/// What may be stored under a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Absent,
    /// The value that [`value`] makes for this number.
    Version(u64),
}

/// A key: what it holds for certain, and what it may hold since, oldest first.
#[derive(Debug, Clone)]
struct Cell {
    certain: State,
    in_doubt: Vec<State>,
}

/// A counter: increments that are acknowledged, and those in doubt.
#[derive(Debug, Clone, Copy, Default)]
struct Count {
    acknowledged: i64,
    in_doubt: i64,
}

/// One request in flight.
#[derive(Debug, Clone, Copy)]
enum Step {
    Write(usize, State),
    Count,
}

/// What one writer knows.
pub struct Journal {
    name: u64,
    random: Random,
    version: u64,
    cells: Vec<Cell>,
    count: Count,
    last_number: i64,
    acknowledged: u64,
    lost: u64,
}

impl Journal {
    /// The journal of writer `name`, with a random generator of its own.
    pub fn new(name: u64, random: &mut Random) -> Self {
        Self {
            name,
            random: Random::new(random.number()),
            version: 0,
            cells: vec![Cell { certain: State::Absent, in_doubt: Vec::new() }; KEYS],
            count: Count::default(),
            last_number: 0,
            acknowledged: 0,
            lost: 0,
        }
    }

    /// Writes that were acknowledged.
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged
    }

    /// Writes that were ever in doubt.
    pub fn in_doubt(&self) -> u64 {
        self.lost
    }

    /// What the store holds that it must not, or does not hold that it must.
    pub fn faults(&self, connection: &mut Connection) -> Vec<String> {
        let mut faults: Vec<String> =
            (0..KEYS).filter_map(|which| self.fault_of_key(connection, which)).collect();
        faults.extend(self.fault_of_count(connection));
        faults
    }

    fn fault_of_key(&self, connection: &mut Connection, which: usize) -> Option<String> {
        let (key, cell) = (self.key(which), &self.cells[which]);
        let found = connection.ask(&get(&key)).expect("read");
        let fits = |state: &State| match (state, &found) {
            (State::Absent, Answer::Missing) => true,
            (State::Version(version), Answer::Value(bytes)) => *bytes == value(*version),
            _ => false,
        };
        if fits(&cell.certain) || cell.in_doubt.iter().any(fits) {
            return None;
        }
        let found = match found {
            Answer::Value(bytes) => {
                format!(
                    "{} bytes, version {:?}",
                    bytes.len(),
                    bytes.first_chunk().map(|b| u64::from_le_bytes(*b))
                )
            }
            other => format!("{other:?}"),
        };
        Some(format!("{}: found {found}, journal says {cell:?}", String::from_utf8_lossy(&key)))
    }

    fn fault_of_count(&self, connection: &mut Connection) -> Option<String> {
        let found = match connection.ask(&get(&self.counter())).expect("read") {
            Answer::Missing => 0,
            Answer::Value(text) => String::from_utf8_lossy(&text).parse().expect("a number"),
            other => panic!("{other:?}"),
        };
        let Count { acknowledged, in_doubt } = self.count;
        let fits = (acknowledged..=acknowledged + in_doubt).contains(&found);
        (!fits).then(|| format!("counter {}: {found}, journal says {:?}", self.name, self.count))
    }

    fn key(&self, which: usize) -> Vec<u8> {
        format!("journal {} key {which}", self.name).into_bytes()
    }

    fn counter(&self) -> Vec<u8> {
        format!("journal {} counter", self.name).into_bytes()
    }

    /// The next request, and its value.
    fn next_step(&mut self) -> Step {
        let which = self.random.below(KEYS as u64) as usize;
        match self.random.below(10) {
            0 => Step::Write(which, State::Absent),
            1..=3 => Step::Count,
            _ => {
                self.version = (self.version + 0x1_0000) & !0xffff | length_class(&mut self.random);
                Step::Write(which, State::Version(self.version))
            }
        }
    }

    fn send(&self, connection: &mut Connection, steps: &[Step]) -> io::Result<()> {
        for step in steps {
            match *step {
                Step::Count => connection.queue(&increment(&self.counter(), 1)),
                Step::Write(which, State::Absent) => connection.queue(&delete(&self.key(which))),
                Step::Write(which, State::Version(version)) => {
                    connection.queue(&set(&self.key(which), &value(version)))
                }
            };
        }
        connection.flush()
    }

    /// Notes an answer; a wrong one is a fault of the store.
    fn acknowledge(&mut self, step: Step, answer: &Answer) {
        match (step, answer) {
            (Step::Count, Answer::Number(number)) => {
                assert!(
                    *number > self.last_number,
                    "counter {}: {number} after {}",
                    self.name,
                    self.last_number
                );
                self.last_number = *number;
                self.count.acknowledged += 1;
            }
            (Step::Write(which, State::Absent), Answer::Deleted | Answer::Missing)
            | (Step::Write(which, State::Version(_)), Answer::Stored) => {
                let Step::Write(_, state) = step else { unreachable!("it is a write") };
                self.cells[which] = Cell { certain: state, in_doubt: Vec::new() };
            }
            _ => panic!("writer {}: {step:?} answered {answer:?}", self.name),
        }
        self.acknowledged += 1;
    }

    /// Notes that a request was perhaps executed. A later acknowledgement of the same key settles it.
    fn doubt(&mut self, step: Step) {
        match step {
            Step::Count => self.count.in_doubt += 1,
            Step::Write(which, state) => self.cells[which].in_doubt.push(state),
        }
        self.lost += 1;
    }
}

/// A journal at work: it writes until it is told to stop, and connects again when the connection is lost.
pub struct Writer<'a> {
    journal: &'a mut Journal,
    tcp: SocketAddr,
    unix: PathBuf,
    stop: &'a AtomicBool,
    written: &'a AtomicU64,
}

impl<'a> Writer<'a> {
    /// A writer that adds what is acknowledged to `written`, until `stop`.
    pub fn new(
        ready: &Ready,
        journal: &'a mut Journal,
        stop: &'a AtomicBool,
        written: &'a AtomicU64,
    ) -> Self {
        Self { journal, tcp: ready.tcp, unix: ready.unix.clone(), stop, written }
    }

    /// Writes until it is told to stop.
    pub fn run(mut self) {
        while !self.stop.load(Ordering::Relaxed) {
            // Even writers use TCP, odd ones the unix socket.
            let connected = if self.journal.name.is_multiple_of(2) {
                Connection::welcomed_tcp(self.tcp)
            } else {
                Connection::welcomed_unix(&self.unix)
            };
            match connected {
                Ok(connection) => self.write_until_lost(connection),
                Err(_) => std::thread::yield_now(),
            }
        }
    }

    fn write_until_lost(&mut self, mut connection: Connection) {
        while !self.stop.load(Ordering::Relaxed) {
            let steps: Vec<Step> = (0..BATCH).map(|_| self.journal.next_step()).collect();
            let sent = self.journal.send(&mut connection, &steps);
            let answered = self.take_answers(&mut connection, &steps);
            for step in &steps[answered..] {
                self.journal.doubt(*step);
            }
            if sent.is_err() || answered < steps.len() {
                return;
            }
        }
    }

    /// Takes answers until all are there or the connection is lost; returns how many there were.
    fn take_answers(&mut self, connection: &mut Connection, steps: &[Step]) -> usize {
        for (at, step) in steps.iter().enumerate() {
            let Ok((_, answer)) = connection.receive() else { return at };
            self.journal.acknowledge(*step, &answer);
            self.written.fetch_add(1, Ordering::Relaxed);
        }
        steps.len()
    }
}

/// How long a value is, told by the lowest bits of its version.
fn length_class(random: &mut Random) -> u64 {
    match random.below(100) {
        0 => 300_000 / 16,
        1..=3 => 5_000 / 16,
        4..=9 => 4_096 / 16,
        _ => random.below(20),
    }
}

/// The value of a version: its number, then bytes that follow from it.
fn value(version: u64) -> Vec<u8> {
    let mut bytes = version.to_le_bytes().to_vec();
    bytes.extend(Random::new(version).bytes((version & 0xffff) as usize * 16));
    bytes
}

/// Stores `count` entries of 16 + 32 bytes.
pub fn fill(connection: &mut Connection, count: u64) {
    const AT_ONCE: u64 = 1_000;
    let value = [b'v'; 32];
    for start in (0..count).step_by(AT_ONCE as usize) {
        let end = (start + AT_ONCE).min(count);
        for number in start..end {
            let key = format!("fill{number:012}");
            let body: RequestBody<'_> = set(key.as_bytes(), &value);
            connection.queue(&body);
        }
        connection.flush().expect("sent");
        for _ in start..end {
            assert_eq!(connection.receive().expect("stored").1, Answer::Stored);
        }
    }
}
