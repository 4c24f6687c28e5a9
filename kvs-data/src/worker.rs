//! One thread of the fixed pool. It waits in its own `epoll` for its own clients; each client is its alone.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use crossbeam_channel::{Receiver, Sender};
use kvs_core::connection::context::Context;
use kvs_core::connection::slot::SlotIndex;
use kvs_core::connection::{Connection, Fatal};
use kvs_core::control::{self, ADOPTED_MAX, Adopted, CLOSED_MAX, ClientInfo, ControlError, DataMessage};
use kvs_core::liveness::FIRST_WORKER_SLOT;
use kvs_core::segment::layout::WorkerSlot;
use kvs_core::sys::fd_passing::PassingError;
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};

use crate::backup::is_half_full;
use crate::client::{Client, Fate};
use crate::shared::Shared;

/// Events taken from the kernel at once.
const EVENTS_MAX: usize = 256;
/// How long a refused client has to read why.
const LINGER: Duration = Duration::from_secs(2);
/// How long clients have to take their last answers when the server ends.
const FAREWELL: Duration = Duration::from_secs(1);
/// Bytes of rings that all workers together keep for silent clients: this part of the capacity.
const RINGS_SHARE: u64 = 64;
/// Most rings one worker keeps for silent clients.
const RINGS_MAX: u64 = 512;
const RING_BYTES: u64 = 32 << 10;
/// Clients looked at in one round for buffers that nobody uses, while too many are held.
const COOLED_MAX: usize = 64;
/// Messages with clients for a new front server in one round.
const INTRODUCTIONS_MAX: usize = 4;
/// Pause before the front server is told again what it had no room for.
const RETRY_PAUSE: Duration = Duration::from_millis(10);
/// Pause between two looks whether a replaced value is still being sent.
const GARBAGE_PAUSE: Duration = Duration::from_millis(50);

/// What the main thread tells a worker.
pub enum Command {
    /// Serve this client.
    Adopt {
        /// Its slot.
        index: SlotIndex,
        /// Who it is.
        adopted: Adopted,
        /// Its socket.
        socket: OwnedFd,
    },
    /// Say who is connected.
    Clients {
        /// To whom.
        reply: Sender<Vec<ClientInfo>>,
    },
    /// Another front server is there; it gets duplicates of all clients' sockets.
    Introduce {
        /// The socket to it.
        front: Arc<OwnedFd>,
    },
    /// Finish and end.
    Stop,
}

/// The main thread's end of a worker.
pub struct WorkerHandle {
    commands: Sender<Command>,
    wake: Arc<OwnedFd>,
}

/// What wakes a worker.
///
/// # Errors
/// When no descriptor is to be had.
pub fn wake() -> anyhow::Result<Arc<OwnedFd>> {
    let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).context("can't make an eventfd")?;
    Ok(Arc::new(wake))
}

impl WorkerHandle {
    /// Starts worker `index`.
    ///
    /// # Errors
    /// When there is no memory, descriptor or thread to be had.
    pub fn start(
        shared: &Arc<Shared>,
        index: usize,
        front: Arc<OwnedFd>,
    ) -> anyhow::Result<(Self, JoinHandle<()>)> {
        let (commands, inbox) = crossbeam_channel::unbounded();
        let wake = Arc::clone(&shared.wakes[index]);
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).context("can't make an epoll")?;
        epoll::add(&epoll, &wake, EventData::new_u64(WAKE), EventFlags::IN)?;
        let offset = shared.segment.claim_worker(index as u64)?;
        let (shared, thread_wake) = (Arc::clone(shared), Arc::clone(&wake));
        let thread = std::thread::Builder::new().name(format!("worker-{index}")).spawn(move || {
            let Ok(_alive) = shared.liveness.claim(FIRST_WORKER_SLOT + index) else { std::process::abort() };
            let Ok(slot) = shared.segment.memory().object(offset) else { std::process::abort() };
            if let Err(fatal) = Worker::new(&shared, (slot, index), epoll, thread_wake, inbox, front).run() {
                log::error!("worker {index}: {fatal}; ending, the next data server recovers");
                std::process::abort();
            }
        });
        Ok((Self { commands, wake }, thread.context("can't start a worker thread")?))
    }

    /// Tells the worker something.
    pub fn send(&self, command: Command) {
        if self.commands.send(command).is_ok() {
            // A full counter wakes it just as well.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }
}

/// Token of the worker's own wake-up; clients have their place in the list.
const WAKE: u64 = u64::MAX;

/// Whether it is for this position of the backup file that the client in `place` waits.
fn is_held(clients: &[Option<Client<'_>>], position: u64, place: usize) -> bool {
    clients[place].as_ref().is_some_and(|client| client.held_until() == Some(position))
}

/// Whether the client in `place` is this one, and waits for room in the backup ring.
fn is_parked(clients: &[Option<Client<'_>>], id: u64, place: usize) -> bool {
    clients[place].as_ref().is_some_and(|client| client.connection().id() == id && client.is_parked())
}

struct Worker<'s> {
    shared: &'s Shared,
    slot: &'s WorkerSlot,
    index: usize,
    context: Context<'s>,
    /// How much of the backup ring the backup thread was called for.
    ring_head: u64,
    /// Those who wait for the backup file to come so far, in the order in which it does. Who is closed meanwhile is left in
    /// the list, and known by the position, for which no other waits.
    held: VecDeque<(u64, usize)>,
    /// Those who have a change for which the backup ring had no room, by number and place. Likewise.
    parked: VecDeque<(u64, usize)>,
    epoll: OwnedFd,
    wake: Arc<OwnedFd>,
    inbox: Receiver<Command>,
    /// The socket to the front server.
    front: Arc<OwnedFd>,
    /// Clients in places from here on are still to be introduced to it.
    strangers_from: Option<usize>,
    /// When the next of them are.
    introduce_at: Instant,
    clients: Vec<Option<Client<'s>>>,
    free: Vec<usize>,
    /// Those who were told why they can't be served, with the time of their end, in its order. Likewise.
    lingering: VecDeque<(Instant, usize)>,
    /// Closed, and the front server doesn't know yet.
    closed: Vec<u64>,
    /// The place that is looked at next for buffers nobody uses.
    hand: usize,
    stop_at: Option<Instant>,
}

impl<'s> Worker<'s> {
    fn new(
        shared: &'s Shared,
        (slot, index): (&'s WorkerSlot, usize),
        epoll: OwnedFd,
        wake: Arc<OwnedFd>,
        inbox: Receiver<Command>,
        front: Arc<OwnedFd>,
    ) -> Self {
        let capacity = shared.segment.regions().capacity_bytes;
        let rings_max = (capacity / RINGS_SHARE / RING_BYTES / shared.workers as u64).clamp(2, RINGS_MAX);
        let context = Context::new(&shared.table, slot, shared, shared.value_bytes_max, rings_max);
        Self {
            shared,
            slot,
            index,
            context: context.behind(&shared.gate, index).with_sessions(&shared.sessions),
            ring_head: slot.ring_head.load(),
            held: VecDeque::new(),
            parked: VecDeque::new(),
            epoll,
            wake,
            inbox,
            front,
            strangers_from: None,
            introduce_at: Instant::now(),
            clients: Vec::new(),
            free: Vec::new(),
            lingering: VecDeque::new(),
            closed: Vec::new(),
            hand: 0,
            stop_at: None,
        }
    }

    fn run(mut self) -> Result<(), Fatal> {
        let mut events = Vec::with_capacity(EVENTS_MAX);
        // A predecessor that died in its turn left an odd one.
        self.set_turn(self.slot.turn.load().next_multiple_of(2));
        loop {
            if self.is_finished() {
                return self.end();
            }
            let timeout = self.timeout();
            match epoll::wait(&self.epoll, spare_capacity(&mut events), timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    log::error!("epoll: {error}");
                    std::process::abort();
                }
            }
            self.set_turn(self.slot.turn.load().wrapping_add(1));
            let mut woken = false;
            for event in events.drain(..) {
                match event.data.u64() {
                    WAKE => woken = true,
                    token => self.serve(token as usize, event.flags)?,
                }
            }
            // Places of closed clients are given away only here, when no event of this round can mean them.
            if woken {
                self.obey()?;
            }
            self.call_backup();
            self.serve_waiting()?;
            // Values that were replaced while they were sent.
            self.shared.table.collect_garbage(self.slot)?;
            self.end_lingering()?;
            self.cool()?;
            self.introduce();
            self.tell_closed();
            self.set_turn(self.slot.turn.load().wrapping_add(1));
        }
    }

    /// Odd while it serves, for whoever watches that it gets on.
    fn set_turn(&self, turn: u64) {
        self.shared.segment.memory().store(&self.slot.turn, turn);
    }

    /// While too many rings are held, takes those of clients that were silent since the hand came by last: thousands
    /// of idle clients cost no buffers, and the busy ones keep theirs.
    fn cool(&mut self) -> Result<(), Fatal> {
        for _ in 0..COOLED_MAX.min(self.clients.len()) {
            if !self.context.holds_many_rings() {
                break;
            }
            self.hand = (self.hand + 1) % self.clients.len();
            if let Some(client) = &mut self.clients[self.hand] {
                client.cool(&mut self.context)?;
            }
        }
        Ok(())
    }

    fn timeout(&self) -> Option<rustix::event::Timespec> {
        let lingering = self.lingering.front().map(|&(until, _)| until).into_iter();
        let garbage = (self.slot.garbage.load() != 0).then_some(GARBAGE_PAUSE);
        let untold = (!self.closed.is_empty()).then_some(RETRY_PAUSE);
        let introduction = self.strangers_from.map(|_| self.introduce_at);
        let retries = garbage.into_iter().chain(untold).map(|pause| Instant::now() + pause);
        let next = lingering.chain(self.stop_at).chain(retries).chain(introduction).min()?;
        let pause = next.saturating_duration_since(Instant::now());
        Some(rustix::event::Timespec {
            tv_sec: pause.as_secs().try_into().unwrap_or(0),
            // A nanosecond too long is no harm, one too short is a busy round.
            tv_nsec: (pause.subsec_nanos() + 1).into(),
        })
    }

    fn obey(&mut self) -> Result<(), Fatal> {
        let mut count = [0u8; 8];
        // Only to reset it; what it says is in the inbox.
        let _ = rustix::io::read(&self.wake, &mut count);
        while let Ok(command) = self.inbox.try_recv() {
            match command {
                Command::Adopt { index, adopted, socket } => self.adopt(index, adopted, socket)?,
                Command::Clients { reply } => {
                    let clients = self.clients.iter().flatten();
                    let infos = clients.map(|client| client.connection().describe()).collect();
                    // The main thread may have stopped listening.
                    let _ = reply.send(infos);
                }
                Command::Introduce { front } => (self.front, self.strangers_from) = (front, Some(0)),
                Command::Stop => self.stop()?,
            }
        }
        Ok(())
    }

    fn adopt(&mut self, index: SlotIndex, adopted: Adopted, socket: OwnedFd) -> Result<(), Fatal> {
        let place = self.free.pop().unwrap_or_else(|| {
            self.clients.push(None);
            self.clients.len() - 1
        });
        let watched = epoll::add(&self.epoll, &socket, EventData::new_u64(place as u64), EventFlags::IN);
        let opened = Connection::open(&self.shared.segment, index, adopted);
        match (watched, opened) {
            (Ok(()), Ok(connection)) => {
                self.clients[place] = Some(Client::new(socket, connection));
                if self.stop_at.is_some() {
                    self.close(place)?;
                }
            }
            (watched, opened) => {
                if let Ok(connection) = opened {
                    connection.close(&mut self.context)?;
                }
                log::warn!("connection {} can't be served: {watched:?}", adopted.connection);
                let _ = epoll::delete(&self.epoll, &socket);
                let _ = rustix::net::shutdown(&socket, rustix::net::Shutdown::Both);
                self.free.push(place);
                self.shared.give_back_slot(index);
                self.closed.push(adopted.connection);
            }
        }
        Ok(())
    }

    /// Calls the backup thread if something was changed and it would not come soon by itself.
    fn call_backup(&mut self) {
        let head = self.slot.ring_head.load();
        if head == std::mem::replace(&mut self.ring_head, head) {
            return;
        }
        let behind = is_half_full(self.slot) || !self.held.is_empty() || !self.parked.is_empty();
        if self.context.waits_for_sync() || behind || self.shared.gate.must_call() {
            self.shared.call_backup();
        }
    }

    /// Serves those on whom the backup file has come far enough.
    fn serve_waiting(&mut self) -> Result<(), Fatal> {
        if self.held.is_empty() && self.parked.is_empty() {
            return Ok(());
        }
        // Before looking: what moves after the look wakes this thread.
        self.shared.gate.wait(self.index);
        // Who has to wait again stands at the end, for the next round.
        for _ in 0..self.held.len() {
            let Some(&(position, place)) = self.held.front() else { break };
            if !self.context.is_synced(position) {
                break;
            }
            self.held.pop_front();
            if is_held(&self.clients, position, place) {
                self.serve(place, EventFlags::empty())?;
            }
        }
        for _ in 0..self.parked.len() {
            if !self.context.may_change() {
                break;
            }
            let Some((id, place)) = self.parked.pop_front() else { break };
            if is_parked(&self.clients, id, place) {
                self.serve(place, EventFlags::empty())?;
            }
        }
        self.call_backup();
        Ok(())
    }

    /// Notes what the client in `place` waits for.
    fn hold(&mut self, place: usize) {
        let Some(client) = &self.clients[place] else { return };
        match client.held_until() {
            Some(position) if !client.is_parked() || !self.context.is_synced(position) => {
                self.held.push_back((position, place));
            }
            _ => self.parked.push_back((client.connection().id(), place)),
        }
        if self.held.len() + self.parked.len() > 2 * self.clients.len() {
            self.held.retain(|&(position, place)| is_held(&self.clients, position, place));
            self.parked.retain(|&(id, place)| is_parked(&self.clients, id, place));
        }
    }

    fn serve(&mut self, place: usize, happened: EventFlags) -> Result<(), Fatal> {
        let Some(client) = self.clients.get_mut(place).and_then(Option::as_mut) else { return Ok(()) };
        // Of one who isn't listened to only this is heard: it is gone.
        if client.interest().is_empty() && happened.intersects(EventFlags::ERR | EventFlags::HUP) {
            return self.close(place);
        }
        let before = client.interest();
        let fate = client.serve(&mut self.context)?;
        self.settle(place, before, fate)
    }

    fn settle(&mut self, place: usize, before: EventFlags, fate: Fate) -> Result<(), Fatal> {
        let Some(client) = self.clients[place].as_mut() else { return Ok(()) };
        if fate == Fate::Ends {
            return self.close(place);
        }
        if client.interest() != before {
            let data = EventData::new_u64(place as u64);
            if epoll::modify(&self.epoll, client.as_fd(), data, client.interest()).is_err() {
                return self.close(place);
            }
        }
        if fate == Fate::Lingers && client.linger_until.is_none() {
            let until = Instant::now() + LINGER;
            client.linger_until = Some(until);
            self.lingering.push_back((until, place));
        }
        if fate == Fate::Waits {
            self.hold(place);
        }
        Ok(())
    }

    fn close(&mut self, place: usize) -> Result<(), Fatal> {
        let Some(client) = self.clients[place].take() else { return Ok(()) };
        // The front server's duplicate keeps the socket in the epoll otherwise.
        let _ = epoll::delete(&self.epoll, client.as_fd());
        let (id, index) = (client.connection().id(), client.connection().index());
        client.close(&mut self.context)?;
        self.free.push(place);
        self.shared.give_back_slot(index);
        self.closed.push(id);
        Ok(())
    }

    fn end_lingering(&mut self) -> Result<(), Fatal> {
        while let Some(&(until, place)) = self.lingering.front() {
            if until > Instant::now() {
                break;
            }
            self.lingering.pop_front();
            if self.clients[place].as_ref().is_some_and(|client| client.linger_until == Some(until)) {
                self.close(place)?;
            }
        }
        Ok(())
    }

    /// Tells the front server to let its duplicates go. When it is too busy to hear it, it is told later: clients don't
    /// wait for it.
    fn tell_closed(&mut self) {
        while !self.closed.is_empty() {
            let from = self.closed.len().saturating_sub(CLOSED_MAX);
            let told = DataMessage::Closed { connections: self.closed[from..].to_vec() };
            match control::try_send(self.front.as_fd(), &told, &[]) {
                Ok(()) => self.closed.truncate(from),
                Err(ControlError::Passing(PassingError::WouldBlock)) => return,
                // It is gone, and its duplicates with it.
                Err(_) => self.closed.clear(),
            }
        }
    }

    /// Gives a new front server duplicates of the clients' sockets, some in each round. What it has no room for now it gets
    /// later: clients don't wait for it.
    fn introduce(&mut self) {
        for _ in 0..INTRODUCTIONS_MAX {
            let Some(from) = self.strangers_from else { return };
            let mut rest = self.clients.iter().enumerate().skip(from);
            let batch: Vec<(usize, &Client<'s>)> = rest
                .by_ref()
                .filter_map(|(place, client)| Some((place, client.as_ref()?)))
                .take(ADOPTED_MAX)
                .collect();
            let last = rest.all(|(_, client)| client.is_none());
            let next = batch.last().map_or(from, |(place, _)| place + 1);
            let connections = batch.iter().map(|(_, client)| client.connection().adopted()).collect();
            let sockets: Vec<BorrowedFd<'_>> = batch.iter().map(|(_, client)| client.as_fd()).collect();
            let introduced = DataMessage::Introduce { connections, last };
            match control::try_send(self.front.as_fd(), &introduced, &sockets) {
                Ok(()) => self.strangers_from = (!last).then_some(next),
                // It is gone, and the next one is told of all again.
                Err(ControlError::Passing(PassingError::Disconnected)) => self.strangers_from = None,
                // No room, or the kernel is short of memory just now.
                Err(_) => {
                    self.introduce_at = Instant::now() + RETRY_PAUSE;
                    return;
                }
            }
        }
        self.introduce_at = Instant::now();
    }

    /// Executes what is there already, and gives clients a while to take their answers.
    fn stop(&mut self) -> Result<(), Fatal> {
        self.stop_at = Some(Instant::now() + FAREWELL);
        for place in 0..self.clients.len() {
            let Some(client) = self.clients[place].as_mut() else { continue };
            let before = client.interest();
            let fate = client.finish(&mut self.context)?;
            self.settle(place, before, fate)?;
        }
        Ok(())
    }

    fn is_finished(&self) -> bool {
        self.stop_at.is_some_and(|at| at <= Instant::now() || self.clients.iter().all(Option::is_none))
    }

    fn end(mut self) -> Result<(), Fatal> {
        for place in 0..self.clients.len() {
            self.close(place)?;
        }
        self.tell_closed();
        Ok(())
    }
}
