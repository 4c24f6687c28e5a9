//! Redis, as it is when it is just started, but without snapshots; with its append-only file where kvs is held against it.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;

use super::child::Server;
use super::{Demand, directory, free_port};
use crate::bench::scenario::Persistence;

/// How long it has to answer a first question.
const PATIENCE: Duration = Duration::from_secs(1);

/// A running Redis.
pub struct RedisServer {
    /// Where it listens.
    pub tcp: SocketAddr,
    /// Its unix socket.
    pub unix: PathBuf,
    server: Server,
    _directory: TempDir,
}

impl RedisServer {
    /// Starts one.
    ///
    /// # Errors
    /// It doesn't get ready.
    pub fn start(program: &Path, demand: &Demand) -> anyhow::Result<Self> {
        let (directory, tcp) = (directory()?, free_port()?);
        let unix = directory.path().join("sock");
        let mut server = Server::start(program, &arguments(tcp, &unix, demand), directory.path())?;
        let ready = || (says(tcp, "PING\r\n")? == "+PONG").then_some(()).filter(|()| unix.exists());
        server.await_ready(directory.path(), &demand.interrupted, ready)?;
        Ok(Self { tcp, unix, server, _directory: directory })
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.server.pid()
    }
}

fn arguments(tcp: SocketAddr, unix: &Path, demand: &Demand) -> Vec<OsString> {
    let (append, sync) = match demand.persistence {
        Persistence::Usual => ("no", "no"),
        Persistence::EverySecond => ("yes", "everysec"),
        Persistence::Always => ("yes", "always"),
    };
    let mut arguments: Vec<OsString> = Vec::new();
    let mut add = |option: &str, value: &str| arguments.extend([option.into(), value.into()]);
    add("--bind", &tcp.ip().to_string());
    add("--port", &tcp.port().to_string());
    add("--save", "");
    add("--appendonly", append);
    add("--appendfsync", sync);
    add("--maxclients", &demand.connections.to_string());
    add("--loglevel", "warning");
    arguments.extend(["--unixsocket".into(), unix.into()]);
    arguments
}

/// The first line a server answers to this.
pub(super) fn says(address: SocketAddr, question: &str) -> Option<String> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    stream.write_all(question.as_bytes()).ok()?;
    let (mut answer, mut input) = (Vec::new(), [0; 256]);
    while !answer.contains(&b'\n') {
        let count = stream.read(&mut input).ok().filter(|count| *count > 0)?;
        answer.extend_from_slice(&input[..count]);
    }
    let text = String::from_utf8(answer).ok()?;
    text.lines().next().map(|line| line.trim_end().to_owned())
}
