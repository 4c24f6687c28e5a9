//! A running store with all keys of a case, whose segment local readers read.

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use kvs_core::segment::SegmentView;

use super::cores;
use super::writer::Writer;
use crate::bench::network::NetworkTarget;
use crate::bench::network::connection::Address;
use crate::bench::network::kvs::Kvs;
use crate::bench::network::protocol::Protocol;
use crate::bench::scenario::Case;
use crate::bench::servers::find_program;
use crate::bench::servers::kvs::KvsServer;
use crate::bench::stores::Settings;
use crate::bench::target::Interrupted;

/// Stores with fewer keys have no huge page worth waiting for.
const KEYS_WITH_PAGES: u64 = 500_000;
/// The memory is as it will be when nothing has become a huge page for so long.
const PAGES_SETTLED: Duration = Duration::from_millis(2_500);
/// It is not waited longer for that.
const PAGES_PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks.
const LOOK_PAUSE: Duration = Duration::from_millis(100);

/// A store that is full of the keys of its case.
pub struct LocalStore {
    server: KvsServer,
}

impl LocalStore {
    /// Starts it and fills it: for a writer with values that tell whether they are whole, and on the cores that aren't the readers'.
    /// None when the program isn't here, which is told to `missing`.
    ///
    /// # Errors
    /// It doesn't start, or doesn't take the keys.
    pub fn start(
        case: &Case,
        settings: &Settings,
        for_writer: bool,
        missing: &mut Vec<String>,
    ) -> Result<Option<Self>> {
        let Some(program) = find_program("kvs-front") else {
            missing.push("kvs-front is not here; install it beside kvs-tools".into());
            return Ok(None);
        };
        let demand = settings.demand(case);
        let start = || KvsServer::start(&program, &demand);
        let store = Self { server: if for_writer { cores::on_others(start)? } else { start()? } };
        if for_writer {
            Writer::connect(store.unix_path(), &case.workload)?.store_all(&settings.interrupted)?;
        } else {
            fill(case, &Address::Unix(store.unix_path().to_path_buf()), Kvs::new(&case.workload), settings)?;
        }
        if case.workload.keys >= KEYS_WITH_PAGES {
            store.await_pages(&settings.interrupted)?;
        }
        Ok(Some(store))
    }

    /// Its unix socket.
    pub fn unix_path(&self) -> &Path {
        &self.server.unix
    }

    /// Its segment.
    pub fn segment_path(&self) -> PathBuf {
        self.server.name.segment_path()
    }

    /// Waits until the data server has made huge pages of what it can: it does so when it has nothing else to do.
    fn await_pages(&self, interrupted: &Interrupted) -> Result<()> {
        let view = SegmentView::open(&self.segment_path())?;
        let header = view.header()?;
        let begun = Instant::now();
        let (mut found, mut since) = (0, begun);
        while since.elapsed() < PAGES_SETTLED && begun.elapsed() < PAGES_PATIENCE {
            std::thread::sleep(LOOK_PAUSE);
            interrupted.check()?;
            let now = huge_bytes(header.data_process[0].load());
            if now != found {
                (found, since) = (now, Instant::now());
            }
        }
        Ok(())
    }
}

/// Stores all keys of a case in the store at `address`.
///
/// # Errors
/// It doesn't take them.
pub fn fill<P: Protocol>(case: &Case, address: &Address, protocol: P, settings: &Settings) -> Result<()> {
    let target = NetworkTarget {
        name: case.name.clone(),
        address: address.clone(),
        protocol,
        checks_values: true,
        workload: case.workload,
        values: case.workload.values(),
        load: case.load,
        _server: Rc::new(()),
    };
    target.fill(&settings.interrupted, &|_| {}).context("can't store the keys")
}

/// Bytes of shared memory that the process `pid` has mapped in huge pages; 0 when that can't be known.
fn huge_bytes(pid: u64) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    super::memory::field_kib(&text, "ShmemPmdMapped:").unwrap_or(0) << 10
}
