//! Making connections: connect, a first request and its answer, close; again and again.
//!
//! A client of kvs says hello before its first request, and is measured with it: once as clients do, waiting for the welcome, and
//! once with both sent at once. The client closes by a reset, so that no port waits a minute before it can be used again: that
//! is the same for all stores, and spares them the same.

use std::any::Any;
use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::rc::Rc;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use kvs_core::wire::{PROTOCOL, Request, RequestBody, encode_request, peek};
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::reads::together;
use super::store;
use crate::bench::network::connection::Address;
use crate::bench::network::kvs::Kvs;
use crate::bench::network::protocol::{Body, Protocol};
use crate::bench::network::text::Text;
use crate::bench::results::{Sample, Unit, latencies};
use crate::bench::scenario::Case;
use crate::bench::servers::find_program;
use crate::bench::servers::kvs::KvsServer;
use crate::bench::servers::memcached::MemcachedServer;
use crate::bench::servers::redis::RedisServer;
use crate::bench::stores::{KVS_TCP, REDIS_TCP, Settings};
use crate::bench::target::{Measurement, Span, Target};
use crate::bench::workload::{Generator, Workload};

/// kvs, with hello and the first request sent at once.
pub const KVS_AT_ONCE: &str = "kvs-tcp-at-once";

/// Room for all answers of a connection, besides the value.
const ANSWER_BYTES: usize = 4096;
/// What this client calls itself to the operator.
const CLIENT_NAME: &str = "kvs-tools bench";

/// A store that is connected to.
struct SetupTarget<P> {
    name: &'static str,
    connecting: Connecting<P>,
    _server: Rc<dyn Any>,
}

/// How connections are made.
struct Connecting<P> {
    address: Address,
    protocol: P,
    workload: Workload,
    threads: usize,
    /// What is sent before the first request, and with it.
    hello: Vec<u8>,
}

/// The targets of a case, with their servers.
///
/// # Errors
/// A server that is here doesn't start.
pub fn targets(case: &Case, settings: &Settings, missing: &mut Vec<String>) -> Result<Vec<Box<dyn Target>>> {
    let demand = settings.demand(case);
    let mut targets: Vec<Box<dyn Target>> = Vec::new();
    let mut kvs: Option<Rc<KvsServer>> = None;
    for name in &case.targets {
        let program = match *name {
            KVS_TCP | KVS_AT_ONCE => "kvs-front",
            REDIS_TCP => "redis-server",
            _ => "memcached",
        };
        let Some(path) = find_program(program) else {
            missing.push(format!("{program} is not here; install it to compare with it"));
            continue;
        };
        targets.push(match *name {
            KVS_TCP | KVS_AT_ONCE => {
                let server = match kvs.take() {
                    Some(server) => server,
                    None => Rc::new(KvsServer::start(&path, &demand)?),
                };
                kvs = Some(Rc::clone(&server));
                let hello = if *name == KVS_AT_ONCE { hello() } else { Vec::new() };
                ready(name, (server.tcp, server), Kvs::new, hello, case, settings)?
            }
            REDIS_TCP => {
                let server = Rc::new(RedisServer::start(&path, &demand)?);
                ready(name, (server.tcp, server), Text::redis, Vec::new(), case, settings)?
            }
            _ => {
                let server = Rc::new(MemcachedServer::start(&path, &demand)?);
                ready(name, (server.tcp, server), Text::memcached, Vec::new(), case, settings)?
            }
        });
    }
    Ok(targets)
}

/// Fills the store, and is ready to connect to it.
fn ready<P: Protocol + 'static>(
    name: &'static str,
    (tcp, server): (SocketAddr, Rc<dyn Any>),
    protocol: impl Fn(&Workload) -> P,
    hello: Vec<u8>,
    case: &Case,
    settings: &Settings,
) -> Result<Box<dyn Target>> {
    let (address, workload, threads) = (Address::Tcp(tcp), case.workload, case.load.thread_count());
    store::fill(case, &address, protocol(&workload), settings)?;
    let connecting = Connecting { address, protocol: protocol(&workload), workload, threads, hello };
    Ok(Box::new(SetupTarget { name, connecting, _server: server }))
}

fn hello() -> Vec<u8> {
    let body = RequestBody::Hello { protocol: PROTOCOL, name: CLIENT_NAME, pid: std::process::id() };
    let mut frame = Vec::new();
    encode_request(&mut frame, &Request { number: 0, body });
    frame
}

impl<P: Protocol> Connecting<P> {
    /// A whole connection. `bytes` is room to be used again.
    fn connect_once(&self, index: u64, bytes: &mut Vec<u8>) -> Result<()> {
        let socket = self.address.connect()?;
        if self.hello.is_empty() {
            self.protocol.greet(socket.as_fd())?;
        }
        bytes.clear();
        bytes.extend_from_slice(&self.hello);
        self.protocol.ask_read(bytes, 1, index);
        send(&socket, bytes, SendFlags::NOSIGNAL).context("can't ask")?;
        bytes.resize(ANSWER_BYTES + self.workload.value_bytes, 0);
        let mut filled = 0;
        while !self.is_answered(&bytes[..filled])? {
            match recv(&socket, &mut bytes[filled..], RecvFlags::empty()).context("it doesn't answer")? {
                (_, 0) => bail!("it closed the connection without an answer"),
                (_, count) => filled += count,
            }
        }
        Ok(())
    }

    /// Whether the answer to the first request is there, behind the welcome where that wasn't waited for.
    fn is_answered(&self, input: &[u8]) -> Result<bool> {
        let mut from = 0;
        if !self.hello.is_empty() {
            let Some(welcome) = peek(input, ANSWER_BYTES)?.filter(|welcome| welcome.total <= input.len())
            else {
                return Ok(false);
            };
            from = welcome.total;
        }
        let answer = self.protocol.answer(&input[from..], 1).map_err(anyhow::Error::msg)?;
        match answer.map(|answer| answer.body) {
            None => Ok(false),
            Some(Body::Value(_)) => Ok(true),
            Some(_) => bail!("it answers that a key is missing"),
        }
    }

    /// One thread's round.
    fn round(&self, mut generator: Generator, begun: Instant, span: &Span) -> Result<Sample> {
        let mut bytes = Vec::new();
        while begun.elapsed() < span.warm_up {
            self.connect_once(generator.index(), &mut bytes)?;
        }
        let (counted, mut operations, mut latency) = (Instant::now(), 0, latencies());
        while counted.elapsed() < span.duration {
            let since = Instant::now();
            self.connect_once(generator.index(), &mut bytes)?;
            latency.saturating_record(since.elapsed().as_nanos() as u64);
            operations += 1;
            span.interrupted.check()?;
        }
        Ok(Sample { operations, seconds: counted.elapsed().as_secs_f64(), latency })
    }

    fn load(&self, span: &Span) -> Result<Sample> {
        let begun = Instant::now();
        let samples = std::thread::scope(|scope| {
            // All are started before the first is waited for.
            let generators = (0..self.threads).map(|thread| self.workload.generator(thread as u64));
            let threads: Vec<_> =
                generators.map(|generator| scope.spawn(move || self.round(generator, begun, span))).collect();
            let joined = threads.into_iter().map(|thread| thread.join().expect("no thread panics"));
            joined.collect::<Result<Vec<_>>>()
        })?;
        Ok(together(samples))
    }
}

impl<P: Protocol> Target for SetupTarget<P> {
    fn name(&self) -> &str {
        self.name
    }

    fn unit(&self) -> Unit {
        Unit::ConnectionsPerSecond
    }

    fn measure(&mut self, span: &Span) -> Result<Measurement> {
        Ok(Measurement::Load(self.connecting.load(span)?))
    }
}
