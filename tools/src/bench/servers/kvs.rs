//! kvs itself, under a name of its own, with a backup file that is gone afterwards.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use kvs_core::instance::InstanceName;
use kvs_core::limits::CAPACITY_BYTES_DEFAULT;
use kvs_core::segment::{self, kept_aside_path};
use tempfile::TempDir;

use super::child::Server;
use super::{Demand, directory};
use crate::bench::scenario::Persistence;

/// A running store.
pub struct KvsServer {
    /// Where it listens.
    pub tcp: SocketAddr,
    /// Its unix socket.
    pub unix: PathBuf,
    /// Its name.
    pub name: InstanceName,
    /// Its worker threads.
    pub workers: usize,
    /// Keeps it running.
    _process: Remains,
}

/// What is removed when this is dropped, once the server has ended.
struct Remains {
    server: Option<Server>,
    name: InstanceName,
    directory: TempDir,
}

impl Drop for Remains {
    fn drop(&mut self) {
        self.server = None;
        let segment = self.name.segment_path();
        // A data server that is still ending keeps it; there is none when it never came so far.
        let until = Instant::now() + Duration::from_secs(5);
        while segment::remove(&segment).is_err() && segment.exists() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = std::fs::remove_file(kept_aside_path(&segment));
    }
}

impl KvsServer {
    /// Starts one.
    ///
    /// # Errors
    /// It doesn't get ready.
    pub fn start(program: &Path, demand: &Demand) -> anyhow::Result<Self> {
        let (directory, name) = (directory()?, own_name()?);
        let arguments = arguments(&name, directory.path(), demand);
        let mut process = Remains { server: None, name: name.clone(), directory };
        let directory = process.directory.path();
        let server = process.server.insert(Server::start(program, &arguments, directory)?);
        let log = directory.join("log");
        let line = server.await_ready(directory, &demand.interrupted, || ready_line(&log))?;
        let tcp = field(&line, "tcp").and_then(|tcp| tcp.parse().ok()).with_context(|| odd(&line))?;
        let workers = field(&line, "data").and_then(count_workers).with_context(|| odd(&line))?;
        Ok(Self { tcp, unix: directory.join("sock"), name, workers, _process: process })
    }
}

/// A name that no other run has.
fn own_name() -> anyhow::Result<InstanceName> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("bench-{}-{count}", std::process::id()).parse().map_err(|error| anyhow!("{error}"))
}

fn arguments(name: &InstanceName, directory: &Path, demand: &Demand) -> Vec<OsString> {
    let durability = match (&demand.durability, demand.persistence) {
        (Some(given), _) => given.clone(),
        (None, Persistence::Always) => "always".into(),
        (None, Persistence::Usual | Persistence::EverySecond) => "interval=1s".into(),
    };
    let capacity = demand.room_bytes.max(CAPACITY_BYTES_DEFAULT).to_string();
    let mut arguments: Vec<OsString> = Vec::new();
    let mut add = |option: &str, value: OsString| arguments.extend([option.into(), value]);
    add("--name", name.to_string().into());
    add("--listen", "127.0.0.1:0".into());
    add("--unix", directory.join("sock").into());
    add("--backup", directory.join("backup").into());
    add("--durability", durability.into());
    add("--capacity", capacity.into());
    add("--max-connections", demand.connections.to_string().into());
    add("--console", "off".into());
    add("--log-level", "warn".into());
    if let Some(workers) = demand.workers {
        add("--workers", workers.to_string().into());
    }
    arguments
}

/// What the front server prints when it is ready, once the whole line is there.
fn ready_line(log: &Path) -> Option<String> {
    let text = String::from_utf8(std::fs::read(log).ok()?).ok()?;
    let (line, _) = text[text.find("ready name=")?..].split_once('\n')?;
    Some(line.to_owned())
}

fn field<'l>(line: &'l str, name: &str) -> Option<&'l str> {
    line.split(' ').find_map(|field| field.strip_prefix(name)?.strip_prefix('='))
}

/// Threads of the data server with this process id that serve clients; they are named for it.
fn count_workers(pid: &str) -> Option<usize> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten();
    let names = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("comm")).ok());
    Some(names.filter(|name| name.starts_with("worker-")).count()).filter(|count| *count > 0)
}

fn odd(line: &str) -> String {
    format!("kvs-front printed an odd line; is it of another version? {line}")
}
