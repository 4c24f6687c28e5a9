//! From the backup file to a new segment, on all cores. One thread walks through the file, the others check and apply what it
//! hands out; on a terminal a bar shows how far it is.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use crossbeam_channel::{Receiver, Sender};
use indicatif::{ProgressBar, ProgressStyle};
use kvs_core::backup::BackupError;
use kvs_core::backup::disk::Disk;
use kvs_core::backup::load::{Loaded, Loading, Torn};
use kvs_core::backup::log::Found;
use kvs_core::backup::scan::{Block, Frames, Next};
use kvs_core::instance::ByteSize;
use kvs_core::segment::layout::WorkerSlot;
use kvs_core::segment::{Purpose, Segment};
use kvs_core::table::{Table, TableError};

/// Blocks that wait for each thread.
const BLOCKS_WAITING: usize = 2;
/// A load shorter than this needs no bar.
const BAR_AFTER: Duration = Duration::from_millis(500);

/// Makes the segment at `path` with all that is in `found`, the file at `backup`. A torn end is cut off and kept aside.
///
/// # Errors
/// Why it can't be loaded; no segment is left then.
pub fn load(
    disk: &dyn Disk,
    backup: &Path,
    found: &mut Found,
    path: &Path,
    capacity: u64,
    threads: usize,
) -> anyhow::Result<(Segment, Table)> {
    let begun = Instant::now();
    log::info!("loading {} ({})", backup.display(), ByteSize(found.length).rounded());
    loop {
        let segment = Segment::create(path, capacity, Purpose { backup_id: found.header.id, loading: true })?;
        match load_into(disk, backup, found, &segment, threads) {
            Ok((records, Loaded::Whole { torn })) => {
                torn.iter().for_each(report);
                let table = Table::new(&segment)?;
                let seconds = begun.elapsed().as_secs_f64();
                log::info!(
                    "loaded {records} records, {} entries, in {seconds:.2} s ({:.2} million a second)",
                    table.totals().entries,
                    records as f64 / seconds / 1e6
                );
                return Ok((segment, table));
            }
            // Records behind the torn end, of which nobody was told that they are safe, are in the table already.
            Ok((_, Loaded::Again { torn })) => {
                report(&torn);
                found.length = torn.position;
                drop(segment);
                kvs_core::segment::remove(path)?;
            }
            Err(error) => {
                drop(segment);
                kvs_core::segment::remove(path)?;
                return Err(error);
            }
        }
    }
}

fn report(torn: &Torn) {
    log::warn!(
        "the backup file ended in the middle of what was being written, as after a power cut: {} bytes from {} on, with {} whole \
         records that nobody was told to be safe, are cut off and kept in {}",
        torn.bytes,
        torn.position,
        torn.sound_behind,
        torn.kept.display()
    );
}

/// Fills the segment; returns how many records that took. Nothing of it holds the segment any longer then, so that it can be removed.
fn load_into(
    disk: &dyn Disk,
    backup: &Path,
    found: &Found,
    segment: &Segment,
    threads: usize,
) -> anyhow::Result<(u64, Loaded)> {
    let table = Table::new(segment)?;
    for index in 0..threads {
        segment.claim_worker(index as u64)?;
    }
    let loading = Loading::new(&table, found);
    loading.prepare(backup, found, segment.memory().object(segment.regions().worker(0))?)?;
    let mut frames = Frames::new(&*found.file, found.length);
    let (end, applied) = std::thread::scope(|scope| {
        let (blocks, inbox) = crossbeam_channel::bounded(BLOCKS_WAITING * threads);
        let (used, reused) = crossbeam_channel::unbounded();
        let appliers: Vec<_> = (0..threads)
            .map(|index| {
                let (loading, inbox, used) = (&loading, inbox.clone(), used.clone());
                scope.spawn(move || apply(loading, segment, index, &inbox, &used))
            })
            .collect();
        drop(inbox);
        let end = walk(&mut frames, found.length, &blocks, &reused);
        drop(blocks);
        let applied: Vec<_> = appliers.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
        (end, applied)
    });
    for result in applied {
        let result = result.map_err(|_| anyhow::anyhow!("a loading thread panicked"))?;
        result.map_err(|error| explain(error, backup, segment))?;
    }
    let end = end.with_context(|| format!("can't read the backup file {}", backup.display()))?;
    let loaded = loading.conclude(disk, backup, found, &frames, end)?;
    Ok((loading.records(), loaded))
}

fn explain(error: TableError, backup: &Path, segment: &Segment) -> anyhow::Error {
    match error {
        TableError::Full(_) => {
            let capacity = segment.regions().capacity_bytes;
            BackupError::Capacity { path: backup.to_path_buf(), capacity }.into()
        }
        error => error.into(),
    }
}

/// Hands out the file's blocks; returns how it ended.
fn walk(
    frames: &mut Frames<'_>,
    length: u64,
    blocks: &Sender<Block>,
    reused: &Receiver<Block>,
) -> std::io::Result<Next> {
    let begun = Instant::now();
    let bar = progress_bar(length);
    loop {
        let mut block = reused.try_recv().unwrap_or_default();
        match frames.next_block(&mut block)? {
            // All threads are gone: one of them says why.
            Next::Block if blocks.send(block).is_err() => return Ok(Next::End),
            Next::Block => {
                if begun.elapsed() > BAR_AFTER {
                    bar.set_position(frames.reached().0);
                }
            }
            end => {
                bar.finish_and_clear();
                return Ok(end);
            }
        }
    }
}

/// Shows itself on a terminal only.
fn progress_bar(length: u64) -> ProgressBar {
    let style =
        ProgressStyle::with_template("loading [{bar:40}] {bytes}/{total_bytes} {bytes_per_sec} {eta}");
    let bar = ProgressBar::new(length);
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "));
    bar
}

fn apply(
    loading: &Loading,
    segment: &Segment,
    index: usize,
    inbox: &Receiver<Block>,
    used: &Sender<Block>,
) -> Result<(), TableError> {
    let slot: &WorkerSlot = segment.memory().object(segment.regions().worker(index as u64))?;
    for block in inbox {
        loading.apply(slot, &block)?;
        if loading.bad().is_some() {
            break;
        }
        // Nobody may want it any more.
        let _ = used.send(block);
    }
    Ok(())
}
