//! The main thread: starts the others, then does what the front server says until it says stop or is gone.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
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
use kvs_core::sys::process::ProcessIdentity;
use kvs_core::wire::{self, ErrorCode, Response, ResponseBody};
use kvs_front::options::ServerOptions;
use rustix::net::{SendFlags, Shutdown};

use crate::backup::{self, Backup};
use crate::housekeeping::Housekeeping;
use crate::shared::Shared;
use crate::start::{self, Started, Told};
use crate::worker::{self, Command, WorkerHandle};

/// Serves until told to stop.
///
/// # Errors
/// Why it could not start, or had to end.
pub fn run(options: &ServerOptions, begun: Instant) -> anyhow::Result<()> {
    let control = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)
        .context("standard input is no socket; kvs-data is started by kvs-front")?;
    let (liveness, told) = receive_start(control.as_fd())?;
    // Before anything shared is touched: from here on the front server can prove this thread dead.
    let _alive = match liveness.claim(MAIN_SLOT) {
        Ok(hold) => hold,
        Err(error @ LivenessError::Fenced) => bail!(error),
        Err(error) => return Err(error.into()),
    };
    log::debug!("front server {} launched this data server", told.front);
    match begin(options, told, liveness, control.try_clone()?, begun) {
        Ok(server) => server.serve(),
        Err(error) => {
            let message = format!("{error:#}");
            control::send(control.as_fd(), &DataMessage::Failed { message }, &[])?;
            Err(error)
        }
    }
}

fn receive_start(control: BorrowedFd<'_>) -> anyhow::Result<(LivenessPage, Told)> {
    let Some((message, descriptors)) = control::receive::<FrontMessage>(control)? else {
        bail!("the front server is gone");
    };
    let FrontMessage::Start { front, tcp_address, unix_path, relaunched } = message else {
        bail!("the front server began with something else than Start; are both of the same release?");
    };
    let mut descriptors = descriptors.into_iter();
    let page = descriptors.next().context("the liveness page is missing from Start")?;
    let liveness = LivenessPage::attach(page).context("can't map the liveness page")?;
    Ok((liveness, Told { front, tcp_address, unix_path, relaunched, segment: descriptors.next() }))
}

struct Server {
    shared: Arc<Shared>,
    workers: Vec<WorkerHandle>,
    threads: Vec<JoinHandle<()>>,
    housekeeping: Housekeeping,
    backup: Backup,
    next_worker: usize,
}

fn begin(
    options: &ServerOptions,
    told: Told,
    liveness: LivenessPage,
    control: OwnedFd,
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
        table: table.backed_up(),
        gate: Gate::new(backup::acknowledge(options.durability)),
        calls,
        wakes: (0..workers).map(|_| worker::wake()).collect::<Result<_, _>>()?,
        backup_path: options.backup_path(),
        liveness,
        control,
        workers,
        value_bytes_max: options.max_value.0,
        connections: AtomicU64::new(0),
        free_slots: Mutex::new((0..reserved).rev().collect()),
        begun,
        segment,
    });
    let backup = Backup::start(&shared, options.backup_path(), options.durability, begin, called)?;
    let mut threads = Vec::new();
    let mut handles = Vec::new();
    for index in 0..workers {
        let (handle, thread) = WorkerHandle::start(&shared, index)?;
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
    let file = start::descriptor(&shared.segment)?;
    control::send(shared.control.as_fd(), &ready, &[file.as_fd()])?;
    Ok(Server { shared, workers: handles, threads, housekeeping, backup, next_worker: 0 })
}

impl Server {
    fn serve(mut self) -> anyhow::Result<()> {
        loop {
            match control::receive::<FrontMessage>(self.shared.control.as_fd()) {
                Ok(Some((FrontMessage::Adopt { connections }, sockets))) => self.adopt(connections, sockets),
                Ok(Some((FrontMessage::Stats { ticket }, _))) => {
                    let statistics = self.shared.statistics();
                    self.tell(&DataMessage::Stats { ticket, statistics });
                }
                Ok(Some((FrontMessage::Clients { ticket }, _))) => self.tell_clients(ticket),
                Ok(Some((FrontMessage::Stop, _))) => return self.stop(true),
                Ok(Some((FrontMessage::Start { .. }, _))) => log::warn!("told to start twice; ignored"),
                Ok(None) => {
                    log::warn!("the front server is gone; ending, the segment stays");
                    return self.stop(false);
                }
                Err(error) => log::error!("{error}"),
            }
        }
    }

    fn tell(&self, message: &DataMessage) {
        if let Err(error) = control::send(self.shared.control.as_fd(), message, &[]) {
            log::warn!("can't tell the front server: {error}");
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
        self.tell(&DataMessage::Closed { connections: vec![adopted.connection] });
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
            self.tell(&DataMessage::Clients { ticket, clients, last: false });
            clients = rest;
        }
        self.tell(&DataMessage::Clients { ticket, clients, last: true });
    }

    /// Lets every worker finish what it serves, and ends.
    fn stop(self, told: bool) -> anyhow::Result<()> {
        for worker in &self.workers {
            worker.send(Command::Stop);
        }
        for thread in self.threads {
            thread.join().map_err(|_| anyhow::anyhow!("a worker panicked"))?;
        }
        self.housekeeping.stop();
        self.backup.stop();
        if told {
            let header = self.shared.segment.header()?;
            self.shared.segment.memory().store(&header.clean, 1);
            match control::send(self.shared.control.as_fd(), &DataMessage::Stopped, &[]) {
                Ok(()) | Err(ControlError::Passing(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}
