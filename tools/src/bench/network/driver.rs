//! One thread of the load generator, with connections of its own: the same loop for every store.
//!
//! For a connection that has answers there is one `recv`, and one `send` for all that is asked next. In a closed loop that happens
//! when the whole batch is answered, as other load generators do it; in an open loop when it is time. Nothing is allocated once the
//! buffers have their size.

use std::cell::Cell;
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;

use super::connection::{Connection, Pending};
use super::protocol::{Body, Protocol};
use super::source::{Schedule, Source};
use super::tally::Tally;
use crate::bench::results::Sample;
use crate::bench::target::{Interrupted, Span};
use crate::bench::workload::{Values, Workload};

/// Events taken from the kernel at once.
const EVENTS_MAX: usize = 256;
/// Least room for what comes at once, beside one whole answer.
const INPUT_BYTES: usize = 256 << 10;
/// Longest wait before looking at the clock and for Ctrl-C.
const LOOK_PAUSE_NS: u64 = 50_000_000;
/// Answers after which it is told how far filling is.
const ANSWERS_PER_WORD: u64 = 50_000;
/// A server that answers nothing for so long has failed.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// Of this many values, one is compared byte for byte; of the others, status and length.
const VALUES_PER_CHECK: u64 = 16;

/// What a thread needs to know.
pub struct Orders<'a, P> {
    /// How to talk.
    pub protocol: &'a P,
    /// What is asked.
    pub workload: &'a Workload,
    /// The values of the keys.
    pub values: &'a Values,
    /// Whether values that come back are compared; the null server has others.
    pub checks_values: bool,
    /// Most requests on a connection that are not answered.
    pub pipeline: usize,
    /// Requests a second of this thread, in an open loop.
    pub rate: Option<f64>,
}

/// A thread at work.
pub struct Driver<'a, P> {
    orders: Orders<'a, P>,
    source: Source,
    connections: Vec<Connection>,
    epoll: OwnedFd,
    input: Vec<u8>,
    clock: Instant,
    tally: Tally,
    /// Values that came.
    values_seen: u64,
    schedule: Option<Schedule>,
    /// In an open loop, connections that can be asked more.
    free: VecDeque<usize>,
    /// In an open loop, connections with something to send.
    unsent: Vec<usize>,
    /// Requests that are not answered.
    pending: usize,
}

impl<'a, P: Protocol> Driver<'a, P> {
    /// One that has asked nothing yet.
    ///
    /// # Errors
    /// No epoll is to be had.
    pub fn new(orders: Orders<'a, P>, source: Source, connections: Vec<Connection>) -> anyhow::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).context("can't make an epoll")?;
        for (place, connection) in connections.iter().enumerate() {
            epoll::add(&epoll, connection.socket(), EventData::new_u64(place as u64), EventFlags::IN)
                .context("can't wait for a connection")?;
        }
        let input = vec![0; INPUT_BYTES + 2 * orders.workload.value_bytes];
        let free = (0..connections.len()).collect();
        Ok(Self {
            orders,
            source,
            connections,
            epoll,
            input,
            clock: Instant::now(),
            tally: Tally::new(),
            values_seen: 0,
            schedule: None,
            free,
            unsent: Vec::new(),
            pending: 0,
        })
    }

    /// Asks until the time is over.
    ///
    /// # Errors
    /// A connection is lost, an answer is wrong, the server is silent, or the user wants the end.
    pub fn measure(mut self, span: &Span) -> anyhow::Result<Sample> {
        let warm_ns = span.warm_up.as_nanos() as u64;
        self.begin()?;
        self.drive(&span.interrupted, |driver| driver.now_ns() >= warm_ns)?;
        self.tally.reset();
        let begun_ns = self.now_ns();
        let end_ns = begun_ns + span.duration.as_nanos() as u64;
        self.drive(&span.interrupted, |driver| driver.now_ns() >= end_ns)?;
        let ended_ns = self.now_ns();
        self.note_unanswered(ended_ns);
        Ok(self.tally.into_sample((ended_ns - begun_ns) as f64 / 1e9))
    }

    /// Asks until there is nothing more to ask and all is answered; tells now and then how far it is.
    ///
    /// # Errors
    /// As [`measure`](Self::measure).
    pub fn finish(mut self, interrupted: &Interrupted, told: &dyn Fn(u64)) -> anyhow::Result<()> {
        let next = Cell::new(0);
        self.begin()?;
        self.drive(interrupted, |driver| {
            let done = driver.tally.operations();
            if done >= next.get() {
                told(done);
                next.set(done + ANSWERS_PER_WORD);
            }
            driver.pending == 0
        })
    }

    fn now_ns(&self) -> u64 {
        self.clock.elapsed().as_nanos() as u64
    }

    /// The first requests.
    fn begin(&mut self) -> anyhow::Result<()> {
        self.clock = Instant::now();
        self.schedule = self.orders.rate.map(|rate| Schedule::new(rate, 0));
        if self.schedule.is_some() {
            return self.keep_to_schedule();
        }
        for place in 0..self.connections.len() {
            let now_ns = self.now_ns();
            self.ask_batch(place, now_ns)?;
        }
        Ok(())
    }

    /// Serves the connections until `is_over`, which is asked after each look at the kernel.
    fn drive(&mut self, interrupted: &Interrupted, is_over: impl Fn(&Self) -> bool) -> anyhow::Result<()> {
        let mut events = Vec::with_capacity(EVENTS_MAX);
        let mut heard = (self.tally.operations(), Instant::now());
        while !is_over(self) {
            self.wait(&mut events)?;
            for event in events.drain(..) {
                self.serve(event.data.u64() as usize, event.flags)?;
            }
            if self.schedule.is_some() {
                self.keep_to_schedule()?;
            }
            interrupted.check()?;
            let operations = self.tally.operations();
            if operations != heard.0 || self.pending == 0 {
                heard = (operations, Instant::now());
            }
            let silence = heard.1.elapsed();
            ensure!(silence < SILENCE_MAX, "the server hasn't answered for {} s", SILENCE_MAX.as_secs());
        }
        interrupted.check()
    }

    fn wait(&self, events: &mut Vec<epoll::Event>) -> anyhow::Result<()> {
        let mut pause_ns = LOOK_PAUSE_NS;
        if let Some(schedule) = self.schedule.as_ref().filter(|_| !self.free.is_empty()) {
            pause_ns = pause_ns.min(schedule.next_ns().saturating_sub(self.now_ns()));
        }
        let pause = Timespec { tv_sec: 0, tv_nsec: pause_ns as _ };
        match epoll::wait(&self.epoll, spare_capacity(events), Some(&pause)) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(errno).context("can't wait for answers"),
        }
    }

    fn serve(&mut self, place: usize, flags: EventFlags) -> anyhow::Result<()> {
        if flags.contains(EventFlags::OUT) {
            self.flush(place, true)?;
        }
        let connection = &mut self.connections[place];
        let Some(filled) = connection.receive(&mut self.input)? else { return Ok(()) };
        let now_ns = self.clock.elapsed().as_nanos() as u64;
        self.take_answers(place, filled, now_ns)?;
        if self.schedule.is_some() {
            // It was full, or it is in the list.
            return Ok(());
        }
        if self.connections[place].pending.is_empty() { self.ask_batch(place, now_ns) } else { Ok(()) }
    }

    /// Takes all whole answers among the first bytes of the input.
    fn take_answers(&mut self, place: usize, filled: usize, now_ns: u64) -> anyhow::Result<()> {
        let connection = &mut self.connections[place];
        let was_full = connection.pending.len() >= self.orders.pipeline;
        let (mut from, before) = (0, connection.pending.len());
        while from < filled {
            let input = &self.input[from..filled];
            let answer = self.orders.protocol.answer(input, connection.number_expected());
            let Some(answer) = answer.map_err(anyhow::Error::msg)? else { break };
            let Some(pending) = connection.answered() else { bail!("the server answers what nobody asked") };
            match answer.body {
                Body::Value(value) if pending.operation.is_read => {
                    self.values_seen += 1;
                    if self.orders.checks_values && self.values_seen.is_multiple_of(VALUES_PER_CHECK) {
                        let index = pending.operation.index;
                        ensure!(value == self.orders.values.of(index), "key {index} has another key's value");
                    }
                }
                Body::Stored if !pending.operation.is_read => {}
                Body::Missing => {
                    bail!("key {} is gone; has the server too little memory?", pending.operation.index)
                }
                _ => bail!("the server answers a read with a store, or the other way round"),
            }
            self.tally.answered(now_ns - pending.since_ns);
            from += answer.length;
        }
        connection.rest.clear();
        connection.rest.extend_from_slice(&self.input[from..filled]);
        self.pending -= before - connection.pending.len();
        if was_full && connection.pending.len() < self.orders.pipeline {
            self.free.push_back(place);
        }
        Ok(())
    }

    /// Asks as much as may be unanswered, and sends it.
    fn ask_batch(&mut self, place: usize, now_ns: u64) -> anyhow::Result<()> {
        for _ in 0..self.orders.pipeline {
            let Some(operation) = self.source.next() else { break };
            let pending = Pending { operation, since_ns: now_ns };
            self.connections[place].ask(self.orders.protocol, self.orders.values, pending);
            self.pending += 1;
        }
        self.flush(place, false)
    }

    /// Asks what has to be asked by now, as far as there are connections that may be asked, and sends it.
    fn keep_to_schedule(&mut self) -> anyhow::Result<()> {
        let now_ns = self.now_ns();
        while let Some(&place) = self.free.front() {
            let Some(since_ns) = self.schedule.as_mut().and_then(|schedule| schedule.take(now_ns)) else {
                break;
            };
            let Some(operation) = self.source.next() else { break };
            self.connections[place].ask(
                self.orders.protocol,
                self.orders.values,
                Pending { operation, since_ns },
            );
            self.pending += 1;
            self.unsent.push(place);
            self.free.pop_front();
            if self.connections[place].pending.len() < self.orders.pipeline {
                self.free.push_back(place);
            }
        }
        while let Some(place) = self.unsent.pop() {
            self.flush(place, false)?;
        }
        Ok(())
    }

    /// Sends, and waits until more can be sent when not all was. `waits`: whether that is waited for already.
    fn flush(&mut self, place: usize, waits: bool) -> anyhow::Result<()> {
        let connection = &mut self.connections[place];
        connection.flush()?;
        let must_wait = connection.has_unsent();
        if must_wait != waits {
            let flags = if must_wait { EventFlags::IN | EventFlags::OUT } else { EventFlags::IN };
            epoll::modify(&self.epoll, connection.socket(), EventData::new_u64(place as u64), flags)
                .context("can't wait for a connection")?;
        }
        Ok(())
    }

    /// In an open loop, what was not answered by the end waited at least until then; also what could not even be sent.
    fn note_unanswered(&mut self, now_ns: u64) {
        let Some(schedule) = &mut self.schedule else { return };
        while let Some(since_ns) = schedule.take(now_ns) {
            self.tally.unanswered(now_ns - since_ns);
        }
        for pending in self.connections.iter().flat_map(|connection| &connection.pending) {
            self.tally.unanswered(now_ns.saturating_sub(pending.since_ns));
        }
    }
}
