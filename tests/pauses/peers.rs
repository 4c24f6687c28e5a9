//! Redis and memcached, started, killed and started again with the same data.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};
use kvs_harness::processes::{MARK, run_directory, run_name};
use kvs_harness::wait::{eventually, eventually_some};

use super::speak::{Speak, Wire};

/// How long a peer may take to load and to rewrite its file.
const PATIENCE: Duration = Duration::from_secs(600);

/// Another store.
pub struct Peer {
    /// How to talk to it.
    pub speak: Speak,
    /// Where it listens.
    pub address: SocketAddr,
    directory: PathBuf,
    process: Child,
}

/// Whether the program of a peer is installed.
pub fn is_installed(speak: Speak) -> bool {
    Command::new(program(speak)).arg("--version").output().is_ok_and(|output| output.status.success())
}

fn program(speak: Speak) -> &'static str {
    if speak == Speak::Redis { "redis-server" } else { "memcached" }
}

impl Peer {
    /// Starts one with `entries` entries.
    pub fn start(speak: Speak, entries: u64) -> Result<Self> {
        // The port is free now; nobody else is likely to take it in the meantime.
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        let directory = run_directory().join(format!("{}-{entries}", program(speak)));
        std::fs::create_dir_all(&directory)?;
        let process = command(speak, address, &directory).spawn().context(program(speak))?;
        let mut peer = Self { speak, address, directory, process };
        peer.connect().set_counter()?;
        peer.fill(entries)?;
        Ok(peer)
    }

    fn fill(&mut self, entries: u64) -> Result<()> {
        self.connect().fill(entries).context("filling it")?;
        if self.speak == Speak::Redis {
            // A file as compact as it gets is what it loads fastest. It may be rewriting it already, without the last entries.
            self.await_rewritten();
            self.connect().line("BGREWRITEAOF", "+")?;
            self.await_rewritten();
        }
        Ok(())
    }

    fn await_rewritten(&self) {
        let state = |name: &str| self.connect().line("INFO persistence", name).unwrap_or_default();
        eventually("Redis has rewritten its file", PATIENCE, || {
            state("aof_rewrite_in_progress:") == "0" && state("aof_rewrite_scheduled:") == "0"
        });
    }

    /// Fills it again if everything is gone.
    pub fn fill_if_empty(&mut self, entries: u64) -> Result<()> {
        if self.keys()? < entries { self.fill(entries) } else { Ok(()) }
    }

    fn connect(&self) -> Wire {
        eventually_some("it takes connections", PATIENCE, || Wire::connect(self.speak, self.address).ok())
    }

    /// Number of keys it has.
    pub fn keys(&self) -> Result<u64> {
        let (line, start) =
            if self.speak == Speak::Redis { ("DBSIZE", ":") } else { ("stats", "STAT curr_items ") };
        // One that loads refuses to say.
        let text = eventually_some("it tells how many keys it has", PATIENCE, || {
            Wire::connect(self.speak, self.address).ok()?.line(line, start).ok()
        });
        text.parse().context("a number of keys")
    }

    /// Kills it and starts it again at once.
    pub fn kill_and_start(&mut self) -> Result<()> {
        self.process.kill()?;
        // Its port is free when it is dead.
        self.process.wait()?;
        self.process = command(self.speak, self.address, &self.directory).spawn()?;
        Ok(())
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn command(speak: Speak, address: SocketAddr, directory: &PathBuf) -> Command {
    let mut command = Command::new(program(speak));
    let port = address.port().to_string();
    match speak {
        Speak::Redis => {
            let options =
                ["--bind", "127.0.0.1", "--appendonly", "yes", "--save", "", "--loglevel", "warning"];
            command.args(options).arg("--port").arg(port);
        }
        _ => {
            command.args(["-l", "127.0.0.1", "-m", "4096", "-u", "nobody", "-p"]).arg(port);
        }
    }
    command
        .current_dir(directory)
        .env(MARK, format!("{}-{}", run_name(), program(speak)))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}
