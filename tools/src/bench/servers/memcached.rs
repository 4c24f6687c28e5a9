//! memcached, with as many threads as kvs has workers.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::Path;

use tempfile::TempDir;

use super::child::Server;
use super::redis::says;
use super::{Demand, directory, free_port};

/// A running memcached.
pub struct MemcachedServer {
    /// Where it listens.
    pub tcp: SocketAddr,
    server: Server,
    _directory: TempDir,
}

impl MemcachedServer {
    /// Starts one.
    ///
    /// # Errors
    /// It doesn't get ready.
    pub fn start(program: &Path, demand: &Demand) -> anyhow::Result<Self> {
        let (directory, tcp) = (directory()?, free_port()?);
        let mut server = Server::start(program, &arguments(tcp, demand), directory.path())?;
        let ready = || says(tcp, "version\r\n")?.starts_with("VERSION").then_some(());
        server.await_ready(directory.path(), &demand.interrupted, ready)?;
        Ok(Self { tcp, server, _directory: directory })
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.server.pid()
    }
}

fn arguments(tcp: SocketAddr, demand: &Demand) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = Vec::new();
    let mut add = |option: &str, value: String| arguments.extend([option.into(), value.into()]);
    add("-l", tcp.ip().to_string());
    add("-p", tcp.port().to_string());
    add("-t", demand.worker_count().to_string());
    add("-c", demand.connections.to_string());
    add("-m", demand.room_mib().to_string());
    if rustix::process::geteuid().is_root() {
        // As root it wants to be told whom to become; becoming another, it would no longer end with bench.
        add("-u", "root".into());
    }
    arguments
}
