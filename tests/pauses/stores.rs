//! Ours: a store, who is killed of it, and when it is whole again.

use anyhow::Result;
use kvs_harness::connection::Connection;
use kvs_harness::present::Servers;
use kvs_harness::processes::send;
use kvs_harness::store::{Launch, Store};
use kvs_harness::wait::{SOON, eventually_some};
use rustix::process::{Pid, Signal};

use super::speak::{Speak, Wire};

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
        kvs.await_whole();
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
