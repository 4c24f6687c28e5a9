//! The main thread: starts the others, then does what the front server says until it says stop. One that is gone is replaced
//! meanwhile; what it had sent before is done first.

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::{Context as _, bail, ensure};
use crossbeam_channel::{Receiver, Sender};
use kvs_core::backup::gate::Gate;
use kvs_core::connection::context::Statistics;
use kvs_core::connection::resume;
use kvs_core::connection::slot::SlotIndex;
use kvs_core::control::{
    self, Adopted, CLIENTS_MAX, ClientInfo, ControlError, DataMessage, FrontMessage, HOLDS_MAX, Role, Seat,
    StartKind,
};
use kvs_core::limits::{CONNECTIONS_MAX_LIMIT, WORKER_THREADS_MAX};
use kvs_core::liveness::{LivenessError, LivenessPage, MAIN_SLOT};
use kvs_core::session::Sessions;
use kvs_core::sys::priority::{BREATH, Rank};
use kvs_core::sys::process::ProcessIdentity;
use kvs_core::table::Table;
use kvs_core::wire::{self, ErrorCode, Response, ResponseBody};
use kvs_front::estate::Estate;
use kvs_front::options::ServerOptions;
use rustix::net::{SendFlags, Shutdown};

use crate::backup::{self, Backup, Begin};
use crate::bench::{self, Place, Seated};
use crate::heartbeat::Heartbeat;
use crate::housekeeping::Housekeeping;
use crate::shared::Shared;
use crate::standby::{self, Watched};
use crate::start::{self, Started, Told};
use crate::watch_front::{Fronts, Origin, Own, QuitSignal, StandbyPeer};
use crate::worker::{self, Command, WorkerHandle};

/// Serves until told to stop.
///
/// # Errors
/// Why it could not start, or had to end.
pub fn run(options: &ServerOptions, begun: Instant) -> anyhow::Result<()> {
    let control = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)
        .context("standard input is no socket; kvs-data is started by kvs-front")?;
    let (liveness, told, origin, watched) = receive_start(control)?;
    // Before anything shared is touched: from here on the front server can prove this thread dead.
    let _alive = match liveness.claim(MAIN_SLOT) {
        Ok(hold) => hold,
        Err(error @ LivenessError::Fenced) => bail!(error),
        Err(error) => return Err(error.into()),
    };
    log::debug!("front server {} launched this data server", told.front);
    let control = Arc::clone(&origin.socket);
    let begun = match watched {
        None => begin(options, told, liveness, origin, begun),
        Some(watched) => match standby::stand(options, told, liveness, origin, watched, begun) {
            Ok(Some(server)) => Ok(server),
            Ok(None) => return Ok(()),
            Err(error) => Err(error),
        },
    };
    match begun {
        Ok(server) => server.serve(),
        Err(error) => {
            let message = format!("{error:#}");
            // It may be gone; the log has it too.
            let _ = control::send(control.as_fd(), &DataMessage::Failed { message }, &[]);
            Err(error)
        }
    }
}

fn receive_start(socket: OwnedFd) -> anyhow::Result<(LivenessPage, Told, Origin, Option<Watched>)> {
    let quit = QuitSignal::catch().context("can't wait for signals")?;
    let Some((message, descriptors)) = control::receive::<FrontMessage>(socket.as_fd())? else {
        bail!("the front server is gone");
    };
    let FrontMessage::Start { front, group, tcp_address, unix_path, role, estate } = message else {
        bail!("the front server began with something else than Start; are both of the same release?");
    };
    let mut descriptors = descriptors.into_iter();
    let estate =
        Estate::receive(estate, &mut descriptors).context("a listening socket is missing from Start")?;
    let mut next = || descriptors.next().context("a descriptor is missing from Start");
    let (process, alive) = (next()?, next()?);
    let liveness = LivenessPage::attach(next()?).context("can't map the liveness page")?;
    let segment = if role.descriptors() == 0 { None } else { Some(next()?) };
    let mut epolls = Vec::new();
    let watched = match role {
        Role::First | Role::Heir => None,
        Role::Successor { workers } => {
            epolls = (0..workers).map(|_| next()).collect::<Result<_, _>>()?;
            None
        }
        Role::Standby => {
            let page = next()?;
            let liveness = LivenessPage::attach(page).context("can't map the other's liveness page")?;
            Some(Watched { liveness, link: next()? })
        }
    };
    let inherits = role != Role::First;
    let told = Told { front, tcp_address, unix_path, segment, epolls, inherits };
    let socket = Arc::new(socket);
    let process = Some(Arc::new(process));
    Ok((liveness, told, Origin { socket, front, process, alive: Some(alive), group, estate, quit }, watched))
}

/// A data server that is ready to serve but for the segment, which another one may be serving.
pub struct Prepared {
    /// What all its threads see.
    pub shared: Arc<Shared>,
    /// Calls of the backup thread.
    pub called: Receiver<()>,
    /// The workers, which wait until they may [begin](Shared::begin).
    pub workers: Vec<WorkerHandle>,
    threads: Vec<JoinHandle<()>>,
}

impl Prepared {
    /// Prepares to serve the table, with a worker for each of `epolls`.
    ///
    /// # Errors
    /// When there is no memory, descriptor or thread to be had.
    pub fn new(
        options: &ServerOptions,
        table: &Table,
        liveness: LivenessPage,
        begun: Instant,
        rank: Option<Rank>,
        epolls: Vec<OwnedFd>,
    ) -> anyhow::Result<Self> {
        let workers = epolls.len();
        let is_possible = (1..=WORKER_THREADS_MAX).contains(&workers);
        ensure!(is_possible, "{workers} workers can't be; are both servers of the same release?");
        let (calls, called) = crossbeam_channel::bounded(1);
        let shared = Arc::new(Shared {
            name: options.name.clone(),
            sessions: Sessions::default(),
            table: table.backed_up(),
            gate: Gate::new(backup::acknowledge(options.durability)),
            calls,
            wakes: (0..workers).map(|_| worker::wake()).collect::<Result<_, _>>()?,
            epolls,
            backup_path: options.backup_path(),
            liveness,
            workers,
            value_bytes_max: options.max_value.0,
            connections: AtomicU64::new(0),
            free_slots: Mutex::default(),
            served: OnceLock::new(),
            unsettled: AtomicU64::new(0),
            front_at_begin: OnceLock::new(),
            begun,
            crowded_until_ms: AtomicU64::new(0),
            rank,
            segment: table.segment().clone(),
        });
        let started = (0..workers).map(|index| WorkerHandle::start(&shared, index));
        let (workers, threads) = started.collect::<anyhow::Result<Vec<_>>>()?.into_iter().unzip();
        Ok(Self { shared, called, workers, threads })
    }
}

/// Items after which whoever waits for the core gets it.
const ITEMS_AT_ONCE: usize = 256;

/// The same, but others get the core in between, if there are any: clients wait for their answers while a data server that took over
/// counts its thousands. One whose workers have not begun has nobody to wait for it.
pub fn considerate<T>(is_served: bool, items: impl Iterator<Item = T>) -> impl Iterator<Item = T> {
    items.enumerate().map(move |(index, item)| {
        if is_served && index % ITEMS_AT_ONCE == ITEMS_AT_ONCE - 1 {
            std::thread::sleep(BREATH);
        }
        item
    })
}

/// The data server, as its main thread has it.
pub struct Server {
    shared: Arc<Shared>,
    workers: Vec<WorkerHandle>,
    threads: Vec<JoinHandle<()>>,
    housekeeping: Housekeeping,
    backup: Backup,
    fronts: Fronts,
    /// The link to the standby.
    standby: Option<Arc<OwnedFd>>,
    /// Slots of clients of the data server before, by the number of the connection, whose sockets nobody has passed yet.
    unclaimed: HashMap<u64, SlotIndex>,
    /// Sockets of that time may still be passed.
    is_restoring: bool,
    /// The main thread still gives way to others, as a standby's does.
    gives_way: bool,
}

fn begin(
    options: &ServerOptions,
    mut told: Told,
    liveness: LivenessPage,
    origin: Origin,
    begun: Instant,
) -> anyhow::Result<Server> {
    let (inherits, mut epolls) = (told.inherits, std::mem::take(&mut told.epolls));
    if epolls.is_empty() {
        epolls = worker::epolls(options.worker_count())?;
    }
    let Started { segment, table, start, begin, served } = start::open(options, told)?;
    let prepared = Prepared::new(options, &table, liveness, begun, None, epolls)?;
    // Nobody else has, and no worker looks before it begins.
    let _ = prepared.shared.served.set(served);
    prepared.shared.claim()?;
    if inherits {
        prepared.shared.inherit_clients();
    }
    let front = Arc::clone(&origin.socket);
    // Before the workers are told the same.
    let speaking = bench::speaking(&prepared.shared.epolls);
    let server = Server::new(options, prepared, origin, begin, &HashMap::new())?;
    server.shared.begin(front);
    drop(segment);
    server.say_ready(start, begun, &speaking)?;
    Ok(server)
}

impl Server {
    /// One whose workers may serve, or serve already. `seated` are the clients that they have, with their slots.
    ///
    /// # Errors
    /// When there is no thread or descriptor to be had, or the backup file can't be used.
    pub fn new(
        options: &ServerOptions,
        prepared: Prepared,
        origin: Origin,
        begin: Begin,
        seated: &HashMap<u64, SlotIndex>,
    ) -> anyhow::Result<Self> {
        let Prepared { shared, called, workers, threads } = prepared;
        let is_restoring = shared.unsettled.load(Ordering::Acquire) > 0;
        let survivors = if is_restoring { resume::survivors(&shared.segment)? } else { Vec::new() };
        // The workers free those of the clients that they have, or begin to use them: perhaps they have already.
        let mut is_taken = vec![false; shared.segment.header()?.connection_slots_reserved.load() as usize];
        let is_served = shared.has_begun();
        for index in considerate(is_served, survivors.iter().map(|(_, index)| index).chain(seated.values())) {
            is_taken.get_mut(*index as usize).into_iter().for_each(|taken| *taken = true);
        }
        // The lowest goes first.
        let free = (0u64..).zip(is_taken).filter(|(_, taken)| !taken).map(|(index, _)| index);
        let mut free: Vec<u64> = free.collect();
        free.reverse();
        shared.free_slots.lock().unwrap_or_else(std::sync::PoisonError::into_inner).splice(0..0, free);
        let unclaimed = considerate(is_served, survivors.into_iter())
            .filter(|(connection, _)| !seated.contains_key(connection))
            .collect();
        let backup = Backup::start(&shared, options.backup_path(), options.durability, begin, called)?;
        let segment = start::descriptor(&shared.segment)?;
        let own = Own {
            options: options.clone(),
            liveness: shared.liveness.clone(),
            segment,
            workers: shared.workers,
        };
        let fronts =
            Fronts::new(Arc::clone(&shared), own, origin, Heartbeat::start(&shared, options.hang_timeout)?);
        let housekeeping = Housekeeping::start(&shared)?;
        Ok(Self {
            gives_way: shared.rank.is_some(),
            shared,
            workers,
            threads,
            housekeeping,
            backup,
            fronts,
            standby: None,
            unclaimed,
            is_restoring,
        })
    }

    /// Tells the front server, should there be one, that it serves; and whose sockets it wants first, the `speaking` ones among them.
    ///
    /// # Errors
    /// When `/proc` can't be read, or no descriptors are left.
    pub fn say_ready(&self, start: StartKind, begun: Instant, speaking: &[u64]) -> anyhow::Result<()> {
        let ready = DataMessage::Ready {
            process: ProcessIdentity::current()?,
            entries: self.shared.table.totals().entries,
            start,
            took_us: u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX),
            waiting: self
                .served_elsewhere()
                .into_iter()
                .chain(speaking.iter().copied())
                .take(HOLDS_MAX)
                .collect(),
        };
        let file = start::descriptor(&self.shared.segment)?;
        match control::send(self.fronts.socket().as_fd(), &ready, &[file.as_fd()]) {
            // One that is gone is replaced by one that need not be told.
            Ok(()) | Err(ControlError::Passing(_)) => {}
            Err(error) => return Err(error.into()),
        }
        self.lend_epolls();
        Ok(())
    }

    /// Connections that were just being served, and whose sockets nobody has passed yet.
    fn served_elsewhere(&self) -> Vec<u64> {
        let Some(served) = self.shared.served.get().filter(|served| !served.is_empty()) else {
            return Vec::new();
        };
        let served: HashSet<SlotIndex> = served.iter().copied().collect();
        let unclaimed = self.unclaimed.iter().filter(|(_, slot)| served.contains(slot));
        unclaimed.map(|(connection, _)| *connection).collect()
    }

    /// Has the front server keep the workers' epolls for the next data server.
    fn lend_epolls(&self) {
        let lent = DataMessage::Epolls { workers: self.worker_count() };
        if let Err(error) = control::send(self.fronts.socket().as_fd(), &lent, &self.epolls()) {
            log::debug!("the next data server will register all clients anew: {error}");
        }
    }

    fn worker_count(&self) -> u32 {
        // There are fewer than a hundred.
        self.shared.workers as u32
    }

    fn epolls(&self) -> Vec<BorrowedFd<'_>> {
        self.shared.epolls.iter().map(AsFd::as_fd).collect()
    }

    /// Tells the front server whose sockets this data server has.
    pub fn say_holds(&self, numbers: Vec<u64>) {
        for connections in numbers.chunks(HOLDS_MAX) {
            self.fronts.tell(&DataMessage::Holds { connections: connections.to_vec() });
        }
    }
}

impl Server {
    /// Serves until told to stop.
    ///
    /// # Errors
    /// A worker panicked.
    pub fn serve(mut self) -> anyhow::Result<()> {
        loop {
            match self.fronts.hear() {
                Some((FrontMessage::Stop, _)) => return self.stop(),
                Some((message, sockets)) => self.obey(message, sockets),
                None if self.replace_front() => {
                    self.introduce_clients();
                    self.lend_epolls();
                    // It knows nobody whom this data server doesn't.
                    self.settle();
                }
                None => {
                    log::info!("ending");
                    self.fronts.remove_socket_files();
                    return self.stop();
                }
            }
        }
    }

    /// Whoever is launched has the rank of this thread, and everybody waits for a front server.
    fn replace_front(&mut self) -> bool {
        self.come_forward();
        self.shared.make_way();
        self.fronts.replace()
    }

    fn come_forward(&mut self) {
        if std::mem::take(&mut self.gives_way) {
            self.shared.come_forward();
        }
    }

    fn obey(&mut self, message: FrontMessage, sockets: Vec<OwnedFd>) {
        match message {
            FrontMessage::Adopt { connections } => self.adopt(connections, sockets),
            FrontMessage::Restored => self.settle(),
            FrontMessage::Introduce => self.introduce_clients(),
            FrontMessage::Standby { process } => self.welcome(process, sockets),
            FrontMessage::NoStandby => self.dismiss_standby(),
            FrontMessage::Watching { front, group } => {
                self.fronts.know(front, group, sockets);
            }
            FrontMessage::Stats { ticket } => {
                let statistics = self.shared.statistics();
                self.fronts.tell(&DataMessage::Stats { ticket, statistics });
            }
            FrontMessage::Clients { ticket } => self.tell_clients(ticket),
            message => log::warn!("told something out of turn, which is ignored: {message:?}"),
        }
    }

    /// Lets every worker give the new front server duplicates of its clients' sockets.
    fn introduce_clients(&self) {
        for worker in &self.workers {
            worker.send(Command::IntroduceToFront { socket: self.fronts.socket() });
        }
    }

    /// From now on a standby is told of all clients.
    fn welcome(&mut self, process: ProcessIdentity, descriptors: Vec<OwnedFd>) {
        let Some(peer) = StandbyPeer::new(process, descriptors) else {
            log::error!("the standby {process} can't be told of clients: its liveness page can't be mapped");
            return;
        };
        let link = Arc::clone(&peer.link);
        let active = DataMessage::Active { workers: self.worker_count() };
        if let Err(error) = control::send(link.as_fd(), &active, &self.epolls()) {
            log::debug!("can't tell standby {process}: {error}");
            return;
        }
        if let Ok(header) = self.shared.segment.header() {
            let memory = self.shared.segment.memory();
            memory.store(&header.standby_stands, 0);
            memory.store(&header.standby_process[0], 0);
            memory.store(&header.standby_process[1], process.start_time);
            // From now on it takes over.
            memory.store(&header.standby_process[0], u64::from(process.pid));
        }
        self.fronts.set_standby(Some(peer));
        for worker in &self.workers {
            worker.send(Command::IntroduceToStandby { socket: Arc::clone(&link) });
        }
        self.standby = Some(link);
    }

    fn dismiss_standby(&mut self) {
        self.fronts.set_standby(None);
        self.standby = None;
        if let Ok(header) = self.shared.segment.header() {
            self.shared.segment.memory().store(&header.standby_process[0], 0);
            self.shared.segment.memory().store(&header.standby_stands, 0);
        }
    }

    /// Gives each client a slot, and to the worker whose slot that is.
    fn adopt(&mut self, connections: Vec<Adopted>, sockets: Vec<OwnedFd>) {
        if connections.len() != sockets.len() {
            log::error!("{} clients came with {} sockets", connections.len(), sockets.len());
        }
        let mut clients = Vec::with_capacity(sockets.len());
        for (adopted, socket) in connections.into_iter().zip(sockets) {
            let known = self.unclaimed.remove(&adopted.connection);
            match known.or_else(|| self.claim_slot()) {
                Some(slot) => clients.push(Seated::new(Seat { adopted, slot }, true, socket)),
                None => self.refuse(adopted, &socket),
            }
        }
        self.seat(clients, !self.is_restoring);
        // After a take-over those who are connected go first, until somebody waits for this thread.
        if !self.is_restoring {
            self.come_forward();
        }
    }

    /// Tells the standby of clients, then gives each to a worker: nobody is served who is lost with this process and the front
    /// server.
    fn seat(&mut self, clients: Vec<Seated>, is_new: bool) {
        if let Some(link) = &self.standby {
            let connections = clients.iter().map(Seated::seat).collect();
            let introduced = DataMessage::Introduce { connections, last: false };
            let sockets: Vec<BorrowedFd<'_>> = clients.iter().map(|client| client.socket.as_fd()).collect();
            if let Err(error) = control::send(link.as_fd(), &introduced, &sockets) {
                log::debug!("the standby takes no more clients: {error}");
                // It ends, for it isn't told any longer, and the front server launches another.
                self.dismiss_standby();
            }
        }
        self.shared.connections.fetch_add(clients.len() as u64, Ordering::Relaxed);
        let mut shares: Vec<Vec<Seated>> = self.workers.iter().map(|_| Vec::new()).collect();
        for client in clients {
            shares[Place::of(client.index, self.workers.len()).worker].push(client);
        }
        for (worker, clients) in self.workers.iter().zip(shares) {
            if !clients.is_empty() {
                worker.send(Command::Adopt { clients, is_new });
            }
        }
    }

    /// Takes up a client of the data server before that a standby was told of late.
    pub fn seat_late(&mut self, client: Seated) {
        self.unclaimed.remove(&client.adopted.connection);
        self.seat(vec![client], false);
    }

    /// Clients of the data server before that nobody has passed by now are gone.
    fn settle(&mut self) {
        if !std::mem::take(&mut self.is_restoring) {
            return;
        }
        for (connection, index) in self.unclaimed.drain() {
            log::debug!("connection {connection} is gone with those who had its socket");
            self.workers[0].send(Command::Release { index });
        }
        for worker in &self.workers {
            worker.send(Command::Settle);
        }
    }

    fn claim_slot(&self) -> Option<u64> {
        let free = self.shared.free_slots.lock().unwrap_or_else(std::sync::PoisonError::into_inner).pop();
        if free.is_some() {
            return free;
        }
        let next = self.shared.segment.header().ok()?.connection_slots_reserved.load();
        if next >= u64::from(CONNECTIONS_MAX_LIMIT) {
            return None;
        }
        // Memory comes by the page: the other slots of it are free from now on, too.
        self.shared.segment.claim_connection(next).ok()?;
        let reserved = self.shared.segment.header().ok()?.connection_slots_reserved.load();
        let mut free = self.shared.free_slots.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        free.extend((next + 1..reserved).rev());
        Some(next)
    }

    fn refuse(&self, adopted: Adopted, socket: &OwnedFd) {
        let mut bytes = Vec::new();
        let message = "no memory for another connection: /dev/shm is full; free some room there";
        let body = ResponseBody::Error { code: ErrorCode::StoreFull, message };
        wire::encode_response(&mut bytes, &Response { number: 0, body });
        // A client that is gone already needs no answer.
        let _ = rustix::net::send(socket, &bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        let _ = rustix::net::shutdown(socket, Shutdown::Both);
        self.fronts.tell(&DataMessage::Closed { connections: vec![adopted.connection] });
    }

    fn tell_clients(&self, ticket: u32) {
        let (reply, answers): (Sender<Vec<ClientInfo>>, Receiver<_>) = crossbeam_channel::unbounded();
        for worker in &self.workers {
            worker.send(Command::Clients { reply: reply.clone() });
        }
        drop(reply);
        let mut clients: Vec<ClientInfo> = answers.iter().flatten().collect();
        clients.sort_unstable_by_key(|client| client.connection);
        while clients.len() > CLIENTS_MAX {
            let rest = clients.split_off(CLIENTS_MAX);
            self.fronts.tell(&DataMessage::Clients { ticket, clients, last: false });
            clients = rest;
        }
        self.fronts.tell(&DataMessage::Clients { ticket, clients, last: true });
    }

    /// Lets every worker finish what it serves, and ends.
    fn stop(mut self) -> anyhow::Result<()> {
        // It would take over, when this process ends.
        self.fronts.end_standby();
        self.dismiss_standby();
        for worker in &self.workers {
            worker.send(Command::Stop);
        }
        for thread in self.threads {
            thread.join().map_err(|_| anyhow::anyhow!("a worker panicked"))?;
        }
        self.housekeeping.stop();
        self.backup.stop();
        let header = self.shared.segment.header()?;
        self.shared.segment.memory().store(&header.clean, 1);
        self.fronts.tell(&DataMessage::Stopped);
        Ok(())
    }
}
