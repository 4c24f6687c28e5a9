//! Starts the data server, notices its death, starts the next; ends both in order.
//!
//! ```text
//! launch ─ Start ─► Ready ─► serving ─┬─ its main thread dies ─► fence ─► launch
//!    ▲                │ Failed, dies   └─ quit ─► Stop ─► Stopped
//!    └── pause ◄──────┘
//! ```
//!
//! Invariants
//! - A data server is launched only after every thread of the one before is proven dead.
//! - The segment's descriptor, and with it the lock, is held from the first Ready to the end.

use std::io::Write as _;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use crossbeam_channel::{Receiver, RecvTimeoutError};
use kvs_core::control::{self, DataMessage, FrontMessage, StartKind};
use kvs_core::liveness::{LivenessPage, MAIN_SLOT};
use kvs_core::sys::process::ProcessIdentity;
use kvs_front::program;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use crate::notify::notify;
use crate::{Front, accept, console};

/// How long the data server has to end in order.
const STOP_PATIENCE: Duration = Duration::from_secs(10);
/// First pause after a data server could not start.
const PAUSE_MIN: Duration = Duration::from_millis(20);
/// Longest pause between two attempts.
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// A data server that lives shorter counts as one that could not stay.
const LIFE_SHORT: Duration = Duration::from_secs(1);
/// So many short lives in a row are put down to bad luck.
const SHORT_LIVES_MAX: u32 = 50;

/// What the supervisor learns of.
pub enum Event {
    /// The data server of this generation is dead, or doesn't talk any more.
    Dead(u64),
    /// The data server of this generation has finished in order.
    Stopped(u64),
    /// The store shall end.
    Quit,
}

/// A data server that serves.
struct Serving {
    child: Child,
    liveness: LivenessPage,
    since: Instant,
}

/// How a launch ended.
enum Launched {
    Ready(Serving, Box<Readiness>),
    Failed(String),
}

struct Readiness {
    process: ProcessIdentity,
    entries: u64,
    start: StartKind,
    took_us: u64,
}

/// Watches over the data server.
pub struct Supervisor {
    front: Arc<Front>,
    events: Receiver<Event>,
    generation: u64,
    segment: Option<OwnedFd>,
}

impl Supervisor {
    /// Of a store that has no data server yet.
    pub fn new(front: Arc<Front>, events: Receiver<Event>) -> Self {
        Self { front, events, generation: 0, segment: None }
    }

    /// Runs the store until it shall end.
    ///
    /// # Errors
    /// Why it could not start.
    pub fn run(mut self) -> anyhow::Result<()> {
        let (mut serving, readiness) = match self.launch()? {
            Launched::Ready(serving, readiness) => (serving, readiness),
            Launched::Failed(message) => bail!("{message}"),
        };
        let accepting = {
            let front = Arc::clone(&self.front);
            std::thread::Builder::new().name("accept".into()).spawn(move || accept::run(&front))?
        };
        console::start(&self.front)?;
        self.announce(&readiness);
        let mut short_lives = 0;
        let last = loop {
            match self.events.recv().context("no thread is left")? {
                Event::Quit => break Some(serving),
                Event::Stopped(generation) | Event::Dead(generation) if generation != self.generation => {}
                Event::Stopped(_) | Event::Dead(_) => {
                    let lived = serving.since.elapsed();
                    self.bury(serving);
                    short_lives = if lived < LIFE_SHORT { short_lives + 1 } else { 0 };
                    let pause = if short_lives > SHORT_LIVES_MAX { PAUSE_MIN * 5 } else { Duration::ZERO };
                    match self.relaunch(pause)? {
                        Some(next) => serving = next,
                        None => break None,
                    }
                }
            }
        };
        notify("STOPPING=1");
        self.front.stopping.store(true, Ordering::Release);
        if let Some(serving) = last {
            self.stop(serving);
        }
        // It looks at the flag often enough.
        let _ = accepting.join();
        Ok(())
    }

    /// Tells the world, once, that the store is ready.
    fn announce(&self, readiness: &Readiness) {
        let Front { options, listening, begun, .. } = &*self.front;
        // Nobody may be left to read it; the store serves all the same.
        let _ = writeln!(
            std::io::stdout(),
            "ready name={} tcp={} unix={} front={} data={} segment={} entries={} start={} took={}_us",
            options.name,
            listening.tcp_address,
            listening.unix_path.display(),
            std::process::id(),
            readiness.process,
            options.name.segment_path().display(),
            readiness.entries,
            readiness.start,
            begun.elapsed().as_micros()
        );
        log::debug!("the data server took {} us of it", readiness.took_us);
        notify("READY=1");
    }

    /// Launches until one serves; None when the store shall end meanwhile.
    fn relaunch(&mut self, mut pause: Duration) -> anyhow::Result<Option<Serving>> {
        loop {
            if !pause.is_zero() && self.quits_within(pause) {
                return Ok(None);
            }
            let begun = Instant::now();
            match self.launch() {
                Ok(Launched::Ready(serving, readiness)) => {
                    log::warn!(
                        "data server {} took over with {} entries, {} us after its launch",
                        readiness.process,
                        readiness.entries,
                        begun.elapsed().as_micros()
                    );
                    return Ok(Some(serving));
                }
                Ok(Launched::Failed(message)) => log::error!("the data server can't start: {message}"),
                Err(error) => log::error!("{error:#}"),
            }
            pause = (pause * 2).clamp(PAUSE_MIN, PAUSE_MAX);
            log::info!("trying again in {} ms", pause.as_millis());
        }
    }

    fn quits_within(&self, pause: Duration) -> bool {
        let until = Instant::now() + pause;
        loop {
            match self.events.recv_deadline(until) {
                Ok(Event::Quit) | Err(RecvTimeoutError::Disconnected) => return true,
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => return false,
            }
        }
    }

    /// Starts a data server and waits until it serves or has failed.
    fn launch(&mut self) -> anyhow::Result<Launched> {
        let path = program::find("kvs-data")?;
        let (own, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .context("can't make a socket to the data server")?;
        let liveness = LivenessPage::create().context("can't make the liveness page")?;
        let child = spawn(&path, &self.front, theirs)?;
        self.generation += 1;
        let serving = Serving { child, liveness, since: Instant::now() };
        if let Err(error) = self.tell_start(&own, &serving.liveness) {
            fence(serving);
            return Ok(Launched::Failed(format!("it could not be told to start: {error:#}")));
        }
        match control::receive::<DataMessage>(own.as_fd()) {
            Ok(Some((DataMessage::Ready { process, entries, start, took_us }, descriptors))) => {
                if let Some(segment) = descriptors.into_iter().next() {
                    self.segment = Some(segment);
                }
                self.watch(Arc::new(own), &serving)?;
                Ok(Launched::Ready(serving, Box::new(Readiness { process, entries, start, took_us })))
            }
            Ok(Some((DataMessage::Failed { message }, _))) => {
                fence(serving);
                Ok(Launched::Failed(message))
            }
            other => {
                let reason =
                    other.map_or_else(|error| error.to_string(), |_| "it died before it was ready".into());
                fence(serving);
                Ok(Launched::Failed(format!("{reason}; its log on standard error may say more")))
            }
        }
    }

    fn tell_start(&self, socket: &OwnedFd, liveness: &LivenessPage) -> anyhow::Result<()> {
        let start = FrontMessage::Start {
            front: ProcessIdentity::current()?,
            tcp_address: self.front.listening.tcp_address.to_string(),
            unix_path: self.front.listening.unix_path.display().to_string(),
            relaunched: self.segment.is_some(),
        };
        let mut descriptors = vec![liveness.as_fd()];
        descriptors.extend(self.segment.as_ref().map(AsFd::as_fd));
        Ok(control::send(socket.as_fd(), &start, &descriptors)?)
    }

    /// Listens to the data server, and for its death.
    fn watch(&self, socket: Arc<OwnedFd>, serving: &Serving) -> anyhow::Result<()> {
        let generation = self.generation;
        self.front.link.connect(Arc::clone(&socket));
        self.front.link.hand_over_waiting(&self.front.clients);
        let front = Arc::clone(&self.front);
        std::thread::Builder::new()
            .name("listen-data".into())
            .spawn(move || listen(&front, &socket, generation))?;
        let (page, events) = (serving.liveness.clone(), self.front.events.clone());
        std::thread::Builder::new().name("watch-data".into()).spawn(move || {
            if let Err(error) = page.await_death(MAIN_SLOT) {
                log::error!("can't watch the data server: {error}");
            }
            // The supervisor may have ended.
            let _ = events.send(Event::Dead(generation));
        })?;
        Ok(())
    }

    /// After a data server's death: makes sure of it, and ends the connections it had.
    fn bury(&self, serving: Serving) {
        log::error!("data server {} died; starting the next", serving.child.id());
        self.front.link.disconnect();
        fence(serving);
        self.front.clients.end_adopted();
    }

    /// Ends the data server in order, or not in order when that takes too long.
    fn stop(&self, serving: Serving) {
        let until = Instant::now() + STOP_PATIENCE;
        if self.front.link.send(&FrontMessage::Stop) {
            loop {
                match self.events.recv_deadline(until) {
                    Ok(Event::Stopped(generation) | Event::Dead(generation))
                        if generation == self.generation =>
                    {
                        break;
                    }
                    Ok(_) => {}
                    Err(_) => {
                        log::error!("the data server does not end; killing it");
                        break;
                    }
                }
            }
        }
        let mut serving = serving;
        while Instant::now() < until {
            match serving.child.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(1)),
                _ => return,
            }
        }
        fence(serving);
    }
}

/// Takes what the data server says until it says no more.
fn listen(front: &Front, socket: &OwnedFd, generation: u64) {
    loop {
        match control::receive::<DataMessage>(socket.as_fd()) {
            Ok(Some((DataMessage::Closed { connections }, _))) => front.clients.remove(&connections),
            Ok(Some((DataMessage::Stopped, _))) => {
                let _ = front.events.send(Event::Stopped(generation));
            }
            Ok(Some((message, _))) => front.link.answer(message),
            Ok(None) => break,
            Err(error) => {
                log::error!("{error}");
                break;
            }
        }
    }
    // The supervisor may have ended.
    let _ = front.events.send(Event::Dead(generation));
}

fn spawn(path: &std::path::Path, front: &Front, socket: OwnedFd) -> anyhow::Result<Child> {
    use std::os::unix::process::CommandExt;
    Command::new(path)
        .arg("--controlled")
        .args(front.options.to_arguments())
        .stdin(Stdio::from(socket))
        .stdout(Stdio::null())
        // A Ctrl-C on the terminal is the front server's to obey.
        .process_group(0)
        .spawn()
        .with_context(|| format!("can't start {}", path.display()))
}

/// Kills the data server and returns when each of its threads is proven dead. Reaping it takes longer, as the kernel
/// first lets its memory go, and is left to a thread of its own.
fn fence(serving: Serving) {
    let Serving { mut child, liveness, .. } = serving;
    if let Err(error) = child.kill() {
        log::debug!("killing the data server: {error}");
    }
    if let Err(error) = liveness.await_all_dead() {
        log::error!("can't prove by its locks that the data server is dead: {error}; waiting for its end");
        let _ = child.wait();
    }
    let reaper = std::thread::Builder::new().name("reap-data".into());
    if let Err(error) = reaper.spawn(move || child.wait()) {
        log::warn!("can't start a thread to reap the data server: {error}");
    }
}
