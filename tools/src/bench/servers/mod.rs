//! The servers that are measured: started for it, each in a directory of its own, and ended with it.
//!
//! | module | what it is |
//! |---|---|
//! | [`child`] | a process that ends with bench, whatever happens |
//! | [`kvs`] | kvs-front, which starts the data server |
//! | [`redis`], [`memcached`] | the peers |
//! | [`null`] | this program without a table: the ceiling |

pub mod child;
pub mod kvs;
pub mod memcached;
pub mod null;
pub mod redis;

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use tempfile::TempDir;

use super::scenario::Persistence;
use super::target::Interrupted;
use super::workload::Workload;

/// What a server needs beyond its keys and values: buckets, lengths, what allocators round up.
const ENTRY_BYTES_MORE: u64 = 128;
/// Room that any server gets.
const ROOM_BYTES_MIN: u64 = 512 << 20;
/// Connections beyond those of the load.
const CONNECTIONS_MORE: usize = 64;

/// How a server has to be.
#[derive(Debug, Clone)]
pub struct Demand {
    /// Connections it must take.
    pub connections: usize,
    /// Bytes of memory it may take.
    pub room_bytes: u64,
    /// Threads that serve; as each comes when None.
    pub workers: Option<usize>,
    /// How it keeps what it stores.
    pub persistence: Persistence,
    /// Another `--durability` for kvs than goes with that.
    pub durability: Option<String>,
    /// Set when the user wants the end.
    pub interrupted: Interrupted,
}

impl Demand {
    /// Of a server that holds this workload twice over.
    pub fn new(workload: &Workload, connections: usize, interrupted: &Interrupted) -> Self {
        let entry_bytes = workload.key_bytes as u64 + workload.value_bytes as u64 + ENTRY_BYTES_MORE;
        Self {
            connections: connections + CONNECTIONS_MORE,
            room_bytes: 2 * workload.keys * entry_bytes + ROOM_BYTES_MIN,
            workers: None,
            persistence: Persistence::Usual,
            durability: None,
            interrupted: interrupted.clone(),
        }
    }

    /// Threads that serve, for servers that would not choose as many as kvs.
    fn worker_count(&self) -> usize {
        self.workers.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from))
    }

    fn room_mib(&self) -> u64 {
        self.room_bytes.div_ceil(1 << 20)
    }
}

/// A directory for a server.
fn directory() -> anyhow::Result<TempDir> {
    tempfile::Builder::new().prefix("kvs-bench-").tempdir().context("can't make a temporary directory")
}

/// A port that is free now; nobody else is likely to take it in the meantime.
fn free_port() -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("can't find a free port")?;
    listener.local_addr().context("can't find a free port")
}

/// Where a program is: beside this one, for those of kvs, else on `PATH`.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let beside = std::env::current_exe().ok().and_then(|own| Some(own.parent()?.join(name)));
    let beside = beside.filter(|_| name.starts_with("kvs-"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&path).map(|directory| directory.join(name));
    beside.into_iter().chain(on_path).find(|program| is_program(program))
}

fn is_program(path: &Path) -> bool {
    path.is_file() && rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok()
}
