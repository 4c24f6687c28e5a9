//! The standby: a data server that has everything but the segment's permission. When the one that serves dies, it goes on.
//!
//! ```text
//!             ┌─ watch: sleeps in the liveness lock of the one that serves ─► fence ─► recover ─► workers go
//! standby ────┤
//!             └─ main: takes the sockets of its clients, which are in the epolls of its workers, and stay there
//! ```
//!
//! Invariants
//! - It reads nothing from a socket and changes nothing in the segment, but to say that it stands, before every thread of the data
//!   server that serves is proven dead.
//! - It takes over unasked: there need not be a front server. One that decides otherwise proves it dead first. And it takes over
//!   only if the data server that died had named it in the segment: so there are never two, whoever launched how many.
//! - A client has been introduced to it before it is served, so this process alone is enough to keep the connection.
//!
//! It costs a process with its threads asleep, a descriptor for each client, and the memory of the segment mapped.
//! `report/no-client-notices.md` argues the cases in which several processes die.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use kvs_core::connection::slot::SlotIndex;
use kvs_core::control::{self, ControlError, DataMessage, FrontMessage, Seat, StartKind};
use kvs_core::liveness::{FIRST_HELPER_SLOT, LivenessPage, MAIN_SLOT};
use kvs_core::segment::Segment;
use kvs_core::sys::fd_passing::PassingError;
use kvs_core::sys::priority::{self, BREATH, Rank};
use kvs_core::sys::process::ProcessIdentity;
use kvs_core::table::Table;
use kvs_front::options::ServerOptions;
use rustix::event::{EventfdFlags, eventfd};

use crate::backup::Begin;
use crate::bench::{Place, Seated};
use crate::control::{Prepared, Server};
use crate::shared::Shared;
use crate::start::{self, Told};
use crate::wait::wait_for;
use crate::watch_front::{Origin, await_ending};

/// The watching thread's slot of the liveness page.
const SLOT: usize = FIRST_HELPER_SLOT + 2;
/// How long a data server that talks no more may live on before this process takes itself for forgotten.
const SILENCE_MAX: Duration = Duration::from_secs(2);

/// Memory of the segment that is mapped in one call, during which nobody else may get the core.
const MAPPED_AT_ONCE: u64 = 256 << 10;
/// Pause until the next upkeep.
const UPKEEP_PAUSE: Duration = Duration::from_millis(500);

/// The data server that serves.
pub struct Watched {
    /// Where its threads prove that they live.
    pub liveness: LivenessPage,
    /// The link to it.
    pub link: OwnedFd,
}

struct Standby {
    prepared: Prepared,
    origin: Origin,
    /// The socket to the front server, as the watching thread gives it to the workers.
    front: Arc<Mutex<Arc<OwnedFd>>>,
    /// Slots of those who sit, by the number of the connection.
    seated: HashMap<u64, SlotIndex>,
    /// Introduced when the workers had begun.
    late: Vec<Seated>,
    /// Workers of the one that serves that have not introduced all their clients.
    strangers: usize,
}

/// What became of waiting.
enum Outcome {
    /// This process serves.
    TookOver,
    /// It is not needed any more.
    Over,
}

/// Stands by until it takes over; None when it is not needed any more.
///
/// # Errors
/// Why it can't stand by, or could not take over.
pub fn stand(
    options: &ServerOptions,
    told: Told,
    liveness: LivenessPage,
    mut origin: Origin,
    watched: Watched,
    begun: Instant,
) -> anyhow::Result<Option<Server>> {
    let Told { front: told_front, tcp_address, unix_path, segment, .. } = told;
    let segment = segment.context("a standby needs the segment")?;
    // It was launched as one that gives way. Threads that somebody will wait for take this rank when they begin.
    let rank = Rank::of_process(told_front.pid).ok();
    rank.into_iter().for_each(Rank::leave);
    let segment = Segment::attach(&options.name.segment_path(), segment)?;
    let table = Table::new(&segment)?;
    let link = Arc::new(watched.link);
    let Some(epolls) = receive_epolls(&link, &origin)? else { return Ok(None) };
    let prepared = Prepared::new(options, &table, liveness, begun, rank, epolls)?;
    origin.alive.take().into_iter().for_each(|alive| await_ending(&prepared.shared, origin.front.pid, alive));
    let front = Arc::new(Mutex::new(Arc::clone(&origin.socket)));
    let taking_over = TakingOver {
        options: options.clone(),
        addresses: (tcp_address, unix_path),
        dead: watched.liveness,
        shared: Arc::clone(&prepared.shared),
        front: Arc::clone(&front),
    };
    let (result, took_over) = (Arc::new(Mutex::new(None)), eventfd(0, EventfdFlags::CLOEXEC)?);
    let (result_there, tell) = (Arc::clone(&result), took_over.try_clone()?);
    std::thread::Builder::new()
        .name("watch-active".into())
        .spawn(move || {
            let (done, dead) =
                taking_over.run().map_or_else(|error| (Err(error), None), |(at, dead)| (Ok(at), Some(dead)));
            *result_there.lock().unwrap_or_else(PoisonError::into_inner) = Some(done);
            // It can't be full.
            let _ = rustix::io::write(&tell, &1u64.to_ne_bytes());
            dead.iter().for_each(|dead| priority::see_off(dead));
        })
        .context("can't start a thread to watch the data server")?;
    let upkeep = Upkeep::start(&segment)?;
    let strangers = prepared.shared.workers;
    let mut standby =
        Standby { prepared, origin, front, seated: HashMap::new(), late: Vec::new(), strangers };
    log::debug!("standing by");
    let outcome = standby.wait(&link, &took_over)?;
    upkeep.stop();
    match outcome {
        Outcome::Over => Ok(None),
        Outcome::TookOver => {
            let done = result.lock().unwrap_or_else(PoisonError::into_inner).take();
            let began: Instant = done.context("nobody took over")??;
            standby.hear_out(&link);
            standby.into_server(options, began).map(Some)
        }
    }
}

/// Waits for the first word of the data server that serves, with its workers' epolls; None when this process is not needed any more.
fn receive_epolls(link: &OwnedFd, origin: &Origin) -> anyhow::Result<Option<Vec<OwnedFd>>> {
    let [_, quits] = wait_for([Some(link.as_fd()), Some(origin.quit.as_fd())], None);
    if quits {
        return Ok(None);
    }
    match control::receive::<DataMessage>(link.as_fd())? {
        Some((DataMessage::Active { .. }, epolls)) => Ok(Some(epolls)),
        Some((message, _)) => bail!("the data server began with {message:?}; are both of the same release?"),
        // It has never heard of this process: the front server died before it could tell.
        None => Ok(None),
    }
}

/// Keeps ready what a take-over would have to wait for: the segment's memory mapped.
struct Upkeep {
    stop: Arc<AtomicBool>,
}

impl Upkeep {
    fn start(segment: &Segment) -> anyhow::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (segment, stopped) = (segment.clone(), Arc::clone(&stop));
        let keep = move || {
            // Tens of milliseconds of work for gigabytes, while clients are served on the same cores.
            if let Err(error) = priority::give_way_from_now_on() {
                log::debug!("keeping memory mapped takes time from others: {error}");
            }
            let mut maps = true;
            while !stopped.load(Ordering::Relaxed) {
                let go_on = || {
                    std::thread::sleep(BREATH);
                    !stopped.load(Ordering::Relaxed)
                };
                if maps && let Err(error) = segment.populate(MAPPED_AT_ONCE, go_on) {
                    // An older kernel: pages are mapped as they are needed.
                    log::debug!("the segment can't be mapped ahead: {error}");
                    maps = false;
                }
                std::thread::park_timeout(UPKEEP_PAUSE);
            }
        };
        std::thread::Builder::new().name("upkeep".into()).spawn(keep).context("can't start a thread")?;
        Ok(Self { stop })
    }

    fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Standby {
    /// Takes sockets and news until it has taken over, or is not needed any more.
    fn wait(&mut self, link: &OwnedFd, took_over: &OwnedFd) -> anyhow::Result<Outcome> {
        let (mut link_open, mut front_open) = (true, true);
        let mut until = None;
        loop {
            let front = Arc::clone(&self.origin.socket);
            let sources = [
                Some(took_over.as_fd()),
                Some(self.origin.quit.as_fd()),
                // One that has hung up is not waited for: it would be ready all the time.
                link_open.then(|| link.as_fd()),
                front_open.then(|| front.as_fd()),
            ];
            let [taken, quits, linked, fronted] = wait_for(sources, until);
            if taken {
                return Ok(Outcome::TookOver);
            }
            if quits {
                log::info!("told to end; the data server that serves goes on");
                return Ok(Outcome::Over);
            }
            if linked {
                match control::receive::<DataMessage>(link.as_fd()) {
                    Ok(Some((DataMessage::NewFront, sockets))) => {
                        self.meet(sockets);
                        front_open = true;
                        // What was seen of the one before is not true of this one.
                        continue;
                    }
                    Ok(Some((message, sockets))) => self.learn(message, sockets),
                    Ok(None) => {
                        // It is dying, or does without this process.
                        link_open = false;
                        until = Some(Instant::now() + SILENCE_MAX);
                    }
                    Err(error) => log::error!("data server: {error}"),
                }
            }
            if fronted {
                match control::receive::<FrontMessage>(front.as_fd()) {
                    Ok(Some((FrontMessage::Stop, _))) => return Ok(Outcome::Over),
                    Ok(Some((FrontMessage::Watching { front, group }, descriptors))) => {
                        (self.origin.front, self.origin.group) = (front, group);
                        let mut descriptors = descriptors.into_iter();
                        self.origin.process = descriptors.next().map(Arc::new);
                        let alive = descriptors.next();
                        alive
                            .into_iter()
                            .for_each(|alive| await_ending(&self.prepared.shared, front.pid, alive));
                    }
                    Ok(Some((message, _))) => log::warn!("told something out of turn: {message:?}"),
                    // The data server launches another one; or, if it is dead too, this process does when it serves.
                    Ok(None) => front_open = false,
                    Err(error) => log::error!("front server: {error}"),
                }
            }
            if until.is_some_and(|until| until <= Instant::now()) {
                log::info!("the data server tells this standby nothing any longer; ending");
                return Ok(Outcome::Over);
            }
        }
    }

    /// Another front server will be there.
    fn meet(&mut self, sockets: Vec<OwnedFd>) {
        let Some(socket) = sockets.into_iter().next().map(Arc::new) else { return };
        // It says who it is when it begins; before that it has ended when its socket did.
        self.origin.process = None;
        self.origin.socket = Arc::clone(&socket);
        *self.front.lock().unwrap_or_else(PoisonError::into_inner) = socket;
        if self.strangers == 0 {
            self.say_standing();
        }
    }

    fn learn(&mut self, message: DataMessage, sockets: Vec<OwnedFd>) {
        match message {
            DataMessage::Introduce { connections, last } => {
                for (seat, socket) in connections.into_iter().zip(sockets) {
                    self.sit(seat, socket);
                }
                if last && self.strangers > 0 {
                    self.strangers -= 1;
                    if self.strangers == 0 {
                        self.stand();
                    }
                }
            }
            DataMessage::Closed { connections } => {
                for connection in connections {
                    let Some(&slot) = self.seated.get(&connection) else { continue };
                    let Place { worker, place } = self.place(slot);
                    if self.prepared.workers[worker].bench.leave(place) {
                        self.seated.remove(&connection);
                    }
                }
            }
            message => log::warn!("told something out of turn, which is ignored: {message:?}"),
        }
    }

    fn place(&self, slot: SlotIndex) -> Place {
        Place::of(slot, self.prepared.shared.workers)
    }

    fn sit(&mut self, seat: Seat, socket: OwnedFd) {
        let Seat { adopted, slot } = seat;
        if self.seated.contains_key(&adopted.connection) {
            return;
        }
        let Place { worker, place } = self.place(slot);
        match self.prepared.workers[worker].bench.sit(place, seat, socket) {
            Ok(left) => {
                left.and_then(|left| self.seated.remove(&left));
                self.seated.insert(adopted.connection, slot);
            }
            Err(late) => self.late.push(late),
        }
    }

    /// All clients are known: from now on this process alone is enough to keep them.
    fn stand(&mut self) {
        let segment = &self.prepared.shared.segment;
        if let Ok(header) = segment.header() {
            segment.memory().store(&header.standby_stands, u64::from(std::process::id()));
        }
        self.say_standing();
    }

    fn say_standing(&self) {
        // One that is gone need not be told.
        let _ = control::send(self.origin.socket.as_fd(), &DataMessage::Standing, &[]);
    }

    /// Takes what the dead data server had told by its death.
    fn hear_out(&mut self, link: &OwnedFd) {
        loop {
            match control::try_receive::<DataMessage>(link.as_fd()) {
                Ok(Some((DataMessage::NewFront, sockets))) => self.meet(sockets),
                Ok(Some((message, sockets))) => self.learn(message, sockets),
                Ok(None) | Err(ControlError::Passing(PassingError::WouldBlock)) => return,
                Err(error) => log::error!("data server: {error}"),
            }
        }
    }

    /// The workers serve; now all else of a data server is started.
    fn into_server(mut self, options: &ServerOptions, began: Instant) -> anyhow::Result<Server> {
        let shared = &self.prepared.shared;
        shared.connections.fetch_add(self.seated.len() as u64, Ordering::Relaxed);
        self.seated.extend(self.late.iter().map(|client| (client.adopted.connection, client.index)));
        let mut server = Server::new(options, self.prepared, self.origin, Begin::Later, &self.seated)?;
        self.late.into_iter().for_each(|client| server.seat_late(client));
        server.say_holds(self.seated.into_keys().collect());
        server.say_ready(StartKind::Attached, began, &[])?;
        Ok(server)
    }
}

/// The last thread of who died has much to give back; a client that is to be answered may have been put behind it.
fn let_dead_give_way(pid: u32) {
    if let Err(error) = priority::give_way_if_ending(pid) {
        log::debug!("the dead server {pid} takes what it needs of the cores: {error}");
    }
}

/// What the watching thread does when the data server that serves dies.
struct TakingOver {
    options: ServerOptions,
    addresses: (String, String),
    dead: LivenessPage,
    shared: Arc<Shared>,
    front: Arc<Mutex<Arc<OwnedFd>>>,
}

impl TakingOver {
    /// Only the standby that the dead data server had named may go on. One that was launched by a front server which died before
    /// it could say so is known to nobody, and others may take over.
    fn check_designation(&self) -> anyhow::Result<()> {
        let named = &self.shared.segment.header()?.standby_process;
        let own = ProcessIdentity::current().context("can't learn my own start time")?;
        let is_own = named[0].load() == u64::from(own.pid) && named[1].load() == own.start_time;
        anyhow::ensure!(is_own, "the data server died before it had named this standby; another one goes on");
        Ok(())
    }

    /// Waits, and takes over; gives the time at which the death was noticed, and who gives way.
    fn run(self) -> anyhow::Result<(Instant, [u32; 2])> {
        // The dead one's last thread may be on its core.
        if let Err(error) = priority::go_first_from_now_on() {
            log::debug!("a death will be noticed a little later: {error}");
            self.shared.come_forward();
        }
        let _alive = self.shared.liveness.claim(SLOT)?;
        self.dead.await_death(MAIN_SLOT)?;
        let noticed = Instant::now();
        self.dead.await_all_dead()?;
        self.check_designation()?;
        let header = self.shared.segment.header()?;
        let dead = header.data_process[0].load() as u32;
        let_dead_give_way(dead);
        let served = start::take_over(&self.shared.table, &self.options.name)?;
        // Nobody else has, and no worker looks before it begins.
        let _ = self.shared.served.set(served);
        self.shared.claim()?;
        self.shared.inherit_clients();
        let (tcp_address, unix_path) = &self.addresses;
        start::introduce(&self.shared.segment, &self.options, None, (tcp_address, unix_path), true)?;
        let front = Arc::clone(&self.front.lock().unwrap_or_else(PoisonError::into_inner));
        self.shared.begin(front);
        // Both may have died at the same instant.
        let front = header.front_process[0].load() as u32;
        let_dead_give_way(front);
        log::debug!("{:?} from the death to the workers", noticed.elapsed());
        Ok((noticed, [dead, front]))
    }
}
