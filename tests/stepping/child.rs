//! What the children do: serve a client's requests, or recover, with a stop before and after.

use std::os::fd::AsFd;
use std::path::Path;

use anyhow::Context as _;
use kvs_core::recover;
use kvs_core::segment::Segment;
use kvs_core::table::Table;

use crate::backup::{self, Backup};
use crate::client::Client;
use crate::tracee::{be_traced, stop};

/// The segment that was handed over as the standard input.
fn attach(path: &Path) -> anyhow::Result<Segment> {
    let file = std::io::stdin().as_fd().try_clone_to_owned()?;
    Ok(Segment::attach(path, file)?)
}

/// Serves the requests in the file at `requests`.
///
/// # Errors
/// When a data server would end.
pub fn serve(path: &Path, requests: &Path) -> anyhow::Result<()> {
    let table = Table::new(&attach(path)?)?.backed_up();
    let requests = std::fs::read(requests)?;
    let mut answers = Vec::with_capacity(requests.len() + 4096);
    let mut client = Client::greeted(&table)?;
    be_traced()?;
    stop()?;
    client.exchange(&requests, &mut answers)?;
    stop()
}

/// Does what the backup thread does, `what` of it, with the file in `directory`.
///
/// # Errors
/// What the disk says.
pub fn back_up(path: &Path, directory: &Path, what: &str) -> anyhow::Result<()> {
    let table = Table::new(&attach(path)?)?.backed_up();
    let what = Backup::called(what).context("that isn't what a backup thread does")?;
    let mut writer = backup::take_up(&table, directory)?;
    be_traced()?;
    stop()?;
    what.perform(&mut writer)?;
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
