//! The front server: accepts clients, passes their sockets to the data server, watches over it, talks to the operator.
//!
//! | module | what it is |
//! |---|---|
//! | [`options`](kvs_front::options) | the command line, shared with the data server |
//! | [`front`] | what all threads see |
//! | [`descriptors`] | how many files may be open, and how many clients that leaves room for |
//! | [`listen`] | the listening sockets |
//! | [`inherit`] | taking the place of a front server that died |
//! | [`accept`] | the thread that accepts, checks limits and hands over |
//! | [`refuse`] | telling a client why it can't be served |
//! | [`clients`] | a duplicate of every client's socket |
//! | [`link`] | the socket to the data server, and answers awaited from it |
//! | [`data_server`] | one data server, from its launch to the proof of its death |
//! | [`supervise`] | launches the data server, notices its death, launches the next, ends both |
//! | [`heart`] | the supervisor's heartbeat, and its look at the data server's |
//! | [`signals`] | SIGINT, SIGTERM, SIGHUP, Ctrl-Z |
//! | [`console`] | the operator's lines, from the terminal and from a socket |
//! | [`operator`] | what the operator's commands do |
//! | [`upgrade`] | trying the programs on disk before a server gives way to them |
//! | [`notify`] | telling systemd, and its store for descriptors |
//! | [`stored`] | what that store kept while no process lived |
//!
//! The data server watches it in turn, and launches the next one, with `--inherited`, when it dies or hangs.
//!
//! Deliberately absent: of the segment it maps the header's page alone, for the heartbeats, never the table; and it never reads
//! a byte of a client.
#![forbid(unsafe_code)]

mod accept;
mod clients;
mod console;
mod data_server;
mod descriptors;
mod front;
mod heart;
mod inherit;
mod link;
mod listen;
mod notify;
mod operator;
mod refuse;
mod signals;
mod stored;
mod supervise;
mod upgrade;

use std::io::Write as _;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use clap::Parser;
use crossbeam_channel::unbounded;
use kvs_core::control::CONTROL_VERSION;
use kvs_front::options::{ServerOptions, parse_or_exit, start_logging};
use kvs_front::{probe, process};
use rustix::fs::Mode;

use front::Front;
use inherit::Inherited;
use signals::HangUp;
use stored::Stored;
use supervise::Supervisor;

const ABOUT: &str = "\
The front server of kvs: a key-value store that survives kill -9

Starts the whole store: listens for clients, starts the data server (kvs-data, beside this program or on PATH) and passes \
every client's socket to it. When the store is ready, one line on standard output says where it listens. Ctrl-C, SIGTERM or \
`quit` on the console end it in order; the segment stays, so that the next start has all data at once.";

const EXAMPLES: &str = "\
Examples:
  kvs-front
  kvs-front --name shop --listen 127.0.0.1:7000 --capacity 8GiB
  KVS_NAME=shop KVS_CAPACITY=8GiB kvs-front --console off";

/// The front server of kvs: a key-value store that survives kill -9
#[derive(Debug, Parser)]
#[command(name = "kvs-front", version, about, long_about = ABOUT, after_help = EXAMPLES)]
struct Options {
    #[command(flatten)]
    server: ServerOptions,

    /// Started by kvs-data, which is at the other end of standard input, in the place of a front server that died
    #[arg(long, hide = true)]
    inherited: bool,

    /// Say whether this program understands a data server whose messages have this version, and end
    #[arg(long, hide = true)]
    probe: Option<u32>,
}

fn main() -> ExitCode {
    let begun = Instant::now();
    let options: Options = parse_or_exit();
    if let Some(control) = options.probe {
        return probe(control);
    }
    start_logging(&options.server.log_level);
    process::abort_on_panic();
    if options.inherited {
        process::begin_launched("data server");
    }
    let run = if options.inherited { take_over } else { start };
    match run(options.server, begun) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody may be left to read it.
            let _ = writeln!(std::io::stderr(), "kvs-front: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// What the front server that runs wants to know of a program that is to take its place.
fn probe(control: u32) -> ExitCode {
    let version = env!("CARGO_PKG_VERSION");
    if control != CONTROL_VERSION {
        println!(
            "kvs-front {version} speaks control version {CONTROL_VERSION}, the data server version {control}"
        );
        return probe::OTHER_CONTROL.into();
    }
    println!("kvs-front {version}");
    ExitCode::SUCCESS
}

fn start(mut options: ServerOptions, begun: Instant) -> anyhow::Result<()> {
    // What this process and the data server make is this user's alone.
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
    let limit = descriptors::raise(&options)?;
    // Every data server has as many, and need not find out anew.
    options.fix_worker_count();
    let (events, happened) = unbounded();
    let mut stored = Stored::take();
    let estate = listen::open(&options, &mut stored)?;
    let front = Arc::new(Front::new(options, limit, estate, events, begun)?);
    front.keep_estate();
    front.restore(stored.clients);
    let result = signals::watch(&front, HangUp::Ends)
        .and_then(|()| Supervisor::new(Arc::clone(&front), happened).run());
    front.finish();
    result
}

/// The store runs already: whatever goes wrong here is no reason to end it.
fn take_over(options: ServerOptions, begun: Instant) -> anyhow::Result<()> {
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
    let (events, happened) = unbounded();
    let (estate, inherited) = Inherited::receive()?;
    let limit = descriptors::raise(&options)?;
    let front = Arc::new(Front::new(options, limit, estate, events, begun)?);
    signals::watch(&front, HangUp::of_successor())?;
    Supervisor::new(Arc::clone(&front), happened).take_over(inherited)?;
    front.finish();
    Ok(())
}
