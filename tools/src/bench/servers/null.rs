//! The null server: this program, see [`null_server`](crate::bench::null_server).

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use tempfile::TempDir;

use super::child::Server;
use super::{Demand, directory};
use crate::bench::NULL_SERVER;

/// A running null server.
pub struct NullServer {
    /// Where it listens.
    pub tcp: SocketAddr,
    /// Its unix socket.
    pub unix: PathBuf,
    _server: Server,
    _directory: TempDir,
}

impl NullServer {
    /// Starts one.
    ///
    /// # Errors
    /// It doesn't get ready.
    pub fn start(demand: &Demand) -> anyhow::Result<Self> {
        let directory = directory()?;
        let unix = directory.path().join("sock");
        let program = std::env::current_exe().context("can't find this program")?;
        let arguments: [OsString; 3] =
            [NULL_SERVER.into(), demand.worker_count().to_string().into(), unix.clone().into()];
        let mut server = Server::start(&program, &arguments, directory.path())?;
        let log = directory.path().join("log");
        let tcp = server.await_ready(directory.path(), &demand.interrupted, || listening(&log))?;
        Ok(Self { tcp, unix, _server: server, _directory: directory })
    }
}

/// Where it says it listens.
fn listening(log: &Path) -> Option<SocketAddr> {
    let text = std::fs::read_to_string(log).ok()?;
    let (line, _) = text.split_once('\n')?;
    line.strip_prefix("listening on ")?.parse().ok()
}
