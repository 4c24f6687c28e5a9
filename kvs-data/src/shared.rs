//! What all threads of the data server see.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use kvs_core::backup::gate::Gate;
use kvs_core::backup::ring;
use kvs_core::backup::writer::Tails;
use kvs_core::connection::context::{COUNTERS, Statistics};
use kvs_core::connection::slot::SlotIndex;
use kvs_core::connection::usage::Usage;
use kvs_core::control::StatisticOwned;
use kvs_core::instance::InstanceName;
use kvs_core::liveness::{LivenessHold, LivenessPage};
use kvs_core::recover;
use kvs_core::segment::layout::WorkerSlot;
use kvs_core::segment::{Segment, SegmentError, identity, text_of};
use kvs_core::session::Sessions;
use kvs_core::sys::priority::Rank;
use kvs_core::sys::process::open_descriptors;
use kvs_core::table::Table;

/// What all threads see.
pub struct Shared {
    /// The instance.
    pub name: InstanceName,
    /// Its segment.
    pub segment: Segment,
    /// The sessions of its clients.
    pub sessions: Sessions,
    /// The table in it; what is changed goes to the backup rings.
    pub table: Table,
    /// What workers and the backup thread say to each other.
    pub gate: Gate,
    /// Calls the backup thread.
    pub calls: Sender<()>,
    /// Wakes each worker.
    pub wakes: Vec<Arc<OwnedFd>>,
    /// What each worker waits in.
    pub epolls: Vec<OwnedFd>,
    /// Where the backup file is.
    pub backup_path: PathBuf,
    /// Where each thread proves that it lives.
    pub liveness: LivenessPage,
    /// Worker threads.
    pub workers: usize,
    /// Largest value, in bytes.
    pub value_bytes_max: u64,
    /// Connections served now.
    pub connections: AtomicU64,
    /// Connection slots that were used and are free.
    pub free_slots: Mutex<Vec<SlotIndex>>,
    /// Slots of the clients that the data server before was just serving.
    pub served: OnceLock<Vec<SlotIndex>>,
    /// Workers that may not have taken up all clients of the data server before.
    pub unsettled: AtomicU64,
    /// The socket to the front server at the time when the workers may begin.
    pub front_at_begin: OnceLock<Arc<OwnedFd>>,
    /// When this process began.
    pub begun: Instant,
    /// How long after that another server wants a core, in milliseconds.
    pub crowded_until_ms: AtomicU64,
    /// That of the threads that somebody waits for. None: it is that of all, since this process was wanted at once.
    pub rank: Option<Rank>,
}

/// For how long workers make way for another server.
const CROWDED: Duration = Duration::from_millis(200);

impl Shared {
    /// Lets all workers begin, in a segment that is recovered. `front` is the socket to the front server. They are woken together: the first
    /// that is woken may take the core on which the others would be.
    pub fn begin(&self, front: Arc<OwnedFd>) {
        self.make_way();
        // They begin once.
        let _ = self.front_at_begin.set(front);
    }

    /// Whether they have begun.
    pub fn has_begun(&self) -> bool {
        self.front_at_begin.get().is_some()
    }

    /// Another server is ending, is started or prepares: that one runs until the clock ticks if a worker yields to it, but a worker that sleeps
    /// is woken on its core at once.
    pub fn make_way(&self) {
        let until = self.begun.elapsed() + CROWDED;
        self.crowded_until_ms.store(until.as_millis() as u64, Ordering::Relaxed);
    }

    /// Whether that was less than [`CROWDED`] ago.
    pub fn is_crowded(&self, now: Instant) -> bool {
        let since = now.saturating_duration_since(self.begun);
        since < Duration::from_millis(self.crowded_until_ms.load(Ordering::Relaxed))
    }

    /// Waits until they may; one of a standby that is let go does so until the process ends.
    pub fn await_begin(&self) -> Arc<OwnedFd> {
        Arc::clone(self.front_at_begin.wait())
    }

    /// From now on somebody waits for the calling thread.
    pub fn come_forward(&self) {
        if let Some(Err(error)) = self.rank.map(Rank::take) {
            log::warn!("a thread stays behind others who want its core: {error}");
        }
    }

    /// What a thread begins with that somebody waits for, whose slot of the liveness page this is. It lives as long as it holds that.
    pub fn enter(&self, slot: usize) -> LivenessHold {
        self.come_forward();
        // Nobody could tell whether it lives.
        self.liveness.claim(slot).unwrap_or_else(|_| std::process::abort())
    }

    /// Calls the backup thread; it comes once for many calls.
    pub fn call_backup(&self) {
        // One call waiting is as good as many.
        let _ = self.calls.try_send(());
    }

    /// Wakes the workers that wait for the backup thread.
    pub fn call_waiting(&self) {
        for worker in self.gate.take_waiting() {
            if let Some(wake) = self.wakes.get(worker) {
                // It doesn't fill up before the machine is old.
                let _ = rustix::io::write(wake, &1u64.to_ne_bytes());
            }
        }
    }

    /// So much of each ring is on disk for good.
    pub fn set_synced(&self, tails: &Tails) {
        for (worker, tail) in tails.iter().enumerate() {
            self.gate.set_synced(worker, *tail);
        }
        self.call_waiting();
    }

    /// The slots of all workers that there ever were.
    pub fn worker_slots(&self) -> impl Iterator<Item = &WorkerSlot> {
        let reserved = self.segment.header().map_or(0, |header| header.worker_slots_reserved.load());
        (0..reserved)
            .filter_map(|slot| self.segment.memory().object(self.segment.regions().worker(slot)).ok())
    }

    fn counter(&self, index: usize) -> u64 {
        self.worker_slots().fold(0, |sum, slot| sum.wrapping_add(slot.counters[index].load()))
    }

    /// Takes the memory in the segment that the workers need.
    ///
    /// # Errors
    /// When `/dev/shm` is full.
    pub fn claim(&self) -> Result<(), SegmentError> {
        self.segment.claim_worker(self.workers as u64)?;
        self.segment.claim_ring(self.workers as u64 - 1)?;
        Ok(())
    }

    /// Whoever serves from now on serves the clients of a data server that died, too. To be called before a worker begins.
    pub fn inherit_clients(&self) {
        self.gate.inherit(self.worker_slots().map(|slot| slot.ring_head.load()).collect());
        self.unsettled.store(self.workers as u64, Ordering::Release);
    }

    /// A worker serves all its clients of the time before this data server. After the last one, what was replaced may be freed.
    pub fn worker_has_settled(&self) {
        if self.unsettled.fetch_sub(1, Ordering::AcqRel) != 1 {
            return;
        }
        self.table.release_garbage();
        // Those of the housekeeping and the backup thread have none.
        if let Err(error) = recover::collect_garbage(&self.table, self.workers + 2) {
            log::error!("what workers of the data server before had replaced: {error}");
        }
    }

    /// A slot that is free again, for the next connection.
    pub fn give_back_slot(&self, index: SlotIndex) {
        self.connections.fetch_sub(1, Ordering::Relaxed);
        self.free_slot(index);
    }

    /// A slot that is free, of a connection that was never counted.
    pub fn free_slot(&self, index: SlotIndex) {
        self.free_slots.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(index);
    }
}

impl Statistics for Shared {
    fn statistics(&self) -> Vec<(String, StatisticOwned)> {
        use StatisticOwned::{Absent, Number, Text};
        let Ok(header) = self.segment.header() else { return Vec::new() };
        let totals = self.table.totals();
        let usage = Usage::of(&self.segment).unwrap_or_default();
        let [front, data] = [&header.front_process, &header.data_process].map(|words| words[0].load());
        // Before that it could not keep every connection.
        let standby = header.standby_stands.load();
        let descriptors = |pid: u64| {
            let count = u32::try_from(pid).ok().and_then(open_descriptors);
            count.map_or(Absent, Number)
        };
        let mut all = vec![
            ("name", Text(self.name.to_string())),
            ("version", Text(env!("CARGO_PKG_VERSION").to_owned())),
            ("front_pid", Number(front)),
            ("data_pid", Number(data)),
            ("standby_pid", if standby == 0 { Absent } else { Number(standby) }),
            ("tcp_address", Text(text_of(&header.tcp_address))),
            ("unix_path", Text(text_of(&header.unix_path))),
            ("segment_identity", Text(identity(header))),
            ("uptime_seconds", Number(self.begun.elapsed().as_secs())),
            ("data_restarts", Number(header.data_restarts.load())),
            ("front_restarts", Number(header.front_restarts.load())),
            ("connections", Number(self.connections.load(Ordering::Relaxed))),
            ("connection_slots", Number(usage.slots)),
            ("connection_slots_reserved", Number(usage.slots_reserved)),
            ("connection_buffers", Number(usage.buffers)),
            ("connection_buffer_bytes", Number(usage.buffer_bytes)),
            ("descriptors_front", descriptors(front)),
            ("descriptors_data", descriptors(data)),
            ("descriptors_standby", descriptors(standby)),
            ("workers", Number(self.workers as u64)),
            ("entries", Number(totals.entries)),
            ("content_bytes", Number(totals.content_bytes)),
            ("segment_bytes", Number(self.segment.memory_bytes())),
            ("capacity_bytes", Number(header.capacity_bytes.load())),
            ("value_bytes_max", Number(self.value_bytes_max)),
            ("backup_file", Text(self.backup_path.display().to_string())),
            ("backup_generation", Number(header.backup.generation.load())),
            ("backup_bytes", Number(header.backup.position.load())),
            ("backup_waiting_bytes", Number(self.worker_slots().map(ring::used).sum())),
            ("backup_error", self.gate.failure().map_or(Absent, Text)),
        ];
        all.extend(COUNTERS.map(|(counter, name)| (name, Number(self.counter(counter as usize)))));
        all.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }
}
