//! What the children do: a worker's or the backup thread's work, or recovery, with a stop before and after.

use std::os::fd::AsFd;
use std::path::Path;

use anyhow::ensure;
use kvs_core::arena::extents;
use kvs_core::recover;
use kvs_core::segment::Segment;
use kvs_core::segment::layout::{ORDERS, WorkerSlot};
use kvs_core::table::Table;

use crate::backup;
use crate::client::Client;
use crate::tracee::{be_traced, stop};
use crate::work::Work;

/// The segment that was handed over as the standard input.
fn attach(path: &Path) -> anyhow::Result<Segment> {
    let file = std::io::stdin().as_fd().try_clone_to_owned()?;
    Ok(Segment::attach(path, file)?)
}

/// Where the requests and the backup file are that the work is about.
pub struct Places<'p> {
    /// The segment.
    pub segment: &'p Path,
    /// The file with the requests.
    pub requests: &'p Path,
    /// The directory of the backup file.
    pub backup: &'p Path,
}

/// Does `work`.
///
/// # Errors
/// When a data server would end.
pub fn perform(work: Work, places: &Places<'_>) -> anyhow::Result<()> {
    let table = Table::new(&attach(places.segment)?)?.backed_up();
    let requests = std::fs::read(places.requests)?;
    let mut answers = Vec::with_capacity(requests.len() + 4096);
    let mut serve = |client: Option<Client<'_>>| {
        between_stops(|| match client {
            Some(mut client) => client.exchange(&requests, &mut answers),
            None => Client::open(&table)?.exchange(&requests, &mut answers),
        })
    };
    match work {
        Work::Requests => serve(Some(Client::greeted(&table)?)),
        Work::Connect => serve(None),
        Work::Close => {
            let client = Client::greeted(&table)?;
            between_stops(|| client.close())
        }
        Work::Reserve => {
            let segment = table.segment();
            let slot: &WorkerSlot = segment.memory().object(segment.regions().worker(1))?;
            between_stops(|| {
                ensure!(
                    extents::reserve_ahead(segment, slot, ORDERS - 1, |_| ())?,
                    "nothing was to be reserved"
                );
                Ok(())
            })
        }
        Work::Backup(what) => {
            let mut writer = backup::take_up(&table, places.backup)?;
            between_stops(|| Ok(what.perform(&mut writer)?))
        }
    }
}

fn between_stops(work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    be_traced()?;
    stop()?;
    work()?;
    stop()
}

/// Recovers what is put into the segment, again and again.
///
/// # Errors
/// When a data server would not start.
pub fn recover(path: &Path) -> anyhow::Result<()> {
    let segment = attach(path)?;
    be_traced()?;
    loop {
        stop()?;
        let table = Table::new(&segment)?;
        recover::recover(&table)?;
        stop()?;
    }
}

/// Stops, and stops again.
///
/// # Errors
/// When tracing is forbidden.
pub fn idle() -> anyhow::Result<()> {
    be_traced()?;
    stop()?;
    stop()
}
