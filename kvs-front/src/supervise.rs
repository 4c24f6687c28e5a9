//! Launches the data server, notices its death, launches the next; ends both in order.
//!
//! ```text
//! launch ─ Start ─► Ready ─► serving ─┬─ dies ─► fence ─► launch
//!    ▲                │ Failed, dies   └─ quit ─► Stop ─► Stopped, ends
//!    └──── pause ◄────┘
//! ```
//!
//! Invariants
//! - A data server is launched only after every thread of the one before is proven dead.
//! - The segment's descriptor, and with it the lock, is held from the first Ready to the end.
//! - This thread is the only one that decides; all others tell it what happened, with the generation it happened to.

use std::io::Write as _;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use crossbeam_channel::Receiver;
use kvs_core::control::{DataMessage, FrontMessage, StartKind};
use kvs_core::wire::ErrorCode;

use crate::accept::Accepting;
use crate::console;
use crate::data_server::DataServer;
use crate::front::{Event, Front};
use crate::notify::notify;
use crate::pace::Pace;
use crate::refuse;

/// How long the data server has to end in order.
const STOP_PATIENCE: Duration = Duration::from_secs(10);
/// How long a data server may take to start before that is worth a line in the log.
const START_PATIENCE: Duration = Duration::from_secs(5);
/// How long a data server that could not start has to end by itself, and to be reaped.
const END_PATIENCE: Duration = Duration::from_secs(2);

/// What a data server says of itself when it is ready.
struct Readiness {
    pid: u32,
    entries: u64,
    start: StartKind,
    took_us: u64,
}

/// How a start went.
enum Start {
    Ready(Readiness),
    /// It said why it can't serve.
    Failed(String),
    /// It died without a word.
    Died,
    /// The store shall end meanwhile.
    Quit,
}

/// Watches over the data server.
pub struct Supervisor {
    front: Arc<Front>,
    events: Receiver<Event>,
    generation: u64,
    segment: Option<OwnedFd>,
    pace: Pace,
}

impl Supervisor {
    /// Of a store that has no data server yet.
    pub fn new(front: Arc<Front>, events: Receiver<Event>) -> Self {
        Self { front, events, generation: 0, segment: None, pace: Pace::new(Instant::now()) }
    }

    /// Runs the store until it shall end.
    ///
    /// # Errors
    /// Why it could not start.
    pub fn run(mut self, tcp: TcpListener, unix: UnixListener, console: UnixListener) -> anyhow::Result<()> {
        let server = self.launch()?;
        let readiness = match self.await_ready(&server) {
            Start::Ready(readiness) => readiness,
            Start::Quit => {
                self.stop(&server);
                return Ok(());
            }
            failed => return Err(self.explain(&server, failed)),
        };
        let accepting = Accepting::start(&self.front, tcp, unix)?;
        console::start(&self.front, console)?;
        self.announce(&readiness);
        let last = self.serve(server, &accepting);
        notify("STOPPING=1");
        log::info!("ending");
        self.front.remove_socket_files();
        accepting.stop();
        self.dismiss_waiting();
        if let Some(server) = last {
            self.stop(&server);
        }
        Ok(())
    }

    /// Tells the world, once, that the store is ready.
    fn announce(&self, readiness: &Readiness) {
        let Front { options, tcp_address, unix_path, begun, .. } = &*self.front;
        let mut output = std::io::stdout().lock();
        // Nobody may be left to read it; the store serves all the same.
        let _ = writeln!(
            output,
            "ready name={} tcp={tcp_address} unix={} front={} data={} segment={} entries={} start={} took={}_us",
            options.name,
            unix_path.display(),
            std::process::id(),
            readiness.pid,
            options.name.segment_path().display(),
            readiness.entries,
            readiness.start,
            begun.elapsed().as_micros()
        );
        let _ = output.flush();
        log::debug!("the data server took {} us of it", readiness.took_us);
        notify("READY=1");
    }

    /// Keeps a data server serving until the store shall end; returns the last one, if one is left.
    fn serve(&mut self, mut server: DataServer, accepting: &Accepting) -> Option<DataServer> {
        loop {
            match self.next_event(None) {
                Some(Event::Quit) | None => return Some(server),
                Some(Event::Dead(generation)) if generation == server.generation => {
                    server = match self.replace(&server) {
                        Ok(next) => next,
                        Err(starting) => return starting,
                    };
                    // Clients came meanwhile.
                    accepting.wake();
                }
                Some(_) => {}
            }
        }
    }

    /// Puts another data server in the place of one that died. An error is the one that was just starting when the store
    /// should end.
    fn replace(&mut self, dead: &DataServer) -> Result<DataServer, Option<DataServer>> {
        let noticed = Instant::now();
        self.front.link.disconnect();
        dead.fence();
        log::warn!("data server {} died; launching the next", dead.pid);
        loop {
            let pause = self.pace.pause(Instant::now());
            if !pause.is_zero() {
                self.end_clients_of(dead);
                log::info!("launching it in {} ms", pause.as_millis());
            }
            if self.quits_within(pause) {
                return Err(None);
            }
            let launched = self.launch();
            // While the next one is starting.
            self.end_clients_of(dead);
            match launched {
                Ok(next) => match self.await_ready(&next) {
                    Start::Ready(readiness) => {
                        self.pace.ready();
                        log::info!(
                            "data server {} serves {} entries, {:.1} ms after the death of {}",
                            next.pid,
                            readiness.entries,
                            noticed.elapsed().as_secs_f64() * 1_000.0,
                            dead.pid
                        );
                        return Ok(next);
                    }
                    Start::Quit => return Err(Some(next)),
                    Start::Failed(message) => {
                        next.fence();
                        log::error!("data server {} can't serve: {message}", next.pid);
                    }
                    Start::Died => {
                        next.fence();
                        log::error!("data server {} died before it was ready", next.pid);
                    }
                },
                Err(error) => log::error!("no data server could be launched: {error:#}"),
            }
            self.pace.failed();
        }
    }

    fn end_clients_of(&self, dead: &DataServer) {
        self.front.link.settle();
        match self.front.clients.end_of(dead.generation) {
            0 => {}
            count => log::info!(
                "ended {count} connections of data server {}; their clients connect again",
                dead.pid
            ),
        }
    }

    fn launch(&mut self) -> anyhow::Result<DataServer> {
        self.generation += 1;
        let server = DataServer::launch(&self.front, self.generation, self.segment.as_ref())?;
        self.front.set_process(server.process());
        Ok(server)
    }

    /// Waits until a data server serves or has failed.
    fn await_ready(&mut self, server: &DataServer) -> Start {
        loop {
            match self.next_event(Some(Instant::now() + START_PATIENCE)) {
                None => {
                    let seconds = server.launched.elapsed().as_secs();
                    log::warn!("data server {} is still starting after {seconds} s", server.pid);
                }
                Some(Event::Quit) => return Start::Quit,
                Some(Event::Dead(generation)) if generation == server.generation => return Start::Died,
                Some(Event::Said(generation, message, descriptors)) if generation == server.generation => {
                    match message {
                        DataMessage::Ready { process, entries, start, took_us } => {
                            let readiness = Readiness { pid: process.pid, entries, start, took_us };
                            return self.put_to_work(server, descriptors, readiness);
                        }
                        DataMessage::Failed { message } => return Start::Failed(message),
                        _ => {}
                    }
                }
                Some(_) => {}
            }
        }
    }

    fn put_to_work(&mut self, server: &DataServer, descriptors: Vec<OwnedFd>, readiness: Readiness) -> Start {
        if let Err(error) = server.watch(&self.front) {
            return Start::Failed(format!("{error:#}"));
        }
        if let Some(segment) = descriptors.into_iter().next() {
            self.segment = Some(segment);
        }
        self.front.link.connect(server.generation, Arc::clone(&server.socket));
        Start::Ready(readiness)
    }

    /// Why the store can't start, after the data server's end.
    fn explain(&mut self, server: &DataServer, failed: Start) -> anyhow::Error {
        let until = Instant::now() + END_PATIENCE;
        if matches!(failed, Start::Died) {
            // It closed its socket; perhaps it is not dead yet.
            server.kill();
        }
        let status = loop {
            match self.next_event(Some(until)) {
                Some(Event::Ended(generation, status)) if generation == server.generation => break status,
                Some(_) => {}
                None => {
                    server.fence();
                    break None;
                }
            }
        };
        match (failed, status) {
            (Start::Failed(message), _) => anyhow!("{message}"),
            (_, Some(status)) => {
                anyhow!("kvs-data ended before it was ready ({status}); what it wrote above says more")
            }
            (_, None) => anyhow!("kvs-data ended before it was ready; what it wrote above says more"),
        }
    }

    /// Tells the clients whom no data server got why they aren't served.
    fn dismiss_waiting(&self) {
        for (_, client) in self.front.clients.take_waiting(usize::MAX, 0) {
            refuse::tell(
                &client.socket,
                ErrorCode::ShuttingDown,
                "the server is ending; connect again later",
            );
        }
    }

    /// Ends the data server in order, or not in order when that takes too long.
    fn stop(&mut self, server: &DataServer) {
        let until = Instant::now() + STOP_PATIENCE;
        if let Err(error) = server.tell(&FrontMessage::Stop) {
            log::debug!("can't tell data server {} to stop: {error}", server.pid);
        }
        let mut finished = false;
        loop {
            match self.next_event(Some(until)) {
                Some(Event::Said(_, DataMessage::Stopped, _)) => finished = true,
                Some(Event::Ended(generation, status)) if generation == server.generation => {
                    if !finished {
                        let status = status.map_or_else(String::new, |status| format!(" ({status})"));
                        log::warn!("data server {} ended{status} before it had finished", server.pid);
                    }
                    return;
                }
                Some(_) => {}
                None => {
                    log::error!(
                        "data server {} doesn't end within {STOP_PATIENCE:?}; killing it",
                        server.pid
                    );
                    return server.fence();
                }
            }
        }
    }

    /// The next event; None when there is none until then.
    fn next_event(&self, until: Option<Instant>) -> Option<Event> {
        match until {
            // The front itself holds a sender: there is always another event to wait for.
            None => self.events.recv().ok(),
            Some(until) => self.events.recv_deadline(until).ok(),
        }
    }

    fn quits_within(&self, pause: Duration) -> bool {
        let until = Instant::now() + pause;
        while let Some(event) = self.next_event(Some(until)) {
            if matches!(event, Event::Quit) {
                return true;
            }
        }
        false
    }
}
