//! The data server: owns the segment and serves every request.
//!
//! | module | what it is |
//! |---|---|
//! | [`start`] | attach or create the segment, complete what a dead predecessor had decided |
//! | [`control`] | the main thread: what the front server says |
//! | [`watch_front`] | the front server's death, and the next one in its place |
//! | [`heartbeat`] | beats while all workers get on; notices a front server that hangs |
//! | [`worker`] | one thread of the fixed pool: its epoll, its clients |
//! | [`standby`] | waiting for the death of the data server that serves, and taking over |
//! | [`bench`] | where a client is, and where those of a standby sit |
//! | [`keeper`] | who keeps duplicates of the clients' sockets |
//! | [`client`] | a client's socket and its connection |
//! | [`load`] | from the backup file to a new segment, on all cores |
//! | [`backup`] | the thread that keeps the backup file |
//! | [`housekeeping`] | memory reserved ahead of need |
//! | [`shared`] | what all threads see |
//! | [`wait`] | waiting for several descriptors at once |
//!
//! Started alone it becomes the front server, which starts it again as it should be.
#![deny(unsafe_code)]

mod backup;
mod bench;
mod client;
mod control;
mod heartbeat;
mod housekeeping;
mod keeper;
mod load;
mod shared;
mod standby;
mod start;
mod wait;
mod watch_front;
mod worker;

use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use clap::Parser;
use kvs_core::control::CONTROL_VERSION;
use kvs_core::limits::FIRST_CLIENT_DESCRIPTOR;
use kvs_core::segment::layout::LAYOUT_VERSION;
use kvs_core::segment::{SegmentError, SegmentView};
use kvs_front::options::{ServerOptions, parse_or_exit, start_logging};
use kvs_front::{probe, process, program};
use signal_hook::consts::SIGXFSZ;

/// The data server of kvs.
///
/// Owns the shared segment and serves requests. kvs-front starts it; started by hand it starts kvs-front, and with that
/// the whole store.
#[derive(Debug, Parser)]
#[command(name = "kvs-data", version, about, after_help = "Example: kvs-data --name shop --capacity 8GiB")]
struct Options {
    #[command(flatten)]
    server: ServerOptions,

    /// Started by kvs-front, which is at the other end of standard input
    #[arg(long, hide = true)]
    controlled: bool,

    /// Say whether this program understands a front server whose messages have this version, and can attach to the segment of
    /// the instance; and end
    #[arg(long, hide = true)]
    probe: Option<u32>,
}

/// Numbers of descriptors besides one for each client: those below, and what is left over of a page of slots.
const OTHER_DESCRIPTORS: u64 = FIRST_CLIENT_DESCRIPTOR as u64 + 16;

fn main() -> ExitCode {
    let begun = Instant::now();
    let options: Options = parse_or_exit();
    if let Some(control) = options.probe {
        return probe(&options.server, control);
    }
    if !options.controlled {
        return become_front(&options.server);
    }
    start_logging(&options.server.log_level);
    process::begin_launched("front server");
    process::abort_on_panic();
    process::reserve_descriptors(u64::from(options.server.max_connections) + OTHER_DESCRIPTORS);
    outlive_file_size_limit();
    match control::run(&options.server, begun) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// What the front server wants to know of a program that is to take the place of a data server: that it starts, and whether it
/// understands the front server and the segment.
fn probe(options: &ServerOptions, control: u32) -> ExitCode {
    let version = env!("CARGO_PKG_VERSION");
    match SegmentView::open(&options.name.segment_path()) {
        Err(SegmentError::Layout { found, .. }) => {
            println!("kvs-data {version} has layout {LAYOUT_VERSION}, the segment has layout {found}");
            probe::OTHER_LAYOUT.into()
        }
        Err(error) => {
            println!("kvs-data {version}: {error}");
            ExitCode::FAILURE
        }
        Ok(_) if control != CONTROL_VERSION => {
            println!(
                "kvs-data {version} speaks control version {CONTROL_VERSION}, the front server version {control}"
            );
            probe::OTHER_CONTROL.into()
        }
        Ok(_) => {
            println!("kvs-data {version}, layout {LAYOUT_VERSION}");
            ExitCode::SUCCESS
        }
    }
}

/// The front server starts the data server; so this process becomes the front server.
fn become_front(options: &ServerOptions) -> ExitCode {
    let error: Box<dyn std::error::Error> = match program::find("kvs-front") {
        Ok(path) => Command::new(path).args(options.to_arguments()).exec().into(),
        Err(error) => error.into(),
    };
    eprintln!("kvs-data: can't start the front server: {error}");
    ExitCode::FAILURE
}

/// A backup file that reaches the limit of file sizes (`ulimit -f`) is an error of the write, not the end of the process.
fn outlive_file_size_limit() {
    let caught = Arc::new(AtomicBool::new(false));
    if let Err(error) = signal_hook::flag::register(SIGXFSZ, caught) {
        log::warn!("a backup file that reaches the limit of file sizes would end this process: {error}");
    }
}
