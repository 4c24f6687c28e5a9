//! The front server: accepts clients, passes their sockets to the data server, watches over it, talks to the operator.
//!
//! | module | what it is |
//! |---|---|
//! | [`options`](kvs_front::options) | the command line, shared with the data server |
//! | [`listen`] | the listening sockets |
//! | [`accept`] | the thread that accepts, checks limits and hands over |
//! | [`clients`] | a duplicate of every client's socket |
//! | [`link`] | the socket to the data server, and answers awaited from it |
//! | [`supervise`] | starts the data server, notices its death, starts the next |
//! | [`console`] | the operator's commands, on the terminal and on a socket |
//! | [`notify`] | telling systemd |
//!
//! Deliberately absent: it never maps the segment, and never reads a byte of a client.
#![deny(unsafe_code)]

mod accept;
mod clients;
mod console;
mod link;
mod listen;
mod notify;
mod supervise;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::Context as _;
use clap::Parser;
use crossbeam_channel::Sender;
use kvs_front::options::{ServerOptions, parse_or_exit, start_logging};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use clients::Clients;
use link::Link;
use listen::Listening;
use supervise::{Event, Supervisor};

/// Descriptors a server needs besides those of its clients.
const DESCRIPTORS_OWN: u64 = 64;

/// The front server of kvs: a key-value store that survives kill -9.
///
/// Starts the whole store: listens for clients, starts the data server and passes every client's socket to it. When
/// the store is ready, one line on standard output tells where.
#[derive(Debug, Parser)]
#[command(
    name = "kvs-front",
    version,
    about,
    after_help = "Example: kvs-front --name shop --capacity 8GiB --listen 127.0.0.1:7000"
)]
struct Options {
    #[command(flatten)]
    server: ServerOptions,
}

/// What all threads of the front server see.
pub struct Front {
    options: ServerOptions,
    listening: Listening,
    clients: Clients,
    link: Link,
    begun: Instant,
    stopping: AtomicBool,
    events: Sender<Event>,
}

fn main() -> ExitCode {
    let begun = Instant::now();
    let options: Options = parse_or_exit();
    start_logging(&options.server.log_level);
    match run(options.server, begun) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kvs-front: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: ServerOptions, begun: Instant) -> anyhow::Result<()> {
    raise_descriptor_limit(options.max_connections);
    // Sockets and directories are this user's alone.
    rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
    let listening = Listening::open(&options)?;
    let (events, happened) = crossbeam_channel::unbounded();
    let front = Arc::new(Front {
        clients: Clients::new(),
        link: Link::new(),
        begun,
        stopping: AtomicBool::new(false),
        events: events.clone(),
        options,
        listening,
    });
    watch_signals(events)?;
    let result = Supervisor::new(Arc::clone(&front), happened).run();
    front.listening.remove();
    result
}

/// Every client takes a descriptor here and in the data server, which inherits the limit.
fn raise_descriptor_limit(connections: u32) {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        log::warn!("can't raise the limit of open files: {error}");
    }
    let wanted = u64::from(connections) + DESCRIPTORS_OWN;
    if let Some(most) = getrlimit(Resource::Nofile).current.filter(|&most| most < wanted) {
        log::warn!(
            "only {most} files may be open, {connections} connections need {wanted}: raise it with `ulimit -n`, or lower \
             --max-connections"
        );
    }
}

/// The first signal ends the store in order, the second at once.
fn watch_signals(events: Sender<Event>) -> anyhow::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM]).context("can't watch for signals")?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        for (count, signal) in signals.forever().enumerate() {
            if count > 0 {
                std::process::exit(128 + signal);
            }
            // The supervisor listens for as long as the process runs.
            let _ = events.send(Event::Quit);
        }
    })?;
    Ok(())
}
