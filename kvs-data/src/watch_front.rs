//! The front server, as the data server sees it: what it says, its death, the next one in its place.
//!
//! ```text
//! hears ─┬─ hang-up ─► kill, wait for its end ─► launch ─ Inherit ─► Supervising ─► hears
//!        │                                         ▲                    │ dies, hangs
//!        │                                         └─────── pause ◄─────┘
//!        └─ Ending or a signal, and then hang-up ─► the store ends in order
//! ```
//!
//! Invariants
//! - A front server is launched only after the one before is proven dead, by its process's descriptor. It came from that process
//!   itself, or from the launch, so it never is another one's.
//! - What the next one needs lies in its socket before it is launched: should this process die, it goes on alone.
//! - The main thread alone launches, and serves nobody: clients don't notice.
//!
//! `report/fault-tolerance.md` argues the cases in which both servers die, or one while it replaces the other.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use kvs_core::control::{self, DataMessage, FrontMessage};
use kvs_core::heartbeat::{CHECKS, interval};
use kvs_core::liveness::{LivenessPage, MAIN_SLOT};
use kvs_core::sys::launch::{Child, Urgency};
use kvs_core::sys::priority;
use kvs_core::sys::process::ProcessIdentity;
use kvs_front::estate::Estate;
use kvs_front::options::ServerOptions;
use kvs_front::pace::Pace;
use kvs_front::socket_file::SocketFile;
use kvs_front::{process, program};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::heartbeat::Heartbeat;
use crate::shared::Shared;
use crate::wait::wait_for;

/// SIGTERM and SIGINT, which ask for an orderly end of the store.
pub struct QuitSignal(UnixStream);

impl QuitSignal {
    /// From now on they don't end the process. Nor does SIGHUP, which is the front server's to obey: here it only means that the
    /// front server died while this process stood still, and that the kernel has continued it.
    ///
    /// # Errors
    /// When no descriptors are left.
    pub fn catch() -> std::io::Result<Self> {
        let (caught, told) = UnixStream::pair()?;
        for signal in [SIGTERM, SIGINT] {
            signal_hook::low_level::pipe::register(signal, told.try_clone()?)?;
        }
        signal_hook::flag::register(SIGHUP, Arc::default())?;
        caught.set_nonblocking(true)?;
        Ok(Self(caught))
    }

    /// Where it is seen to have come.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn take(&self) {
        // How often it was sent makes no difference.
        while rustix::io::read(&self.0, &mut [0u8; 64][..]).is_ok_and(|count| count > 0) {}
    }

    /// Whether it comes within `pause`; it stays to be taken.
    fn comes_within(&self, pause: Duration) -> bool {
        wait_for([Some(self.as_fd())], Some(Instant::now() + pause)) == [true]
    }
}

/// What the data server starts with, besides the segment: whose it is, and what goes to the next front server.
pub struct Origin {
    /// The socket to the front server.
    pub socket: Arc<OwnedFd>,
    /// The front server.
    pub front: ProcessIdentity,
    /// Its process; None while it has not told.
    pub process: Option<Arc<OwnedFd>>,
    /// Its liveness page; likewise.
    pub alive: Option<OwnedFd>,
    /// Its process group.
    pub group: u32,
    /// What it leaves.
    pub estate: Estate,
    /// Signals that ask for the end.
    pub quit: QuitSignal,
}

/// A front server.
struct FrontServer {
    pid: u32,
    socket: Arc<OwnedFd>,
    /// None of one that has ended, for sure, when its socket did: nobody else has that.
    process: Option<Arc<OwnedFd>>,
    /// To be reaped, when this process has launched it.
    child: Option<Child>,
}

/// What a data server hands over besides the estate.
pub struct Own {
    /// What the operator asked for.
    pub options: ServerOptions,
    /// Its liveness page.
    pub liveness: LivenessPage,
    /// The segment.
    pub segment: OwnedFd,
    /// Its worker threads.
    pub workers: usize,
}

/// The front server of the moment, and all that the next one needs.
pub struct Fronts {
    /// The workers of this process make way for a front server.
    shared: Arc<Shared>,
    own: Own,
    front: FrontServer,
    /// The process group of the last one that served.
    group: u32,
    /// None once the front server ends the store: nobody shall connect any more.
    estate: Option<Estate>,
    socket_files: [SocketFile; 2],
    /// The store is to end.
    ends: bool,
    quit: QuitSignal,
    heartbeat: Heartbeat,
    pace: Pace,
    standby: Option<StandbyPeer>,
}

/// The standby, as the data server that serves knows it.
pub struct StandbyPeer {
    identity: ProcessIdentity,
    /// The link to it.
    pub link: Arc<OwnedFd>,
    process: OwnedFd,
    liveness: LivenessPage,
}

impl StandbyPeer {
    /// Takes it out of a message; None when its liveness page can't be mapped.
    pub fn new(identity: ProcessIdentity, descriptors: Vec<OwnedFd>) -> Option<Self> {
        let mut descriptors = descriptors.into_iter();
        let (link, process) = (Arc::new(descriptors.next()?), descriptors.next()?);
        Some(Self { identity, link, process, liveness: LivenessPage::attach(descriptors.next()?).ok()? })
    }

    /// Makes a socket between it and the next front server, and gives it its end.
    fn connect(&self) -> anyhow::Result<OwnedFd> {
        let (theirs, its) = pair()?;
        control::send(self.link.as_fd(), &DataMessage::NewFront, &[its.as_fd()])?;
        Ok(theirs)
    }
}

/// Has what is left of the front server give way as soon as it is ending: its socket hangs up when it has given back all that it had. A standby
/// does so, too, since both others may end at once.
pub fn await_ending(shared: &Arc<Shared>, front: u32, alive: OwnedFd) {
    let shared = Arc::clone(shared);
    let wait = move || {
        // The main thread may give way. And it would be put behind the dying one.
        shared.come_forward();
        if let Err(error) = priority::go_first_from_now_on() {
            log::debug!("the end of a front server will be noticed a little later: {error}");
        }
        let awaited = LivenessPage::attach(alive).map_err(anyhow::Error::from);
        match awaited.and_then(|page| Ok(page.await_death(MAIN_SLOT)?)) {
            Ok(()) => {
                shared.make_way();
                if let Err(error) = priority::give_way_if_ending(front) {
                    log::debug!("dead front server {front} takes what it needs of the cores: {error}");
                }
                // Else the data server that serves does, or the thread that takes over from it.
                if shared.has_begun() {
                    priority::see_off(&[front]);
                }
            }
            Err(error) => log::debug!("front server {front} won't give way at its end: {error}"),
        }
    };
    if let Err(error) = std::thread::Builder::new().name("watch-front".into()).spawn(wait) {
        log::debug!("front server {front} won't give way at its end: {error}");
    }
}

fn pair() -> anyhow::Result<(OwnedFd, OwnedFd)> {
    control::socket_pair().context("can't make a socket to the front server")
}

impl Fronts {
    /// The front server that launched this process.
    pub fn new(shared: Arc<Shared>, own: Own, origin: Origin, heartbeat: Heartbeat) -> Self {
        let Origin { socket, process, alive, .. } = origin;
        alive.into_iter().for_each(|alive| await_ending(&shared, origin.front.pid, alive));
        process.iter().for_each(|process| heartbeat.watch(Arc::clone(process)));
        let front = FrontServer { pid: origin.front.pid, socket, process, child: None };
        Self {
            shared,
            own,
            front,
            group: origin.group,
            socket_files: [origin.estate.unix_file.clone(), origin.estate.console_file.clone()],
            estate: Some(origin.estate),
            ends: false,
            quit: origin.quit,
            heartbeat,
            pace: Pace::new(Instant::now()),
            standby: None,
        }
    }

    /// The front server that another data server launched has said who it is.
    pub fn know(&mut self, front: ProcessIdentity, group: u32, descriptors: Vec<OwnedFd>) {
        (self.front.pid, self.group) = (front.pid, group);
        let mut descriptors = descriptors.into_iter();
        if let Some(process) = descriptors.next().map(Arc::new) {
            self.heartbeat.watch(Arc::clone(&process));
            self.front.process = Some(process);
        }
        descriptors.next().into_iter().for_each(|alive| await_ending(&self.shared, front.pid, alive));
    }

    /// From now on this standby goes on when the next front server is there.
    pub fn set_standby(&mut self, standby: Option<StandbyPeer>) {
        self.standby = standby;
    }

    /// Ends the standby, and returns when it can't take over any more.
    pub fn end_standby(&mut self) {
        if let Some(standby) = self.standby.take() {
            process::kill(standby.process.as_fd());
            if standby.liveness.await_all_dead().is_err() {
                process::await_end(standby.process.as_fd());
            }
        }
    }

    /// The socket to the front server.
    pub fn socket(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.front.socket)
    }

    /// Tells it something.
    pub fn tell(&self, message: &DataMessage) {
        if let Err(error) = control::send(self.front.socket.as_fd(), message, &[]) {
            log::debug!("can't tell front server {}: {error}", self.front.pid);
        }
    }

    /// Waits for what it says; None when it is gone. A signal that asks for the end is passed on meanwhile.
    pub fn hear(&mut self) -> Option<(FrontMessage, Vec<OwnedFd>)> {
        loop {
            let [said, signalled] =
                wait_for([Some(self.front.socket.as_fd()), Some(self.quit.as_fd())], None);
            if signalled {
                self.quit.take();
                self.ends = true;
                self.tell(&DataMessage::Quit);
            }
            if said {
                match control::receive(self.front.socket.as_fd()) {
                    Ok(Some((FrontMessage::Ending, _))) => {
                        self.ends = true;
                        self.estate = None;
                    }
                    Ok(said) => return said,
                    Err(error) => log::error!("front server {}: {error}", self.front.pid),
                }
            }
        }
    }

    /// Puts another front server in the place of the one that is gone; false when the store is to end instead.
    pub fn replace(&mut self) -> bool {
        let noticed = Instant::now();
        self.heartbeat.forget();
        let dead = self.front.pid;
        self.front.fence();
        if !self.ends {
            log::warn!("front server {dead} died; launching the next, clients are served on");
        }
        while !self.is_to_end() {
            match self.launch() {
                Ok(()) => {
                    self.pace.ready();
                    self.front.process.iter().for_each(|front| self.heartbeat.watch(Arc::clone(front)));
                    let took = noticed.elapsed().as_secs_f64() * 1_000.0;
                    log::info!(
                        "front server {} serves, {took:.1} ms after the death of {dead}",
                        self.front.pid
                    );
                    return true;
                }
                Err(error) => log::error!("no front server: {error:#}"),
            }
            self.pace.failed();
        }
        false
    }

    /// Makes the pause that is due; whether the store is to end.
    fn is_to_end(&mut self) -> bool {
        let pause = if self.ends { Duration::ZERO } else { self.pace.pause(Instant::now()) };
        if !pause.is_zero() {
            log::info!("launching it in {} ms", pause.as_millis());
        }
        self.ends |= self.quit.comes_within(pause);
        self.ends
    }

    fn launch(&mut self) -> anyhow::Result<()> {
        let estate = self.estate.as_ref().context("the store is ending")?;
        let standby = match self.standby.as_ref().map(|standby| Ok((standby.connect()?, standby))).transpose()
        {
            Ok(standby) => standby,
            Err(error) => {
                let error: anyhow::Error = error;
                log::debug!("the standby is gone: {error:#}");
                None
            }
        };
        self.front = FrontServer::launch(&self.own, estate, self.group, standby)?;
        let taken_over = self.await_supervising();
        if taken_over.is_err() {
            self.front.fence();
        }
        self.group = taken_over?;
        Ok(())
    }

    /// Waits until the front server that was just launched has taken over; gives its process group.
    fn await_supervising(&mut self) -> anyhow::Result<u32> {
        let socket = self.front.socket.as_fd();
        let mut looks = 0;
        // As a hang is noticed later: by looks, not by time.
        let next_look = || interval(self.own.options.hang_timeout).map(|pause| Instant::now() + pause);
        while wait_for([Some(socket)], next_look()) == [false] {
            looks += 1;
            anyhow::ensure!(looks < CHECKS, "the one launched has stood still at its start; killing it");
        }
        match control::receive(socket).context("the one launched")? {
            Some((FrontMessage::Supervising { group }, alive)) => {
                alive.into_iter().for_each(|alive| await_ending(&self.shared, self.front.pid, alive));
                Ok(group)
            }
            Some(_) => {
                anyhow::bail!("the one launched began with something else; is it of the same release?")
            }
            None => anyhow::bail!("the one launched ended at its start; what it wrote above says more"),
        }
    }

    /// Takes the socket files away, where no front server is left to do it.
    pub fn remove_socket_files(&self) {
        self.socket_files.iter().for_each(SocketFile::remove);
    }
}

impl FrontServer {
    /// Launches one. It gets the standby with a socket to it.
    fn launch(
        own: &Own,
        estate: &Estate,
        group: u32,
        standby: Option<(OwnedFd, &StandbyPeer)>,
    ) -> anyhow::Result<Self> {
        let (socket, theirs) = pair()?;
        let inherit = DataMessage::Inherit {
            process: ProcessIdentity::current().context("can't learn my own start time")?,
            group,
            workers: u32::try_from(own.workers).unwrap_or(u32::MAX),
            estate: estate.mark(),
            standby: standby.as_ref().map(|(_, standby)| standby.identity),
        };
        let process = process::own().context("can't open this process for the front server")?;
        let mut descriptors = estate.descriptors();
        descriptors.extend([own.liveness.as_fd(), process.as_fd(), own.segment.as_fd()]);
        if let Some((socket, standby)) = &standby {
            descriptors.extend([socket.as_fd(), standby.process.as_fd(), standby.liveness.as_fd()]);
        }
        control::send(socket.as_fd(), &inherit, &descriptors).context("can't tell the front server")?;
        let (child, process) =
            program::launch("kvs-front", "--inherited", &own.options, theirs, Urgency::Soon)?;
        let process = Some(Arc::new(process));
        Ok(Self { pid: child.pid(), socket: Arc::new(socket), process, child: Some(child) })
    }

    /// Kills it, and returns when none of its threads runs any more.
    fn fence(&mut self) {
        if let Some(process) = &self.process {
            process::kill(process.as_fd());
            process::await_end(process.as_fd());
        }
        if let Some(child) = self.child.take() {
            // Nobody else reaps it, and the next one is launched meanwhile.
            let reaping =
                std::thread::Builder::new().name("reap-front".into()).spawn(|| process::reap(child));
            if let Err(error) = reaping {
                log::debug!(
                    "the dead front server stays in the kernel's lists until this process ends: {error}"
                );
            }
        }
    }
}
