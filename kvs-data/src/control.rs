//! The main thread: starts the others, then does what the front server says until it says stop. One that is gone is replaced
//! meanwhile; what it had sent before is done first.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::{Context as _, bail};
use crossbeam_channel::{Receiver, Sender};
use kvs_core::backup::gate::Gate;
use kvs_core::connection::context::Statistics;
use kvs_core::control::{self, Adopted, CLIENTS_MAX, ClientInfo, ControlError, DataMessage, FrontMessage};
use kvs_core::limits::CONNECTIONS_MAX_LIMIT;
use kvs_core::liveness::{LivenessError, LivenessPage, MAIN_SLOT};
use kvs_core::session::Sessions;
use kvs_core::sys::process::ProcessIdentity;
use kvs_core::wire::{self, ErrorCode, Response, ResponseBody};
use kvs_front::estate::Estate;
use kvs_front::options::ServerOptions;
use rustix::net::{SendFlags, Shutdown};

use crate::backup::{self, Backup};
use crate::heartbeat::Heartbeat;
use crate::housekeeping::Housekeeping;
use crate::shared::Shared;
use crate::start::{self, Started, Told};
use crate::watch_front::{Fronts, Origin, Own, QuitSignal};
use crate::worker::{self, Command, WorkerHandle};

/// Serves until told to stop.
///
/// # Errors
/// Why it could not start, or had to end.
pub fn run(options: &ServerOptions, begun: Instant) -> anyhow::Result<()> {
    let control = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)
        .context("standard input is no socket; kvs-data is started by kvs-front")?;
    let (liveness, told, origin) = receive_start(control)?;
    let control = origin.socket.try_clone()?;
    // Before anything shared is touched: from here on the front server can prove this thread dead.
    let _alive = match liveness.claim(MAIN_SLOT) {
        Ok(hold) => hold,
        Err(error @ LivenessError::Fenced) => bail!(error),
        Err(error) => return Err(error.into()),
    };
    log::debug!("front server {} launched this data server", told.front);
    match begin(options, told, liveness, origin, begun) {
        Ok(server) => server.serve(),
        Err(error) => {
            let message = format!("{error:#}");
            // It may be gone; the log has it too.
            let _ = control::send(control.as_fd(), &DataMessage::Failed { message }, &[]);
            Err(error)
        }
    }
}

fn receive_start(socket: OwnedFd) -> anyhow::Result<(LivenessPage, Told, Origin)> {
    let quit = QuitSignal::catch().context("can't wait for signals")?;
    let Some((message, descriptors)) = control::receive::<FrontMessage>(socket.as_fd())? else {
        bail!("the front server is gone");
    };
    let FrontMessage::Start { front, group, tcp_address, unix_path, relaunched, estate } = message else {
        bail!("the front server began with something else than Start; are both of the same release?");
    };
    let mut descriptors = descriptors.into_iter();
    let estate =
        Estate::receive(estate, &mut descriptors).context("a listening socket is missing from Start")?;
    let process = descriptors.next().context("the front server's process is missing from Start")?;
    let page = descriptors.next().context("the liveness page is missing from Start")?;
    let liveness = LivenessPage::attach(page).context("can't map the liveness page")?;
    let told = Told { front, tcp_address, unix_path, relaunched, segment: descriptors.next() };
    Ok((liveness, told, Origin { socket, front, process, group, estate, quit }))
}

struct Server {
    shared: Arc<Shared>,
    workers: Vec<WorkerHandle>,
    threads: Vec<JoinHandle<()>>,
    housekeeping: Housekeeping,
    backup: Backup,
    fronts: Fronts,
    next_worker: usize,
}

fn begin(
    options: &ServerOptions,
    told: Told,
    liveness: LivenessPage,
    origin: Origin,
    begun: Instant,
) -> anyhow::Result<Server> {
    let Started { segment, table, start, begin } = start::open(options, told)?;
    let workers = options.worker_count();
    segment.claim_worker(workers as u64)?;
    segment.claim_ring(workers as u64 - 1)?;
    let reserved = segment.header()?.connection_slots_reserved.load();
    let (calls, called) = crossbeam_channel::bounded(1);
    let shared = Arc::new(Shared {
        name: options.name.clone(),
        sessions: Sessions::default(),
        table: table.backed_up(),
        gate: Gate::new(backup::acknowledge(options.durability)),
        calls,
        wakes: (0..workers).map(|_| worker::wake()).collect::<Result<_, _>>()?,
        backup_path: options.backup_path(),
        liveness: liveness.clone(),
        workers,
        value_bytes_max: options.max_value.0,
        connections: AtomicU64::new(0),
        free_slots: Mutex::new((0..reserved).rev().collect()),
        begun,
        segment,
    });
    let backup = Backup::start(&shared, options.backup_path(), options.durability, begin, called)?;
    let file = start::descriptor(&shared.segment)?;
    let own = Own { options: options.clone(), liveness, segment: file.try_clone()?, workers };
    let fronts = Fronts::new(own, origin, Heartbeat::start(&shared, options.hang_timeout)?);
    let mut threads = Vec::new();
    let mut handles = Vec::new();
    for index in 0..workers {
        let (handle, thread) = WorkerHandle::start(&shared, index, fronts.socket())?;
        handles.push(handle);
        threads.push(thread);
    }
    let housekeeping = Housekeeping::start(&shared)?;
    let ready = DataMessage::Ready {
        process: ProcessIdentity::current()?,
        entries: shared.table.totals().entries,
        start,
        took_us: u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX),
    };
    match control::send(fronts.socket().as_fd(), &ready, &[file.as_fd()]) {
        // One that is gone is replaced by one that need not be told.
        Ok(()) | Err(ControlError::Passing(_)) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(Server { shared, workers: handles, threads, housekeeping, backup, fronts, next_worker: 0 })
}

impl Server {
    fn serve(mut self) -> anyhow::Result<()> {
        loop {
            match self.fronts.hear() {
                Some((FrontMessage::Stop, _)) => return self.stop(),
                Some((message, sockets)) => self.obey(message, sockets),
                None if self.fronts.replace() => self.introduce_clients(),
                None => {
                    log::info!("ending");
                    self.fronts.remove_socket_files();
                    return self.stop();
                }
            }
        }
    }

    fn obey(&mut self, message: FrontMessage, sockets: Vec<OwnedFd>) {
        match message {
            FrontMessage::Adopt { connections } => self.adopt(connections, sockets),
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
            worker.send(Command::Introduce { front: self.fronts.socket() });
        }
    }

    /// Gives each client to a worker, in turn.
    fn adopt(&mut self, connections: Vec<Adopted>, sockets: Vec<OwnedFd>) {
        if connections.len() != sockets.len() {
            log::error!("{} clients came with {} sockets", connections.len(), sockets.len());
        }
        for (adopted, socket) in connections.into_iter().zip(sockets) {
            match self.claim_slot() {
                Some(index) => {
                    self.shared.connections.fetch_add(1, Ordering::Relaxed);
                    let worker = &self.workers[self.next_worker];
                    worker.send(Command::Adopt { index, adopted, socket });
                    self.next_worker = (self.next_worker + 1) % self.workers.len();
                }
                None => self.refuse(adopted, &socket),
            }
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
    fn stop(self) -> anyhow::Result<()> {
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
