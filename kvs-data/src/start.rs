//! From nothing to a segment that can be served.
//!
//! The front server has proven that every thread of a predecessor is dead before it starts this process, and the segment's
//! lock keeps all others out. So what is found is nobody's any more, and is recovered: see [`kvs_core::recover`]. Killed
//! anywhere in it, the next start does it again.

use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context as _, bail};
use kvs_core::control::StartKind;
use kvs_core::instance::{ByteSize, InstanceName};
use kvs_core::limits::CAPACITY_BYTES_DEFAULT;
use kvs_core::recover::{self, RecoverError};
use kvs_core::segment::layout::EXTENT_BYTES;
use kvs_core::segment::{Segment, default_capacity, store_text};
use kvs_core::sys::process::ProcessIdentity;
use kvs_core::table::Table;
use kvs_front::options::ServerOptions;

/// What the front server told at the start.
pub struct Told {
    /// The front server.
    pub front: ProcessIdentity,
    /// Where TCP clients connect.
    pub tcp_address: String,
    /// Where local clients connect.
    pub unix_path: String,
    /// Whether a data server has died before.
    pub relaunched: bool,
    /// The segment, if a data server had it before.
    pub segment: Option<OwnedFd>,
}

/// Gets the segment, and brings it into a state that can be served.
///
/// # Errors
/// Why it can't be had, for the operator.
pub fn open(options: &ServerOptions, told: Told) -> anyhow::Result<(Segment, Table, StartKind)> {
    let path = options.name.segment_path();
    let (segment, created) = match told.segment {
        Some(file) => (Segment::attach(&path, file)?, false),
        None => {
            let capacity = options.capacity.map_or_else(|| default_capacity(&path), |capacity| capacity.0);
            let opened = Segment::open_or_create(&path, capacity)?;
            (opened.segment, opened.created)
        }
    };
    let table = Table::new(&segment)?;
    if created {
        segment.claim_worker(options.worker_count() as u64)?;
        let capacity = segment.regions().capacity_bytes;
        if options.capacity.is_none() && capacity < CAPACITY_BYTES_DEFAULT {
            log::warn!("the capacity is {}: /dev/shm holds no more", ByteSize(capacity));
        }
    } else {
        recover(&table, &options.name)?;
        let capacity = segment.regions().capacity_bytes;
        if options.capacity.is_some_and(|wanted| wanted.0 / EXTENT_BYTES * EXTENT_BYTES != capacity) {
            log::warn!(
                "the segment keeps the capacity of {} it was made with; to change it, export, purge and import",
                ByteSize(capacity)
            );
        }
    }
    introduce(&segment, options, &told.front, (&told.tcp_address, &told.unix_path), told.relaunched)?;
    Ok((segment, table, if created { StartKind::New } else { StartKind::Attached }))
}

/// Recovers what a dead data server left; see [`kvs_core::recover`].
fn recover(table: &Table, name: &InstanceName) -> anyhow::Result<()> {
    match recover::recover(table) {
        Err(error @ RecoverError::DamagedLog { .. }) => bail!(
            "{error}; `kvs-tools check --name {name}` tells more, `kvs-tools purge --name {name}` gives it up"
        ),
        recovered => recovered.context("can't recover the segment"),
    }
}

/// Writes down who serves the segment now, and where.
fn introduce(
    segment: &Segment,
    options: &ServerOptions,
    front: &ProcessIdentity,
    (tcp_address, unix_path): (&str, &str),
    relaunched: bool,
) -> anyhow::Result<()> {
    let (header, memory) = (segment.header()?, segment.memory());
    let own = ProcessIdentity::current().context("can't learn my own start time")?;
    memory.store(&header.clean, 0);
    for (words, process) in [(&header.data_process, &own), (&header.front_process, front)] {
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
