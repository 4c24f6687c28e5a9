//! Launches the data server and its standby, notices its death and its hanging, has the standby take over or launches the next;
//! ends all in order.
//!
//! ```text
//! launch ─ Start ─► Ready ─► serving ◄─ inherited from a front server that died
//!    ▲                │ Failed, dies  ├─ dies ─► fence ─► the standby takes over, else launch ─► Restored ─► serving
//!    └──── pause ◄────┘               ├─ hangs ─► kill, dies
//!                                     └─ quit ─► Ending, Stop ─► Stopped, ends
//! ```
//!
//! | module | what it is |
//! |---|---|
//! | [`standby`] | the standby, and the exchange of the data server for one |
//! | [`ending`] | the end in order, and the start from the programs on disk after it |
//!
//! Invariants
//! - A data server is launched only after every thread of the one before is proven dead, and every thread of the standby, which
//!   takes over unasked: there are never two that serve.
//! - No client is let go because a data server died: the next one gets its socket.
//! - The segment's descriptor, and with it the lock, is held from the first Ready, or from taking over, to the end.
//! - This thread is the only one that decides; all others tell it what happened, with the generation it happened to.
//! - It beats for as long as it waits for what happens: a supervisor that hangs is seen to.
//! - An error of a front server that has taken over ends this process alone: the data server launches the next.
//!
//! `report/fault-tolerance.md` argues the cases in which both servers die, or one while it replaces the other.

mod ending;
mod standby;

use std::io::Write as _;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use crossbeam_channel::Receiver;
use kvs_core::control::{self, DataMessage, FrontMessage, StartKind};
use kvs_core::sys::priority;
use kvs_front::pace::Pace;
use kvs_front::process;

use crate::accept::Accepting;
use crate::console;
use crate::data_server::{DataServer, Purpose};
use crate::front::{Event, Front};
use crate::heart::{Heart, own_identity};
use crate::inherit::Inherited;
use crate::notify::notify;
use standby::Exchange;

/// How long a data server may take to start before that is worth a line in the log.
const START_PATIENCE: Duration = Duration::from_secs(5);
/// How long a data server that could not start has to end by itself, and to be reaped.
const END_PATIENCE: Duration = Duration::from_secs(2);

/// Pause from a take-over to the launch of the next standby: clients that waited go first.
const STANDBY_PAUSE: Duration = Duration::from_millis(20);

/// What a data server says of itself when it is ready.
struct Readiness {
    pid: u32,
    entries: u64,
    start: StartKind,
    took_us: u64,
    waiting: Vec<u64>,
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

/// The death of a data server.
#[derive(Clone, Copy)]
struct Death {
    /// Whose.
    pid: u32,
    /// When it was noticed.
    noticed: Instant,
}

/// Watches over the data server.
pub struct Supervisor {
    front: Arc<Front>,
    events: Receiver<Event>,
    generation: u64,
    segment: Option<OwnedFd>,
    pace: Pace,
    accepting: Option<Accepting>,
    heart: Heart,
    /// The standby.
    standby: Option<DataServer>,
    standby_pace: Pace,
    /// When the next standby may be launched.
    standby_due: Instant,
    /// The data server is to give way to the standby, which was launched for this.
    exchange: Option<Exchange>,
    /// All clients of a data server that was there before this front server are known.
    knows_all: bool,
}

impl Supervisor {
    /// Of a store that has no data server yet.
    pub fn new(front: Arc<Front>, events: Receiver<Event>) -> Self {
        let heart = Heart::new(front.options.hang_timeout);
        let now = Instant::now();
        Self {
            front,
            events,
            generation: 0,
            segment: None,
            pace: Pace::new(now),
            accepting: None,
            heart,
            standby: None,
            standby_pace: Pace::new(now),
            standby_due: now,
            exchange: None,
            knows_all: true,
        }
    }

    /// Runs the store until it shall end.
    ///
    /// # Errors
    /// Why it could not start.
    pub fn run(mut self) -> anyhow::Result<()> {
        // Nobody was let in yet: those that there are were kept.
        let inherits = self.front.clients.count().all > 0;
        let server = self.launch()?;
        let readiness = match self.await_ready(&server) {
            Start::Ready(readiness) => readiness,
            Start::Quit => {
                self.end(Some(&server));
                return Ok(());
            }
            failed => return Err(self.explain(&server, failed)),
        };
        if inherits {
            self.restore_kept(&server, &readiness);
        }
        if let Err(error) = self.open_for_all() {
            self.end(Some(&server));
            return Err(error);
        }
        self.announce(&readiness);
        self.serve(server)
    }

    /// Passes the clients who outlived all processes to the data server, if it has what they need to go on: the segment that was
    /// there at the time.
    fn restore_kept(&self, server: &DataServer, readiness: &Readiness) {
        if !matches!(readiness.start, StartKind::Attached) {
            log::warn!("the connections that systemd kept are ended: their segment is gone");
            self.front.clients.end_orphans(server.generation);
        }
        if let Err(error) =
            self.front.link.restore(&self.front.clients, server.generation, &readiness.waiting)
        {
            log::error!("data server {} does not take its clients: {error}; killing it", server.pid);
            server.kill();
        }
    }

    /// Goes on where a front server died, until the store shall end.
    ///
    /// # Errors
    /// Why this process can't; the store lives on then.
    pub fn take_over(mut self, inherited: Inherited) -> anyhow::Result<()> {
        self.generation += 1;
        self.knows_all = false;
        let Inherited { server, standby, segment } = inherited;
        let own = own_identity()?;
        self.heart.enter(segment.as_fd()).context("can't map the segment's header")?.introduce_successor(own);
        self.segment = Some(segment);
        let server = self.front.keep_process(|| DataServer::inherit(&self.front, self.generation, server))?;
        // Before the death of the data server can be noticed: from now on the standby is reckoned with.
        if let Some(standby) = standby {
            self.inherit_standby(standby)?;
        }
        server.watch(&self.front)?;
        self.front.link.connect(server.generation, Arc::clone(&server.socket));
        let group = process::own_group();
        // The first thing that the data server hears: operators, who have it told more, come after.
        let supervising = FrontMessage::Supervising { group };
        if let Err(error) = control::send(server.socket.as_fd(), &supervising, &[self.front.liveness.as_fd()])
        {
            log::debug!("can't tell data server {}: {error}", server.pid);
        }
        self.open_for_operators()?;
        self.heart.watch(server.pid, server.process());
        // The one before may have died before it was ready.
        notify(&format!("MAINPID={}\nREADY=1", std::process::id()));
        log::info!("front server {} has taken over", std::process::id());
        self.serve(server)
    }

    /// Lets operators in.
    fn open_for_operators(&self) -> anyhow::Result<()> {
        let estate = self.front.estate()?;
        console::start(&self.front, estate.console, estate.input)
    }

    /// Lets operators and clients in.
    fn open_for_all(&mut self) -> anyhow::Result<()> {
        self.accept()?;
        self.open_for_operators()
    }

    /// Lets clients in, those first who came meanwhile.
    fn accept(&mut self) -> anyhow::Result<()> {
        match &self.accepting {
            Some(accepting) => accepting.wake(),
            None => self.accepting = Some(Accepting::start(&self.front)?),
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

    /// Keeps a data server serving until the store shall end, and ends it.
    fn serve(mut self, mut server: DataServer) -> anyhow::Result<()> {
        let last = loop {
            let due = [self.tend_standby(&server), self.tend_exchange(&server)];
            match self.next_event(due.into_iter().flatten().min()) {
                Some(Event::Quit) => break Some(server),
                Some(event) if self.is_end_of(&server, &event) => {
                    if matches!(event, Event::Said(..)) {
                        // It is waited for in a moment.
                        let _ = self.front.events.send(event);
                    }
                    server = match self.replace(&server) {
                        Ok(next) => next,
                        Err(starting) => break starting,
                    };
                    if self.knows_all {
                        self.accept()?;
                    }
                }
                Some(Event::Introduced) => {
                    self.knows_all = true;
                    self.accept()?;
                }
                Some(Event::RestartData(reply)) => self.begin_exchange(&server, reply),
                Some(Event::Reload { attach }) => return self.reload(&server, attach),
                Some(Event::Unable(why)) => bail!("can't take over all clients: {why}"),
                Some(event) => self.hear_of_standby(&server, event),
                // The front itself holds a sender: it is time for a standby.
                None => {}
            }
        };
        self.end(last.as_ref());
        Ok(())
    }

    /// Whether this proves that the data server is dead: a standby that serves does, too.
    fn is_end_of(&self, server: &DataServer, event: &Event) -> bool {
        match event {
            Event::Dead(generation) => *generation == server.generation,
            Event::Said(generation, DataMessage::Ready { .. }, _) => {
                self.standby.as_ref().is_some_and(|standby| standby.generation == *generation)
            }
            _ => false,
        }
    }

    /// Puts another data server in the place of one that died. An error is the one that was just starting when the store
    /// should end.
    fn replace(&mut self, dead: &DataServer) -> Result<DataServer, Option<DataServer>> {
        let death = Death { pid: dead.pid, noticed: Instant::now() };
        // It died before it was to; whoever asked is told by the end of the channel.
        self.exchange = None;
        self.heart.forget();
        self.front.link.disconnect();
        dead.fence();
        if !self.knows_all {
            self.hear_out(dead);
        }
        if let Some(standby) = self.standby.take() {
            log::warn!("data server {} died; its standby takes over", dead.pid);
            if let Some(standby) = self.let_take_over(standby, death).map_err(Some)? {
                return Ok(standby);
            }
        } else {
            log::warn!("data server {} died; launching the next", dead.pid);
            // It may still be giving back thousands of descriptors on the core that the next one needs.
            let_give_way(dead.pid);
        }
        // Nobody is left to introduce anybody.
        self.knows_all = true;
        loop {
            let pause = self.pace.pause(Instant::now());
            if !pause.is_zero() {
                log::info!("launching it in {} ms", pause.as_millis());
            }
            if self.quits_within(pause) {
                return Err(None);
            }
            match self.launch() {
                Ok(next) => {
                    let served = self.await_served(next, death, ["serve", "was ready"]).map_err(Some)?;
                    if let Some(next) = served {
                        return Ok(next);
                    }
                }
                Err(error) => log::error!("no data server could be launched: {error:#}"),
            }
            self.pace.failed();
        }
    }

    /// Waits for the standby to take over, and for what it knows of the clients; its results are those of `await_served`.
    fn let_take_over(&mut self, standby: DataServer, death: Death) -> Result<Option<DataServer>, DataServer> {
        self.heart.forget_standby();
        self.heart.watch_start(standby.pid, standby.process());
        self.front.standby_serves();
        let served = self.await_served(standby, death, ["take over", "had taken over"])?;
        if let Some(standby) = &served
            && !self.knows_all
        {
            let workers = self.front.options.worker_count();
            // It is dead otherwise, and the next one gets what there is.
            self.knows_all = standby.ask_for_clients(workers).is_err();
        }
        Ok(served)
    }

    /// Waits until a data server serves in the place of one that died, and passes all clients to it. None, and why is in the log,
    /// when it can't `serve` or died before it `was ready`; an error is the one that was just starting when the store should end.
    fn await_served(
        &mut self,
        next: DataServer,
        death: Death,
        [serve, was_ready]: [&str; 2],
    ) -> Result<Option<DataServer>, DataServer> {
        let pid = next.pid;
        match self.await_ready(&next) {
            Start::Ready(readiness) => {
                self.greet(&next, &readiness, death);
                return Ok(Some(next));
            }
            Start::Quit => return Err(next),
            Start::Failed(message) => {
                self.give_up(&next);
                log::error!("data server {pid} can't {serve}: {message}");
            }
            Start::Died => {
                self.give_up(&next);
                log::error!("data server {pid} died before it {was_ready}");
            }
        }
        Ok(None)
    }

    /// Passes all clients to a data server that serves in the place of one that died.
    fn greet(&mut self, next: &DataServer, readiness: &Readiness, death: Death) {
        self.pace.ready();
        self.standby_due = self.standby_due.max(Instant::now() + STANDBY_PAUSE);
        log::info!(
            "data server {} serves {} entries, {:.1} ms after the death of {}",
            next.pid,
            readiness.entries,
            death.noticed.elapsed().as_secs_f64() * 1_000.0,
            death.pid
        );
        if let Err(error) = self.front.link.restore(&self.front.clients, next.generation, &readiness.waiting)
        {
            log::error!("data server {} does not take its clients: {error}; killing it", next.pid);
            next.kill();
        }
    }

    /// Waits for the last words of a data server that is dead: it may have introduced clients with them.
    fn hear_out(&mut self, dead: &DataServer) {
        let until = Instant::now() + END_PATIENCE;
        let mut others = Vec::new();
        while let Some(event) = self.next_event(Some(until)) {
            match event {
                Event::Ended(generation, _) if generation == dead.generation => break,
                Event::Introduced => self.knows_all = true,
                event => others.push(event),
            }
        }
        // They are heard after it.
        others.into_iter().for_each(|event| drop(self.front.events.send(event)));
    }

    fn give_up(&mut self, server: &DataServer) {
        self.heart.forget();
        server.fence();
    }

    fn launch(&mut self) -> anyhow::Result<DataServer> {
        self.generation += 1;
        let server = self.front.keep_process(|| {
            let first = if self.front.clients.count().all > 0 { Purpose::Inherit } else { Purpose::First };
            let epolls = self.front.clients.epolls();
            let purpose = self.segment.as_ref().map_or(first, |segment| Purpose::Succeed(segment, &epolls));
            DataServer::launch(&self.front, self.generation, &purpose)
        })?;
        self.heart.watch_start(server.pid, server.process());
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
                        DataMessage::Ready { process, entries, start, took_us, waiting } => {
                            let readiness = Readiness { pid: process.pid, entries, start, took_us, waiting };
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
        if let Err(error) = self.watch(server, descriptors) {
            return Start::Failed(format!("{error:#}"));
        }
        self.front.link.connect(server.generation, Arc::clone(&server.socket));
        Start::Ready(readiness)
    }

    fn watch(&mut self, server: &DataServer, descriptors: Vec<OwnedFd>) -> anyhow::Result<()> {
        let segment = descriptors.into_iter().next().context("Ready came without the segment")?;
        self.heart.enter(segment.as_fd()).context("can't map the segment's header")?;
        self.segment = Some(segment);
        self.heart.watch(server.pid, server.process());
        server.watch(&self.front)
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

    /// The next event; None when there is none until then. Beats meanwhile.
    fn next_event(&mut self, until: Option<Instant>) -> Option<Event> {
        loop {
            self.heart.beat(Instant::now());
            let event = match [until, self.heart.due()].into_iter().flatten().min() {
                // The front itself holds a sender: there is always another event to wait for.
                None => return self.events.recv().ok(),
                // The channel would yield a few times before it noticed, and on a busy machine each costs milliseconds.
                Some(at) if at <= Instant::now() => self.events.try_recv().ok(),
                Some(at) => self.events.recv_deadline(at).ok(),
            };
            if event.is_some() || until.is_some_and(|until| until <= Instant::now()) {
                return event;
            }
        }
    }

    fn quits_within(&mut self, pause: Duration) -> bool {
        let until = Instant::now() + pause;
        while let Some(event) = self.next_event(Some(until)) {
            if matches!(event, Event::Quit) {
                return true;
            }
        }
        false
    }
}

/// Lets what is left of a dead data server give way, for a while.
fn let_give_way(dead: u32) {
    if let Err(error) = priority::give_way_if_ending(dead) {
        log::debug!("the dead data server {dead} takes what it needs of the cores: {error}");
    }
    let see_off = move || priority::see_off(&[dead]);
    if let Err(error) = std::thread::Builder::new().name("see-off".into()).spawn(see_off) {
        log::debug!("the dead data server {dead} gets what others leave of the cores: {error}");
    }
}
