//! From nothing to a segment that can be served.
//!
//! Whoever lets this process begin has proven that every thread of a predecessor is dead, and the segment's lock keeps all
//! others out. So what is found is nobody's any more, and is recovered: see [`kvs_core::recover`]. Killed
//! anywhere in it, the next start does it again.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use anyhow::{Context as _, bail};
use kvs_core::backup::disk::directory_of;
use kvs_core::connection::slot::SlotIndex;
use kvs_core::control::StartKind;
use kvs_core::instance::{ByteSize, InstanceName};
use kvs_core::limits::{CAPACITY_BYTES_DEFAULT, WORKER_THREADS_MAX};
use kvs_core::recover::{self, RecoverError};
use kvs_core::segment::layout::EXTENT_BYTES;
use kvs_core::segment::{Purpose, Segment, default_capacity, store_text};
use kvs_core::sys::process::ProcessIdentity;
use kvs_core::table::Table;
use kvs_front::options::ServerOptions;

use crate::backup::{Begin, DISK, open_file};
use crate::load::load;

/// What the front server told at the start.
pub struct Told {
    /// The front server.
    pub front: ProcessIdentity,
    /// Where TCP clients connect.
    pub tcp_address: String,
    /// Where local clients connect.
    pub unix_path: String,
    /// The segment, if the front server had it from a data server before.
    pub segment: Option<OwnedFd>,
    /// The epolls of that one's workers, if it had them.
    pub epolls: Vec<OwnedFd>,
    /// Whether clients of a data server before live on.
    pub inherits: bool,
}

/// What a start came to.
pub struct Started {
    /// The segment.
    pub segment: Segment,
    /// The table in it.
    pub table: Table,
    /// Where its data comes from.
    pub start: StartKind,
    /// The backup file.
    pub begin: Begin,
    /// Slots of the clients that the data server before was just serving.
    pub served: Vec<SlotIndex>,
}

/// Gets the segment, and brings it into a state that can be served: attaches to it, or loads the backup file, or makes an
/// empty one.
///
/// # Errors
/// Why it can't be had, for the operator.
pub fn open(options: &ServerOptions, told: Told) -> anyhow::Result<Started> {
    let path = options.name.segment_path();
    let started = match told.segment {
        Some(file) => {
            let segment = Segment::attach(&path, file)?;
            let table = Table::new(&segment)?;
            let served = take_over(&table, &options.name)?;
            // The data server that died a moment ago may still have the file locked: clients don't wait for that.
            Started { segment, table, start: StartKind::Attached, begin: Begin::Later, served }
        }
        None => match Segment::open(&path)? {
            Some(segment) => attach(options, segment, told.inherits)?,
            None => load_or_create(options, &path)?,
        },
    };
    let relaunched = matches!(started.begin, Begin::Later);
    introduce(
        &started.segment,
        options,
        Some(&told.front),
        (&told.tcp_address, &told.unix_path),
        relaunched,
    )?;
    Ok(started)
}

/// Takes up the segment of a store of which no process is left.
fn attach(options: &ServerOptions, segment: Segment, inherits: bool) -> anyhow::Result<Started> {
    let table = Table::new(&segment)?;
    let served = if inherits {
        take_over(&table, &options.name)?
    } else {
        explain(recover::recover(&table), &options.name)?;
        Vec::new()
    };
    let capacity = segment.regions().capacity_bytes;
    if options.capacity.is_some_and(|wanted| wanted.0 / EXTENT_BYTES * EXTENT_BYTES != capacity) {
        log::warn!(
            "the segment keeps the capacity of {} it was made with; to change it, `kvs-tools quit`, `kvs-tools purge`, and start: \
             the backup file is loaded into a new one",
            ByteSize(capacity)
        );
    }
    let begin = Begin::With(open_file(&options.backup_path())?);
    Ok(Started { segment, table, start: StartKind::Attached, begin, served })
}

fn load_or_create(options: &ServerOptions, path: &Path) -> anyhow::Result<Started> {
    let backup = options.backup_path();
    if options.backup.is_none() {
        make_directory(&backup)?;
    }
    let capacity = options.capacity.map_or_else(|| default_capacity(path), |capacity| capacity.0);
    if options.capacity.is_none() && capacity < CAPACITY_BYTES_DEFAULT {
        log::warn!("the capacity is {}: /dev/shm holds no more", ByteSize(capacity));
    }
    let Some(mut found) = open_file(&backup)? else {
        let segment = Segment::create(path, capacity, Purpose::new()?)?;
        segment.claim_worker(options.worker_count() as u64)?;
        let table = Table::new(&segment)?;
        return Ok(Started {
            segment,
            table,
            start: StartKind::New,
            begin: Begin::With(None),
            served: Vec::new(),
        });
    };
    let threads =
        std::thread::available_parallelism().map_or(1, std::num::NonZero::get).min(WORKER_THREADS_MAX);
    let (segment, table) = load(&DISK, &backup, &mut found, path, capacity, threads)?;
    Ok(Started {
        segment,
        table,
        start: StartKind::Loaded,
        begin: Begin::With(Some(found)),
        served: Vec::new(),
    })
}

/// The directory of the backup file where none was asked for is this user's alone.
fn make_directory(backup: &Path) -> anyhow::Result<()> {
    let directory = directory_of(backup);
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).with_context(|| {
        format!("can't make {} for the backup file; choose another --backup", directory.display())
    })
}

/// Recovers what a dead data server left whose clients live on; see [`kvs_core::recover`]. Gives the slots of those that it was just
/// serving.
///
/// # Errors
/// Why the segment can't be served, for the operator.
pub fn take_over(table: &Table, name: &InstanceName) -> anyhow::Result<Vec<SlotIndex>> {
    explain(recover::take_over(table), name)
}

fn explain<T>(recovered: Result<T, RecoverError>, name: &InstanceName) -> anyhow::Result<T> {
    match recovered {
        Err(error @ RecoverError::DamagedLog { .. }) => bail!(
            "{error}; `kvs-tools check --name {name}` tells more, `kvs-tools purge --name {name}` gives it up"
        ),
        recovered => recovered.context("can't recover the segment"),
    }
}

/// Writes down who serves the segment now, and where; and the front server, unless it has done so itself.
///
/// # Errors
/// When `/proc` can't be read.
pub fn introduce(
    segment: &Segment,
    options: &ServerOptions,
    front: Option<&ProcessIdentity>,
    (tcp_address, unix_path): (&str, &str),
    relaunched: bool,
) -> anyhow::Result<()> {
    let (header, memory) = (segment.header()?, segment.memory());
    let own = ProcessIdentity::current().context("can't learn my own start time")?;
    memory.store(&header.clean, 0);
    // This process has no standby yet.
    memory.store(&header.standby_process[0], 0);
    memory.store(&header.standby_stands, 0);
    let data = std::iter::once((&header.data_process, &own));
    for (words, process) in data.chain(front.map(|front| (&header.front_process, front))) {
        memory.store(&words[0], u64::from(process.pid));
        memory.store(&words[1], process.start_time);
    }
    if relaunched {
        memory.store(&header.data_restarts, header.data_restarts.load() + 1);
    }
    memory.store(&header.value_bytes_max, options.max_value.0);
    store_text(memory, &header.tcp_address, tcp_address);
    store_text(memory, &header.unix_path, unix_path);
    Ok(())
}

/// The segment's descriptor, for the front server to keep.
///
/// # Errors
/// Never, for a segment that was opened.
pub fn descriptor(segment: &Segment) -> anyhow::Result<OwnedFd> {
    let file = segment.file().context("the segment has no file")?;
    Ok(file.as_fd().try_clone_to_owned()?)
}
