//! What all threads of the data server see.

use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use kvs_core::connection::context::{COUNTERS, Statistics};
use kvs_core::connection::slot::SlotIndex;
use kvs_core::control::StatisticOwned;
use kvs_core::instance::InstanceName;
use kvs_core::liveness::LivenessPage;
use kvs_core::segment::layout::WorkerSlot;
use kvs_core::segment::{Segment, text_of};
use kvs_core::table::Table;

/// What all threads see.
pub struct Shared {
    /// The instance.
    pub name: InstanceName,
    /// Its segment.
    pub segment: Segment,
    /// The table in it.
    pub table: Table,
    /// Where each thread proves that it lives.
    pub liveness: LivenessPage,
    /// The socket to the front server.
    pub control: OwnedFd,
    /// Worker threads.
    pub workers: usize,
    /// Largest value, in bytes.
    pub value_bytes_max: u64,
    /// Connections served now.
    pub connections: AtomicU64,
    /// Connection slots that were used and are free.
    pub free_slots: Mutex<Vec<SlotIndex>>,
    /// When this process began.
    pub begun: Instant,
}

impl Shared {
    fn counter(&self, index: usize) -> u64 {
        let reserved = self.segment.header().map_or(0, |header| header.worker_slots_reserved.load());
        let slots = (0..reserved).filter_map(|slot| {
            let offset = self.segment.regions().worker(slot);
            self.segment.memory().object::<WorkerSlot>(offset).ok()
        });
        slots.fold(0, |sum, slot| sum.wrapping_add(slot.counters[index].load()))
    }

    /// A slot that is free again, for the next connection.
    pub fn give_back_slot(&self, index: SlotIndex) {
        self.connections.fetch_sub(1, Ordering::Relaxed);
        self.free_slots.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(index);
    }
}

impl Statistics for Shared {
    fn statistics(&self) -> Vec<(String, StatisticOwned)> {
        use StatisticOwned::{Absent, Number, Text};
        let Ok(header) = self.segment.header() else { return Vec::new() };
        let totals = self.table.totals();
        let mut all = vec![
            ("name", Text(self.name.to_string())),
            ("version", Text(env!("CARGO_PKG_VERSION").to_owned())),
            ("front_pid", Number(header.front_process[0].load())),
            ("data_pid", Number(header.data_process[0].load())),
            ("standby_pid", Absent),
            ("tcp_address", Text(text_of(&header.tcp_address))),
            ("unix_path", Text(text_of(&header.unix_path))),
            ("uptime_seconds", Number(self.begun.elapsed().as_secs())),
            ("data_restarts", Number(header.data_restarts.load())),
            ("front_restarts", Number(header.front_restarts.load())),
            ("connections", Number(self.connections.load(Ordering::Relaxed))),
            ("workers", Number(self.workers as u64)),
            ("entries", Number(totals.entries)),
            ("content_bytes", Number(totals.content_bytes)),
            ("segment_bytes", Number(self.segment.memory_bytes())),
            ("capacity_bytes", Number(header.capacity_bytes.load())),
            ("value_bytes_max", Number(self.value_bytes_max)),
        ];
        all.extend(COUNTERS.map(|(counter, name)| (name, Number(self.counter(counter as usize)))));
        all.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }
}
