//! Ours: a store, who is killed of it, and when it is whole again.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::Result;
use kvs_harness::connection::Connection;
use kvs_harness::present::Servers;
use kvs_harness::processes::send;
use kvs_harness::store::{Launch, Store};
use kvs_harness::wait::{SOON, eventually_some};
use rustix::process::{Pid, Signal};

use super::speak::{Speak, Wire};

/// The memory is as it will be when nothing has become a huge page for so long.
const PAGES_SETTLED: Duration = Duration::from_millis(2_500);
/// It is not waited longer for that.
const PAGES_PATIENCE: Duration = Duration::from_secs(60);

/// Waits until a store that was just filled is like one that has been there for a while: its data server makes huge pages when nobody asks
/// anything.
fn await_pages(data: Pid) {
    let path = format!("/proc/{}/smaps_rollup", data.as_raw_nonzero());
    let huge = || {
        let text = fs::read_to_string(&path).unwrap_or_default();
        text.lines().find(|line| line.starts_with("ShmemPmdMapped:")).map(str::to_owned)
    };
    let begun = Instant::now();
    let (mut found, mut since) = (huge(), begun);
    while since.elapsed() < PAGES_SETTLED && begun.elapsed() < PAGES_PATIENCE {
        std::thread::sleep(Duration::from_millis(100));
        let now = huge();
        if now != found {
            (found, since) = (now, Instant::now());
        }
    }
}

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Victim {
    /// The data server.
    Data,
    /// The front server.
    Front,
    /// Both at the same instant.
    Both,
}

impl Victim {
    /// For tables.
    pub fn name(self) -> &'static str {
        match self {
            Victim::Data => "data server",
            Victim::Front => "front server",
            Victim::Both => "both",
        }
    }
}

/// A store under measurement.
pub struct Kvs {
    /// The store.
    pub store: Store,
    /// Whether it has a standby.
    pub has_standby: bool,
    dead: Vec<Pid>,
}

impl Kvs {
    /// Starts one with `entries` entries.
    pub fn start(has_standby: Option<bool>, entries: u64) -> Result<Self> {
        let mut launch = Launch::new().capacity("1GiB").option("--max-connections", "12000");
        if let Some(standby) = has_standby {
            launch = launch.option("--standby", if standby { "on" } else { "off" });
        }
        let store = launch.start();
        let mut wire = Wire::connect(Speak::Kvs, store.ready().tcp)?;
        wire.set_counter()?;
        wire.fill(entries)?;
        let mut kvs = Self { store, has_standby: has_standby == Some(true), dead: Vec::new() };
        let data = kvs.await_whole().data;
        await_pages(data);
        Ok(kvs)
    }

    /// Kills.
    pub fn kill(&mut self, victim: Victim, servers: Servers) {
        let pids = match victim {
            Victim::Data => vec![servers.data],
            Victim::Front => vec![servers.front],
            Victim::Both => vec![servers.data, servers.front],
        };
        pids.iter().for_each(|pid| send(*pid, Signal::KILL));
        self.dead = pids;
    }

    /// Waits until all servers are there, and new clients are served.
    pub fn await_whole(&mut self) -> Servers {
        eventually_some("all servers are there", SOON, || {
            let mut control = Connection::welcomed_unix(&self.store.ready().unix).ok()?;
            let servers = Servers::told_to(&mut control).ok()??;
            let whole = servers.standby.is_some() == self.has_standby;
            (whole && !servers.any_of(&self.dead)).then_some(servers)
        })
    }
}
