//! The store under test: who serves, what its slots say, and its worker's thread, stopped where it sleeps.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use kvs_core::segment::layout::{ConnectionSlot, WorkerSlot};
use kvs_core::segment::{Segment, SegmentView};
use kvs_core::sys::counted_send;
use kvs_harness::store::{Launch, Store};
use nix::unistd::Pid;

use crate::pages::Pages;
use crate::tracee::{Event, Tracee};
use crate::violation::demand;

/// How long a store may need until it is whole again.
const PATIENCE: Duration = Duration::from_secs(30);
/// Pause between two looks.
const PAUSE: Duration = Duration::from_micros(100);
/// The name of the worker's thread.
const WORKER: &str = "worker-0";

/// How far the slot of a connection says that its stream got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Positions {
    /// Bytes taken from the socket.
    pub received: u64,
    /// Bytes given to it.
    pub sent: u64,
}

/// A store with one worker.
pub struct Servers {
    /// It.
    pub store: Store,
    /// Its segment.
    pub view: SegmentView,
    has_standby: bool,
    dead: Option<Pid>,
}

impl Servers {
    /// Starts one.
    ///
    /// # Errors
    /// When its segment can't be seen.
    pub fn start(has_standby: bool) -> anyhow::Result<Self> {
        let launch = Launch::new().capacity("64MiB").option("--workers", "1").option("--hang-timeout", "60s");
        let store = launch.option("--standby", if has_standby { "on" } else { "off" }).start();
        let view = SegmentView::open(&store.ready().segment)?;
        Ok(Self { store, view, has_standby, dead: None })
    }

    /// Waits until all servers are there, and returns the one that serves.
    ///
    /// # Errors
    /// A violation when they don't come.
    pub fn await_whole(&self) -> anyhow::Result<Pid> {
        let until = Instant::now() + PATIENCE;
        loop {
            let header = self.view.header()?;
            let data = Pid::from_raw(header.data_process[0].load() as i32);
            let standby = header.standby_stands.load() as i32;
            if Some(data) != self.dead
                && is_alive(data)
                && (!self.has_standby || is_alive(Pid::from_raw(standby)))
            {
                return Ok(data);
            }
            demand!(Instant::now() < until, "no data server with all that belongs to it within {PATIENCE:?}");
            std::thread::sleep(PAUSE);
        }
    }

    /// Stops the worker of `data` where it waits.
    ///
    /// # Errors
    /// When it can't be traced.
    pub fn stop_worker(&self, data: Pid) -> anyhow::Result<Tracee> {
        let mut worker = Tracee::seize(data, worker_of(data)?)?;
        while worker.run_to_call()? != Event::Asleep {}
        Ok(worker)
    }

    /// Kills the data server whose worker this is.
    ///
    /// # Errors
    /// When it was dead already.
    pub fn kill(&mut self, data: Pid, worker: Tracee) -> anyhow::Result<()> {
        self.dead = Some(data);
        worker.kill()
    }

    /// What the slot of `connection` says; None when it has none.
    ///
    /// # Errors
    /// When the segment is damaged.
    pub fn positions(&self, connection: u64) -> anyhow::Result<Option<Positions>> {
        for index in 0..self.view.header()?.connection_slots_reserved.load() {
            let slot: &ConnectionSlot = self.view.view().object(self.view.regions().connection(index))?;
            if slot.state.load() != 0 && slot.id.load() == connection {
                return Ok(Some(Positions { received: slot.received.load(), sent: slot.sent.load() }));
            }
        }
        Ok(None)
    }

    /// Waits until all that the client sent was taken from its socket.
    ///
    /// # Errors
    /// A violation when it isn't.
    pub fn await_received(&self, connection: u64, bytes: u64) -> anyhow::Result<()> {
        let until = Instant::now() + PATIENCE;
        while self.positions(connection)?.is_none_or(|positions| positions.received < bytes) {
            demand!(Instant::now() < until, "nobody takes what the client sent");
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// What the kernel says that the last message on a unix socket came to.
    ///
    /// # Errors
    /// When the segment is damaged.
    pub fn counted(&self) -> anyhow::Result<u64> {
        let slot: &WorkerSlot = self.view.view().object(self.view.regions().worker(0))?;
        Ok(counted_send::count_of(slot.unix_sent.load()).map_or(0, u64::from))
    }

    /// All pages that have memory.
    ///
    /// # Errors
    /// When the segment can't be seen.
    pub fn pages(&self) -> anyhow::Result<Pages> {
        let (segment, _) = Segment::open_private_copy(&self.store.ready().segment)?;
        Ok(Pages::reserved(&segment)?)
    }

    /// Has `kvs-tools check` look at the segment.
    ///
    /// # Errors
    /// A violation when it finds a fault.
    pub fn check(&self) -> anyhow::Result<()> {
        let check = self.store.place().tools_by_name(&["check"]);
        demand!(check.status.success(), "kvs-tools check: {}", String::from_utf8_lossy(&check.stdout));
        Ok(())
    }
}

fn is_alive(pid: Pid) -> bool {
    pid.as_raw() > 0
        && fs::read_to_string(format!("/proc/{pid}/stat"))
            .is_ok_and(|stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X'])))
}

fn worker_of(data: Pid) -> anyhow::Result<Pid> {
    let mut found = None;
    for entry in fs::read_dir(format!("/proc/{data}/task"))? {
        let entry = entry?;
        if fs::read_to_string(entry.path().join("comm"))?.trim() == WORKER {
            found = Some(entry.file_name().to_string_lossy().parse()?);
        }
    }
    ensure!(found.is_some(), "the data server {data} has no thread called {WORKER}");
    found.map(Pid::from_raw).context("no worker")
}
