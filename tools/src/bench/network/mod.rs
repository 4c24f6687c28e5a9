//! The load generator for stores that are reached over sockets.
//!
//! | module | what it is |
//! |---|---|
//! | [`protocol`] | what differs between stores; [`kvs`] and [`text`] are the two ways of talking |
//! | [`connection`] | a connection: what is asked, sent, answered |
//! | [`driver`] | a thread with its connections: one loop for all stores, closed or open |
//! | [`source`] | which requests, and when |
//! | [`tally`] | what a thread has counted |

pub mod connection;
mod driver;
#[cfg(test)]
mod driver_tests;
pub mod kvs;
pub mod protocol;
mod source;
mod tally;
#[cfg(test)]
mod tests;
pub mod text;

use std::any::Any;
use std::num::NonZeroU64;
use std::rc::Rc;
use std::thread::scope;

use connection::{Address, Connection};
use driver::{Driver, Orders};
use protocol::Protocol;
use source::Source;
use tally::together;

use super::results::Sample;
use super::scenario::Load;
use super::target::{Interrupted, Measurement, Span, Target};
use super::workload::{Values, Workload};

/// Connections that store all keys at the beginning.
const FILL_CONNECTIONS: usize = 8;
/// Most requests unanswered on each of those, and most bytes.
const FILL_PIPELINE: usize = 64;
const FILL_BYTES: usize = 256 << 10;
/// Most threads that ask, unless told otherwise: the servers need the cores too.
const THREADS_MAX: usize = 2;

/// A store that is reached over sockets.
pub struct NetworkTarget<P> {
    /// What it is called.
    pub name: String,
    /// Where it listens.
    pub address: Address,
    /// How it is talked to.
    pub protocol: P,
    /// Whether values that come back are compared.
    pub checks_values: bool,
    /// What is asked.
    pub workload: Workload,
    /// The values of the keys.
    pub values: Values,
    /// How it is asked.
    pub load: Load,
    /// Its server, which runs as long as any target has it.
    pub _server: Rc<dyn Any>,
}

impl Load {
    /// Threads that ask.
    pub fn thread_count(&self) -> usize {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        self.threads.unwrap_or(cores.min(THREADS_MAX)).clamp(1, self.connections)
    }
}

impl<P: Protocol> NetworkTarget<P> {
    fn orders(&self, pipeline: usize, rate: Option<f64>) -> Orders<'_, P> {
        let (protocol, workload, values) = (&self.protocol, &self.workload, &self.values);
        Orders { protocol, workload, values, checks_values: self.checks_values, pipeline, rate }
    }

    fn connect(&self, count: usize, pipeline: usize) -> anyhow::Result<Vec<Connection>> {
        (0..count).map(|_| Connection::open(&self.address, &self.protocol, pipeline)).collect()
    }

    /// Stores all keys; tells now and then how many.
    ///
    /// # Errors
    /// The store doesn't take them, or the user wants the end.
    pub fn fill(&self, interrupted: &Interrupted, told: &dyn Fn(u64)) -> anyhow::Result<()> {
        let pipeline = (FILL_BYTES / (self.workload.value_bytes + 1)).clamp(1, FILL_PIPELINE);
        let connections = self.connect(FILL_CONNECTIONS, pipeline)?;
        let source = Source::Fill(0, self.workload.keys);
        Driver::new(self.orders(pipeline, None), source, connections)?.finish(interrupted, told)
    }

    fn drivers(&self) -> anyhow::Result<Vec<Driver<'_, P>>> {
        let Load { connections, pipeline, rate, .. } = self.load;
        let threads = self.load.thread_count();
        let driver = |thread: usize| {
            let share = connections / threads + usize::from(thread < connections % threads);
            let orders = self.orders(pipeline, rate.map(|rate| rate / threads as f64));
            let source = Source::Endless(self.workload.generator(thread as u64));
            Driver::new(orders, source, self.connect(share, pipeline)?)
        };
        (0..threads).map(driver).collect()
    }

    fn load(&self, span: &Span) -> anyhow::Result<Sample> {
        let drivers = self.drivers()?;
        let samples = scope(|scope| {
            // All are started before the first is waited for.
            let threads: Vec<_> =
                drivers.into_iter().map(|driver| scope.spawn(move || ask(driver, span))).collect();
            let joined = threads.into_iter().map(|thread| thread.join().expect("no thread panics"));
            joined.collect::<Result<Vec<_>, _>>()
        })?;
        Ok(together(samples))
    }
}

fn ask<P: Protocol>(driver: Driver<'_, P>, span: &Span) -> anyhow::Result<Sample> {
    // For an open loop's times; without it they are kept a little less exactly.
    let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1));
    driver.measure(span)
}

impl<P: Protocol> Target for NetworkTarget<P> {
    fn name(&self) -> &str {
        &self.name
    }

    fn measure(&mut self, span: &Span) -> anyhow::Result<Measurement> {
        Ok(Measurement::Load(self.load(span)?))
    }
}
