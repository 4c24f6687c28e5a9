//! The targets of a case that are reached over sockets: their servers started and filled, each once, however many of its sockets are
//! measured.

use std::any::Any;
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::path::PathBuf;
use std::rc::Rc;

use anyhow::{Context as _, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::network::NetworkTarget;
use super::network::connection::Address;
use super::network::kvs::Kvs;
use super::network::protocol::Protocol;
use super::network::text::Text;
use super::scenario::Case;
use super::servers::kvs::KvsServer;
use super::servers::memcached::MemcachedServer;
use super::servers::null::NullServer;
use super::servers::redis::RedisServer;
use super::servers::{Demand, find_program};
use super::target::{Interrupted, Ready, Target};
use super::workload::Workload;

/// kvs over TCP.
pub const KVS_TCP: &str = "kvs-tcp";
/// kvs over its unix socket.
pub const KVS_UNIX: &str = "kvs-unix";
/// Redis over TCP.
pub const REDIS_TCP: &str = "redis-tcp";
/// Redis over its unix socket.
pub const REDIS_UNIX: &str = "redis-unix";
/// memcached over TCP.
pub const MEMCACHED: &str = "memcached";
/// The null server over TCP.
pub const NULL_TCP: &str = "null-tcp";
/// The null server over its unix socket.
pub const NULL_UNIX: &str = "null-unix";

/// Descriptors that bench needs beside its connections.
const DESCRIPTORS_MORE: u64 = 256;

/// What the user says about servers.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// A store that runs already, on this TCP address.
    pub running_tcp: Option<String>,
    /// A store that runs already, on this unix socket.
    pub running_unix: Option<PathBuf>,
    /// Threads that serve.
    pub workers: Option<usize>,
    /// kvs's `--durability`.
    pub durability: Option<String>,
    /// Set when the user wants the end.
    pub interrupted: Interrupted,
}

impl Settings {
    fn has_running(&self) -> bool {
        self.running_tcp.is_some() || self.running_unix.is_some()
    }

    /// How servers have to be for a case.
    pub fn demand(&self, case: &Case) -> Demand {
        let mut demand = Demand::new(&case.workload, case.load.connections, &self.interrupted);
        (demand.workers, demand.durability) = (self.workers, self.durability.clone());
        demand.persistence = case.persistence;
        demand
    }
}

/// A server that is ready, or why it isn't.
type Started<S> = Option<Result<Rc<S>, String>>;

/// The targets of a case in the making.
pub struct Stores<'a> {
    case: &'a Case,
    settings: &'a Settings,
    demand: Demand,
    kvs: Started<KvsServer>,
    redis: Started<RedisServer>,
    memcached: Started<MemcachedServer>,
    null: Started<NullServer>,
    /// What isn't here, and why.
    missing: Vec<String>,
    /// Tells how many keys of which target are stored.
    told: &'a dyn Fn(&str, u64),
}

/// The targets of a case, started and filled. `told` hears how many keys of which are stored.
///
/// # Errors
/// One that is here can't be made ready.
pub fn ready(case: &Case, settings: &Settings, told: &dyn Fn(&str, u64)) -> anyhow::Result<Ready> {
    allow_descriptors(case.load.connections as u64)?;
    let demand = settings.demand(case);
    let (kvs, redis, memcached, null) = (None, None, None, None);
    let mut stores =
        Stores { case, settings, demand, kvs, redis, memcached, null, missing: Vec::new(), told };
    let mut targets = Vec::new();
    for name in &case.targets {
        if let Some(target) = stores.target(name).with_context(|| format!("{name} can't be made ready"))? {
            targets.push(target);
        }
    }
    Ok(Ready { targets, missing: stores.missing })
}

/// Lets this process, and the servers it starts, have as many connections.
fn allow_descriptors(connections: u64) -> anyhow::Result<()> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = connections + DESCRIPTORS_MORE;
    if current.is_none_or(|current| current >= wanted) {
        return Ok(());
    }
    let allowed = maximum.is_none_or(|maximum| maximum >= wanted);
    ensure!(
        allowed,
        "{connections} connections need {wanted} descriptors; raise the limit with `ulimit -Hn {wanted}`"
    );
    setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum })
        .context("can't raise the limit of descriptors")
}

/// The server, started at the first question, and whether it just was; None when its program isn't here, which is told once.
fn once<S>(
    slot: &mut Started<S>,
    missing: &mut Vec<String>,
    start: impl FnOnce() -> anyhow::Result<Result<S, String>>,
) -> anyhow::Result<Option<(Rc<S>, bool)>> {
    let is_new = slot.is_none();
    if is_new {
        let started = start()?.map(Rc::new);
        missing.extend(started.as_ref().err().cloned());
        *slot = Some(started);
    }
    let server = slot.as_ref().and_then(|started| started.as_ref().ok());
    Ok(server.map(|server| (Rc::clone(server), is_new)))
}

fn installed<S>(
    program: &str,
    advice: &str,
    start: impl FnOnce(PathBuf) -> anyhow::Result<S>,
) -> anyhow::Result<Result<S, String>> {
    match find_program(program) {
        Some(path) => start(path).map(Ok),
        None => Ok(Err(format!("{program} is not here; {advice}"))),
    }
}

impl Stores<'_> {
    fn target(&mut self, name: &str) -> anyhow::Result<Option<Box<dyn Target>>> {
        match name {
            KVS_TCP | KVS_UNIX if self.settings.has_running() => self.running(name),
            KVS_TCP | KVS_UNIX => self.kvs(name),
            REDIS_TCP | REDIS_UNIX => self.redis(name),
            MEMCACHED => self.memcached(name),
            NULL_TCP | NULL_UNIX => self.null(name),
            _ => anyhow::bail!("nobody knows such a target"),
        }
    }

    /// A store that the user started.
    fn running(&mut self, name: &str) -> anyhow::Result<Option<Box<dyn Target>>> {
        let address = match (name, &self.settings.running_tcp, &self.settings.running_unix) {
            (KVS_TCP, Some(address), _) => Address::Tcp(resolve(address)?),
            (KVS_UNIX, _, Some(path)) => Address::Unix(path.clone()),
            _ => {
                self.missing.push(format!(
                    "{name} is not measured: the running store was given by its other address"
                ));
                return Ok(None);
            }
        };
        self.ready(name, (address, Rc::new(())), Kvs::new, true).map(Some)
    }

    fn kvs(&mut self, name: &str) -> anyhow::Result<Option<Box<dyn Target>>> {
        let advice = "install it beside kvs-tools";
        let start = || installed("kvs-front", advice, |program| KvsServer::start(&program, &self.demand));
        let Some((server, is_new)) = once(&mut self.kvs, &mut self.missing, start)? else { return Ok(None) };
        // Servers that can be told are to have as many.
        self.demand.workers = Some(server.workers);
        let address = self.socket(name == KVS_TCP, server.tcp, &server.unix);
        self.ready(name, (address, server), Kvs::new, is_new).map(Some)
    }

    fn redis(&mut self, name: &str) -> anyhow::Result<Option<Box<dyn Target>>> {
        let advice = "install Redis (package redis-server) to compare with it";
        let start =
            || installed("redis-server", advice, |program| RedisServer::start(&program, &self.demand));
        let Some((server, is_new)) = once(&mut self.redis, &mut self.missing, start)? else {
            return Ok(None);
        };
        let address = self.socket(name == REDIS_TCP, server.tcp, &server.unix);
        self.ready(name, (address, server), Text::redis, is_new).map(Some)
    }

    fn memcached(&mut self, name: &str) -> anyhow::Result<Option<Box<dyn Target>>> {
        let advice = "install it (package memcached) to compare with it";
        let start =
            || installed("memcached", advice, |program| MemcachedServer::start(&program, &self.demand));
        let Some((server, is_new)) = once(&mut self.memcached, &mut self.missing, start)? else {
            return Ok(None);
        };
        self.ready(name, (Address::Tcp(server.tcp), server), Text::memcached, is_new).map(Some)
    }

    fn null(&mut self, name: &str) -> anyhow::Result<Option<Box<dyn Target>>> {
        let start = || NullServer::start(&self.demand).map(Ok);
        let Some((server, is_new)) = once(&mut self.null, &mut self.missing, start)? else { return Ok(None) };
        let address = self.socket(name == NULL_TCP, server.tcp, &server.unix);
        self.ready(name, (address, server), Kvs::new, is_new).map(Some)
    }

    fn socket(&self, is_tcp: bool, tcp: SocketAddr, unix: &std::path::Path) -> Address {
        if is_tcp { Address::Tcp(tcp) } else { Address::Unix(unix.to_path_buf()) }
    }

    /// A target of a server that runs; a new one is filled.
    fn ready<P: Protocol + 'static>(
        &self,
        name: &str,
        (address, server): (Address, Rc<dyn Any>),
        protocol: impl FnOnce(&Workload) -> P,
        is_new: bool,
    ) -> anyhow::Result<Box<dyn Target>> {
        let workload = self.case.workload;
        let mut target = NetworkTarget {
            name: name.to_owned(),
            address,
            protocol: protocol(&workload),
            checks_values: !name.starts_with("null"),
            workload,
            values: workload.values(),
            load: self.case.load,
            _server: server,
        };
        if is_new {
            // The null server is to know how long a value is, no more.
            target.workload.keys = if target.checks_values { workload.keys } else { 1 };
            let told = |keys| (self.told)(name, keys);
            target.fill(&self.settings.interrupted, &told).context("can't store the keys")?;
            target.workload = workload;
        }
        Ok(Box::new(target))
    }
}

fn resolve(address: &str) -> anyhow::Result<SocketAddr> {
    let mut found = address.to_socket_addrs().with_context(|| format!("can't find {address}"))?;
    found.next().with_context(|| format!("{address} has no address"))
}
