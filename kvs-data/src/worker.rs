//! One thread of the fixed pool. It waits in its own `epoll` for its own clients; each client is its alone.
//!
//! The epoll may be one that a data server had that died, with all its clients: see [`crate::bench`].

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use crossbeam_channel::{Receiver, Sender};
use kvs_core::connection::context::Context;
use kvs_core::connection::resume::{self, Holder, Lost};
use kvs_core::connection::slot::SlotIndex;
use kvs_core::connection::{Connection, Fatal};
use kvs_core::control::{ClientInfo, Transport, token, token_place};
use kvs_core::liveness::FIRST_WORKER_SLOT;
use kvs_core::segment::layout::{WAVE_MAX, WorkerSlot};
use kvs_core::sys::priority::BREATH;
use kvs_core::sys::stream_position;
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::io::Errno;

use crate::backup::is_half_full;
use crate::bench::{Bench, Place, Seated};
use crate::client::{Client, Fate};
use crate::keeper::{Keeper, RETRY_PAUSE};
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
/// Clients taken up in one round that are new, or that nobody has heard of since the data server before died.
const RESUMED_MAX: usize = 32;
/// Memory that a worker has at hand when it begins: its first hundreds of clients. Less than what the C library would give back.
const WARM_BYTES: usize = 96 << 10;
/// Likewise of its stack.
const WARM_STACK_BYTES: usize = 16 << 10;
/// How long a worker looks for events before it sleeps.
const SPIN: Duration = Duration::from_micros(50);
/// A yield that takes longer has let a thread run that had much to do: more than to ask once more.
const YIELD_MAX: Duration = Duration::from_micros(150);
/// How long the core counts as wanted by others after that.
const CROWDED: Duration = Duration::from_millis(20);
/// Pause between two looks whether a replaced value is still being sent.
const GARBAGE_PAUSE: Duration = Duration::from_millis(50);

/// What the main thread tells a worker.
pub enum Command {
    /// Serve these clients.
    Adopt {
        /// They.
        clients: Vec<Seated>,
        /// Nobody has served them before.
        is_new: bool,
    },
    /// Free this slot, of a client whose socket nobody has kept.
    Release {
        /// The slot.
        index: SlotIndex,
    },
    /// All clients of the data server that died have been given to somebody.
    Settle,
    /// Say who is connected.
    Clients {
        /// To whom.
        reply: Sender<Vec<ClientInfo>>,
    },
    /// Another front server is there; it gets duplicates of all clients' sockets.
    IntroduceToFront {
        /// The socket to it.
        socket: Arc<OwnedFd>,
    },
    /// A standby is there; likewise.
    IntroduceToStandby {
        /// The link to it.
        socket: Arc<OwnedFd>,
    },
    /// Finish and end.
    Stop,
}

/// The main thread's end of a worker.
pub struct WorkerHandle {
    commands: Sender<Command>,
    wake: Arc<OwnedFd>,
    /// Where clients sit until it begins.
    pub bench: Arc<Bench>,
}

/// What wakes a worker.
///
/// # Errors
/// When no descriptor is to be had.
pub fn wake() -> anyhow::Result<Arc<OwnedFd>> {
    let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).context("can't make an eventfd")?;
    Ok(Arc::new(wake))
}

/// What workers wait in.
///
/// # Errors
/// When no descriptors are to be had.
pub fn epolls(workers: usize) -> anyhow::Result<Vec<OwnedFd>> {
    let epoll = || epoll::create(epoll::CreateFlags::CLOEXEC).context("can't make an epoll");
    (0..workers).map(|_| epoll()).collect()
}

impl WorkerHandle {
    /// Starts worker `index`, which waits until all may [begin](Shared::begin).
    ///
    /// # Errors
    /// When there is no memory, descriptor or thread to be had.
    pub fn start(shared: &Arc<Shared>, index: usize) -> anyhow::Result<(Self, JoinHandle<()>)> {
        let (commands, inbox) = crossbeam_channel::unbounded();
        let wake = Arc::clone(&shared.wakes[index]);
        let bench = Arc::new(Bench::new());
        // Told of once a call. A worker that died may have left a call unheard, and its counter is in the epoll until the kernel has taken
        // it out.
        let once = EventFlags::IN | EventFlags::ET;
        epoll::add(&shared.epolls[index], &wake, EventData::new_u64(WAKE), once)?;
        let (shared, thread_bench) = (Arc::clone(shared), Arc::clone(&bench));
        let thread = std::thread::Builder::new().name(format!("worker-{index}")).spawn(move || {
            let _alive = shared.enter(FIRST_WORKER_SLOT + index);
            let Ok(slot) = shared.segment.memory().object(shared.segment.regions().worker(index as u64))
            else {
                std::process::abort()
            };
            let context = prepare(&shared, (slot, index));
            let front = shared.await_begin();
            let worker = Worker::new(&shared, (slot, index), context, &thread_bench, inbox, front);
            if let Err(fatal) = worker.run() {
                log::error!("worker {index}: {fatal}; ending, the next data server recovers");
                std::process::abort();
            }
        });
        Ok((Self { commands, wake, bench }, thread.context("can't start a worker thread")?))
    }

    /// Tells the worker something.
    pub fn send(&self, command: Command) {
        if self.commands.send(command).is_ok() {
            // It doesn't fill up before the machine is old.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }
}

/// What the worker of a slot needs for its clients, whom it doesn't serve yet: nothing in the segment is looked at. Memory that it
/// will use first is mapped, as the kernel may let nobody have any while it takes apart what a dead data server had.
fn prepare<'s>(shared: &'s Shared, (slot, index): (&'s WorkerSlot, usize)) -> Context<'s> {
    let capacity = shared.segment.regions().capacity_bytes;
    let rings_max = (capacity / RINGS_SHARE / RING_BYTES / shared.workers as u64).clamp(2, RINGS_MAX);
    let context = Context::new(&shared.table, slot, shared, shared.value_bytes_max, rings_max);
    let context = context.behind(&shared.gate, index).with_sessions(&shared.sessions);
    // Written, and given back to what this thread allocates from; its stack.
    drop(std::hint::black_box(vec![1u8; WARM_BYTES]));
    std::hint::black_box([1u8; WARM_STACK_BYTES]);
    context.counting().unwrap_or_else(|error| {
        log::error!("can't map worker {index}'s slot: {error}; ending");
        std::process::abort()
    })
}

/// Token of the worker's own wake-up, which is no client's.
const WAKE: u64 = u64::MAX;

/// Whether it is for this position of the backup file that the client in `place` waits.
fn is_held(clients: &[Option<Box<Client<'_>>>], position: u64, place: usize) -> bool {
    clients[place].as_ref().is_some_and(|client| client.held_until() == Some(position))
}

/// Whether the client in `place` is this one, and waits for room in the backup ring.
fn is_parked(clients: &[Option<Box<Client<'_>>>], id: u64, place: usize) -> bool {
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
    /// Those whose answers a data server gave that died, before they were on disk; by number and place.
    held_back: Vec<(u64, usize)>,
    inbox: Receiver<Command>,
    front: Keeper,
    standby: Option<Keeper>,
    /// Boxed, since a standby makes the list when it takes over.
    clients: Vec<Option<Box<Client<'s>>>>,
    /// Those who are not served yet, by their place; as long a list.
    seats: Vec<Option<Seated>>,
    /// Those that have no place yet, and whether they are new.
    arriving: VecDeque<(Seated, bool)>,
    /// Those in places from here on haven't been looked at since the data server before died.
    unseen_from: Option<usize>,
    /// All clients of that time have been given to somebody.
    settles: bool,
    /// Those who were told why they can't be served, with the time of their end, in its order. Likewise.
    lingering: VecDeque<(Instant, usize)>,
    /// The place that is looked at next for buffers nobody uses.
    hand: usize,
    stop_at: Option<Instant>,
    /// It looks for events before it sleeps.
    spins: bool,
    /// Another thread wants the core.
    crowded_until: Instant,
}

impl<'s> Worker<'s> {
    fn new(
        shared: &'s Shared,
        (slot, index): (&'s WorkerSlot, usize),
        context: Context<'s>,
        bench: &Bench,
        inbox: Receiver<Command>,
        front: Arc<OwnedFd>,
    ) -> Self {
        let seats = bench.clear();
        Self {
            shared,
            slot,
            index,
            context,
            ring_head: slot.ring_head.load(),
            held: VecDeque::new(),
            parked: VecDeque::new(),
            held_back: Vec::new(),
            inbox,
            front: Keeper::informed(front),
            standby: None,
            clients: seats.iter().map(|_| None).collect(),
            arriving: VecDeque::new(),
            unseen_from: Some(0),
            seats,
            settles: false,
            lingering: VecDeque::new(),
            hand: 0,
            stop_at: None,
            spins: false,
            crowded_until: Instant::now(),
        }
    }

    fn run(mut self) -> Result<(), Fatal> {
        let mut events = Vec::with_capacity(EVENTS_MAX);
        // A predecessor that died in its turn left an odd one.
        self.set_turn(self.slot.turn.load().next_multiple_of(2));
        self.begin_interrupted()?;
        loop {
            if self.is_finished() {
                return self.end();
            }
            self.wait(&mut events);
            if !events.is_empty() && events.iter().all(|event| self.is_of_stranger(event)) {
                std::thread::sleep(BREATH);
            }
            self.set_turn(self.slot.turn.load().wrapping_add(1));
            let mut rest = &events[..];
            // The wake-up is nobody's place.
            while !rest.is_empty() {
                let (wave, later) = rest.split_at(rest.len().min(WAVE_MAX));
                self.execute_wave(wave)?;
                for event in wave {
                    self.hear(event)?;
                }
                rest = later;
            }
            let woken = events.drain(..).any(|event| event.data.u64() == WAKE);
            // Who gets the place of a client that was closed does so only here, when no event of this round can mean that one.
            if woken {
                self.obey()?;
            }
            self.adopt_some(RESUMED_MAX)?;
            self.resume_some()?;
            self.call_backup();
            self.serve_waiting()?;
            // Values that were replaced while they were sent.
            self.shared.table.collect_garbage(self.slot)?;
            self.end_lingering()?;
            self.cool()?;
            self.tell_keepers();
            self.set_turn(self.slot.turn.load().wrapping_add(1));
        }
    }

    /// Executes what came of a wave's clients. Answers are sent when all is executed: each wakes a client that sleeps, and a client
    /// of several connections finds several answers then.
    fn execute_wave(&mut self, wave: &[epoll::Event]) -> Result<(), Fatal> {
        let mut done = 0;
        while done < wave.len() {
            let gathered = done..self.gather(wave, done)?;
            done = gathered.end;
            for event in &wave[gathered] {
                if let Some(Some(client)) = self.clients.get_mut(token_place(event.data.u64())) {
                    client.execute_taken(&mut self.context)?;
                }
            }
        }
        Ok(())
    }

    /// Takes what came of some of a wave's clients from number `first` on, before any of it is executed, so that their cache
    /// misses overlap; up to which number it did.
    fn gather(&mut self, wave: &[epoll::Event], first: usize) -> Result<usize, Fatal> {
        self.context.begin_wave();
        let mut count = first;
        while let Some(event) = wave.get(count).filter(|_| !self.context.is_wave_full()) {
            if let Some(Some(client)) = self.clients.get_mut(token_place(event.data.u64())) {
                client.join_wave(&mut self.context, count)?;
            }
            count += 1;
        }
        self.context.end_wave();
        Ok(count)
    }

    /// Waits for events. It looks for some time before it sleeps, if the last ones came so soon: to be woken takes longer. Not while
    /// another thread wants the core: that may be the very client.
    fn wait(&mut self, events: &mut Vec<epoll::Event>) {
        let timeout = self.timeout();
        let start = Instant::now();
        let mut now = start;
        while self.spins && now - start < SPIN && !self.shared.is_crowded(now) {
            if self.look(events, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
                return;
            }
            let before = Instant::now();
            std::thread::yield_now();
            now = Instant::now();
            if now - before > YIELD_MAX {
                self.crowded_until = now + CROWDED;
                break;
            }
        }
        self.look(events, timeout.as_ref());
        let end = Instant::now();
        self.spins = end - start < 2 * SPIN && end > self.crowded_until && !self.shared.is_crowded(end);
    }

    /// Takes events from the kernel, within `timeout`; whether there were any.
    fn look(&self, events: &mut Vec<epoll::Event>, timeout: Option<&Timespec>) -> bool {
        match epoll::wait(self.epoll(), spare_capacity(events), timeout) {
            Ok(count) => count > 0,
            Err(Errno::INTR) => false,
            Err(error) => {
                log::error!("epoll: {error}");
                std::process::abort();
            }
        }
    }

    fn epoll(&self) -> &'s OwnedFd {
        &self.shared.epolls[self.index]
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

    fn timeout(&self) -> Option<Timespec> {
        let lingering = self.lingering.front().map(|&(until, _)| until).into_iter();
        let garbage = (self.slot.garbage.load() != 0).then_some(GARBAGE_PAUSE);
        // Clients who are being answered may want this core.
        let unseen = (self.unseen_from.is_some() || !self.arriving.is_empty()).then_some(BREATH);
        let held_back = (!self.held_back.is_empty()).then_some(RETRY_PAUSE);
        let pauses = garbage.into_iter().chain(unseen).chain(held_back);
        let retries = pauses.map(|pause| Instant::now() + pause);
        let keepers = self.front.due().into_iter().chain(self.standby.as_ref().and_then(Keeper::due));
        let next = lingering.chain(self.stop_at).chain(retries).chain(keepers).min()?;
        // A nanosecond too long is no harm, one too short is a busy round.
        let pause = next.saturating_duration_since(Instant::now()) + Duration::from_nanos(1);
        Timespec::try_from(pause).ok()
    }

    fn obey(&mut self) -> Result<(), Fatal> {
        while let Ok(command) = self.inbox.try_recv() {
            match command {
                Command::Adopt { clients, is_new } => {
                    self.arriving.extend(clients.into_iter().map(|client| (client, is_new)));
                }
                Command::Release { index } => {
                    resume::give_up(&mut self.context, index)?;
                    self.shared.free_slot(index);
                }
                Command::Settle => {
                    self.settles = true;
                    self.unseen_from.get_or_insert(self.seats.len());
                }
                Command::Clients { reply } => {
                    let clients = self.clients.iter().flatten();
                    let infos = clients.map(|client| client.connection().describe()).collect();
                    // The main thread may have stopped listening.
                    let _ = reply.send(infos);
                }
                Command::IntroduceToFront { socket } => {
                    self.adopt_some(usize::MAX)?;
                    self.front = Keeper::ignorant(socket);
                }
                Command::IntroduceToStandby { socket } => {
                    self.adopt_some(usize::MAX)?;
                    self.standby = Some(Keeper::ignorant(socket));
                    self.shared.make_way();
                }
                Command::Stop => {
                    self.adopt_some(usize::MAX)?;
                    self.stop()?;
                }
            }
        }
        Ok(())
    }

    /// Takes up to `most` of the clients that the main thread gave: thousands may come at once, and those that are served go on.
    fn adopt_some(&mut self, most: usize) -> Result<(), Fatal> {
        for _ in 0..most.min(self.arriving.len()) {
            let Some((client, is_new)) = self.arriving.pop_front() else { break };
            self.adopt(client, is_new)?;
        }
        Ok(())
    }

    /// Takes a client that the main thread gave.
    fn adopt(&mut self, client: Seated, is_new: bool) -> Result<(), Fatal> {
        let Place { place, .. } = Place::of(client.index, self.shared.workers);
        if self.seats.len() <= place {
            self.seats.resize_with(place + 1, || None);
            self.clients.resize_with(place + 1, || None);
        }
        if let Some(left) = &self.seats[place] {
            // It was closed by the data server before, which gave away its slot and had no time to tell.
            self.forget_uncounted(place, left.adopted.connection);
        }
        debug_assert!(self.clients[place].is_none(), "a slot is given to one client at a time");
        self.seats[place] = Some(client);
        self.begin(place, is_new)?;
        if self.stop_at.is_some() { self.close(place) } else { Ok(()) }
    }

    /// Goes on with the clients that were just being served: they may wait for an answer to what has been received already.
    fn begin_interrupted(&mut self) -> Result<(), Fatal> {
        let shared = self.shared;
        for &slot in shared.served.get().into_iter().flatten() {
            let Place { worker, place } = Place::of(slot, shared.workers);
            if worker == self.index && place < self.seats.len() {
                self.begin(place, false)?;
            }
        }
        Ok(())
    }

    /// Looks at some of those of whom nothing was heard since the data server before died: answers may be unsent, or requests
    /// received and not executed.
    fn resume_some(&mut self) -> Result<(), Fatal> {
        let Some(from) = self.unseen_from else { return Ok(()) };
        let to = (from + RESUMED_MAX).min(self.seats.len());
        for place in from..to {
            if self.seats[place].is_some() {
                self.begin(place, false)?;
            }
        }
        self.unseen_from = Some(to);
        if to == self.seats.len() && self.arriving.is_empty() {
            self.unseen_from = None;
            if std::mem::take(&mut self.settles) {
                self.shared.worker_has_settled();
            }
        }
        Ok(())
    }

    /// Begins to serve the client in `place`, or goes on where the data server before stopped.
    fn begin(&mut self, place: usize, is_new: bool) -> Result<(), Fatal> {
        let Some(Seated { index, adopted, socket, .. }) = &self.seats[place] else { return Ok(()) };
        let (index, adopted) = (*index, *adopted);
        let segment = &self.shared.segment;
        let connection = match resume::holder(segment, index, adopted.connection) {
            Holder::This => match Connection::resume(&mut self.context, index, adopted, socket.as_fd())? {
                Ok(connection) => connection,
                Err(lost) => {
                    match lost {
                        Lost::Gone => log::debug!("connection {}: {lost}", adopted.connection),
                        lost => log::error!("connection {} is ended: {lost}", adopted.connection),
                    }
                    resume::give_up(&mut self.context, index)?;
                    return self.give_up_with_slot(place);
                }
            },
            Holder::Free if is_new || !was_served(adopted.transport, socket.as_fd()) => {
                let opened = Connection::open(segment, index, adopted).ok();
                match opened.map(|mut opened| opened.count_input(socket.as_fd()).map(|()| opened)) {
                    Some(Ok(connection)) => connection,
                    Some(Err(error)) => {
                        log::warn!("connection {} can't be served: {error}", adopted.connection);
                        resume::give_up(&mut self.context, index)?;
                        return self.give_up_with_slot(place);
                    }
                    None => return self.give_up(place),
                }
            }
            // It was closed by the data server before, which had no time to tell.
            Holder::Free => return self.give_up(place),
            // Likewise, and its slot has gone to another one since.
            Holder::Another => {
                self.forget_uncounted(place, adopted.connection);
                return Ok(());
            }
        };
        let Some(Seated { socket, .. }) = self.seats[place].take() else { return Ok(()) };
        let client = Client::new(socket, connection, &self.context);
        let (watched, is_pending) = (self.watch(place, &client, is_new), client.is_pending());
        self.clients[place] = Some(Box::new(client));
        if let Err(error) = watched {
            log::warn!("connection {} can't be waited for: {error}", adopted.connection);
            return self.close(place);
        }
        if is_pending { self.serve_begun(place, EventFlags::empty()) } else { Ok(()) }
    }

    /// Has a client waited for. If it isn't new, a data server before this one may have registered it, and for something else.
    fn watch(&self, place: usize, client: &Client<'_>, is_new: bool) -> rustix::io::Result<()> {
        let (epoll, interest) = (self.epoll(), client.interest());
        let data = EventData::new_u64(token(place, client.connection().id()));
        let watched = if is_new {
            epoll::add(epoll, client, data, interest)
        } else {
            epoll::modify(epoll, client, data, interest)
        };
        match watched {
            Err(Errno::EXIST) => epoll::modify(epoll, client, data, interest),
            Err(Errno::NOENT) => epoll::add(epoll, client, data, interest),
            watched => watched,
        }
    }

    /// Lets a client go that can't be served; its slot is free, and nobody else's.
    fn give_up_with_slot(&mut self, place: usize) -> Result<(), Fatal> {
        if let Some(client) = &mut self.seats[place] {
            client.owns_slot = true;
        }
        self.give_up(place)
    }

    /// Lets a client go that can't be served. A slot that may be another's is not used again before the next data server finds it
    /// free.
    fn give_up(&mut self, place: usize) -> Result<(), Fatal> {
        let Some(Seated { index, owns_slot, adopted, socket }) = &self.seats[place] else {
            return Ok(());
        };
        let (index, owns_slot, connection) = (*index, *owns_slot, adopted.connection);
        // It may be closed already from the other side.
        let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Both);
        if owns_slot {
            self.forget(place, connection);
            self.shared.give_back_slot(index);
        } else {
            self.forget_uncounted(place, connection);
        }
        Ok(())
    }

    /// Lets the socket in `place` go.
    fn forget(&mut self, place: usize, connection: u64) {
        if let Some(seated) = self.seats[place].take() {
            // Other duplicates keep the socket in the epoll otherwise.
            let _ = epoll::delete(self.epoll(), &seated.socket);
        }
        self.note_closed(connection);
    }

    /// The same, and its slot isn't given back.
    fn forget_uncounted(&mut self, place: usize, connection: u64) {
        self.forget(place, connection);
        self.shared.connections.fetch_sub(1, Ordering::Relaxed);
    }

    fn note_closed(&mut self, connection: u64) {
        self.front.note_closed(connection);
        self.standby.iter_mut().for_each(|standby| standby.note_closed(connection));
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
        if self.held.is_empty() && self.parked.is_empty() && self.held_back.is_empty() {
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
        if self.context.is_inheritance_synced() {
            for (id, place) in std::mem::take(&mut self.held_back) {
                if self.clients[place].as_ref().is_some_and(|client| client.connection().id() == id) {
                    self.serve(place, EventFlags::empty())?;
                }
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
            _ if client.is_held_back() => self.held_back.push((client.connection().id(), place)),
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

    /// Whether this is of a client that was in the epoll when the data server before died, and that nobody has passed yet.
    fn is_of_stranger(&self, event: &epoll::Event) -> bool {
        let place = token_place(event.data.u64());
        let is_empty = |place| self.clients.get(place).is_none_or(Option::is_none);
        event.data.u64() != WAKE && is_empty(place) && self.seats.get(place).is_none_or(Option::is_none)
    }

    /// Serves the client of whom the kernel said something.
    fn hear(&mut self, event: &epoll::Event) -> Result<(), Fatal> {
        let (said, place) = (event.data.u64(), token_place(event.data.u64()));
        let mut happened = event.flags;
        if happened.intersects(EventFlags::ERR | EventFlags::HUP)
            && let Some(Some(client)) = self.clients.get(place)
            && token(place, client.connection().id()) != said
        {
            // Somebody is meant who was here before, and was registered twice, as its socket had not the number of its slot.
            happened = EventFlags::empty();
        }
        self.serve(place, happened)
    }

    fn serve(&mut self, place: usize, happened: EventFlags) -> Result<(), Fatal> {
        if self.seats.get(place).is_some_and(Option::is_some) {
            self.begin(place, false)?;
        }
        self.serve_begun(place, happened)
    }

    fn serve_begun(&mut self, place: usize, happened: EventFlags) -> Result<(), Fatal> {
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
        let epoll = self.epoll();
        let Some(client) = self.clients[place].as_mut() else { return Ok(()) };
        if fate == Fate::Ends {
            return self.close(place);
        }
        if client.interest() != before {
            let data = EventData::new_u64(token(place, client.connection().id()));
            if epoll::modify(epoll, client.as_fd(), data, client.interest()).is_err() {
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
        let _ = epoll::delete(self.epoll(), client.as_fd());
        let (id, index) = (client.connection().id(), client.connection().index());
        client.close(&mut self.context)?;
        self.shared.give_back_slot(index);
        self.note_closed(id);
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

    /// Tells those who keep duplicates of the sockets what they don't know yet.
    fn tell_keepers(&mut self) {
        let (clients, seats) = (&self.clients, &self.seats);
        let places = |place: usize| match (&clients[place], &seats[place]) {
            (Some(client), _) => Some((client.connection().seat(), client.as_fd())),
            (None, Some(seated)) => Some((seated.seat(), seated.socket.as_fd())),
            (None, None) => None,
        };
        for keeper in std::iter::once(&mut self.front).chain(&mut self.standby) {
            keeper.introduce(places, clients.len());
            keeper.tell_closed();
        }
    }

    /// Executes what is there already, and gives clients a while to take their answers.
    fn stop(&mut self) -> Result<(), Fatal> {
        self.stop_at = Some(Instant::now() + FAREWELL);
        for place in 0..self.clients.len() {
            self.begin(place, false)?;
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
            self.begin(place, false)?;
            self.close(place)?;
        }
        self.tell_keepers();
        std::iter::once(&mut self.front).chain(&mut self.standby).for_each(Keeper::tell_all_closed);
        Ok(())
    }
}

/// Whether somebody has read from the socket, or it is over: a connection of which nobody has kept anything because it was
/// closed, unlike one that nobody has begun to serve.
fn was_served(transport: Transport, socket: BorrowedFd<'_>) -> bool {
    match transport {
        Transport::Tcp => {
            stream_position::tcp(socket).is_ok_and(|positions| positions.closed || positions.received > 0)
        }
        // The count begins with the connection.
        Transport::Unix => stream_position::unix_received(socket).is_ok(),
    }
}
