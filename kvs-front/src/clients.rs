//! A duplicate of every client's socket, so that a connection doesn't end with the data server's descriptors.
//!
//! Invariants
//! - A client is here before the data server hears of it, and until the data server says that it is closed: also while none serves.
//! - A client that no data server has is in the queue of the waiting, in the order of arrival; no other is.
//! - A number is never used again, not even by another front server on the same segment: numbers begin with the time since
//!   the machine started, in microseconds, and grow by one a connection.
//!
//! Lock: one for all of it, never held while something is sent or waited for.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvs_core::control::Transport;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::Shutdown;
use rustix::time::{ClockId, clock_gettime};

use crate::notify::DescriptorStore;
use crate::stored::client_name;

/// Number of a connection.
pub type Number = u64;

/// A client.
#[derive(Clone)]
pub struct Client {
    /// How it came.
    pub transport: Transport,
    /// Its socket.
    pub socket: Arc<OwnedFd>,
}

/// All clients, by number of the connection.
pub struct Clients {
    table: Mutex<Table>,
    /// Where their sockets outlive all processes, if anywhere.
    store: Option<Arc<DescriptorStore>>,
}

/// Nothing is waited for.
const AT_ONCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

struct Table {
    first: Number,
    next: Number,
    clients: HashMap<Number, Place>,
    waiting: VecDeque<Number>,
    /// What data servers wait for their clients in, one after the other.
    epolls: Arc<[OwnedFd]>,
}

struct Place {
    client: Client,
    /// Generation of the data server that has it.
    owner: Option<u64>,
}

impl Table {
    /// Of these, those from whom something has come. It takes milliseconds for thousands.
    fn speaking(&self, numbers: &[Number]) -> Vec<Number> {
        let places = numbers.iter().filter_map(|number| Some((*number, self.clients.get(number)?)));
        let (numbers, mut polled): (Vec<Number>, Vec<PollFd<'_>>) =
            places.map(|(number, place)| (number, PollFd::new(&place.client.socket, PollFlags::IN))).unzip();
        // Whatever goes wrong, it is only about the order.
        let _ = poll(&mut polled, Some(&AT_ONCE));
        let ready = polled.iter().map(|polled| !polled.revents().is_empty());
        numbers.into_iter().zip(ready).filter_map(|(number, ready)| ready.then_some(number)).collect()
    }
}

/// How many clients there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Count {
    /// Now.
    pub all: usize,
    /// Of them, waiting for a data server.
    pub waiting: usize,
    /// Since this front server began.
    pub ever: u64,
}

impl Clients {
    /// None.
    pub fn new() -> Self {
        let now = clock_gettime(ClockId::Boottime);
        // Neither is ever negative.
        let first = (now.tv_sec as u64) * 1_000_000 + (now.tv_nsec as u64) / 1_000;
        let table = Table {
            first,
            next: first,
            clients: HashMap::new(),
            waiting: VecDeque::new(),
            epolls: Arc::new([]),
        };
        Self { table: Mutex::new(table), store: None }
    }

    /// The same, with sockets that outlive all processes in `store`, if there is one.
    pub fn kept_in(self, store: Option<Arc<DescriptorStore>>) -> Self {
        Self { store, ..self }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many there are.
    pub fn count(&self) -> Count {
        let table = self.table();
        Count { all: table.clients.len(), waiting: table.waiting.len(), ever: table.next - table.first }
    }

    /// Adds one at the end of the queue, unless there are `most` already.
    ///
    /// # Errors
    /// The socket, when there are.
    pub fn add(&self, transport: Transport, socket: OwnedFd, most: u32) -> Result<Number, OwnedFd> {
        let mut table = self.table();
        if table.clients.len() >= most as usize {
            return Err(socket);
        }
        let number = table.next;
        table.next += 1;
        let client = Client { transport, socket: Arc::new(socket) };
        if let Some(store) = &self.store {
            store.keep(client_name(number, transport), Arc::clone(&client.socket));
        }
        table.clients.insert(number, Place { client, owner: None });
        table.waiting.push_back(number);
        Ok(number)
    }

    /// Takes up to `count` clients from the queue for the data server of this generation.
    pub fn take_waiting(&self, count: usize, generation: u64) -> Vec<(Number, Client)> {
        let mut table = self.table();
        let count = count.min(table.waiting.len());
        let numbers: Vec<Number> = table.waiting.drain(..count).collect();
        let mut taken = Vec::with_capacity(count);
        for number in numbers {
            if let Some(place) = table.clients.get_mut(&number) {
                place.owner = Some(generation);
                taken.push((number, place.client.clone()));
            }
        }
        taken
    }

    /// Puts clients back to the head of the queue whom the data server did not get.
    pub fn put_back(&self, taken: &[(Number, Client)]) {
        let mut table = self.table();
        for (number, _) in taken.iter().rev() {
            if let Some(place) = table.clients.get_mut(number) {
                place.owner = None;
                table.waiting.push_front(*number);
            }
        }
    }

    /// Adds one that the data server of this generation served before this front server was there.
    pub fn introduce(&self, number: Number, client: Client, generation: u64) {
        self.table().clients.insert(number, Place { client, owner: Some(generation) });
    }

    /// Lets clients go that the data server has closed.
    pub fn remove(&self, numbers: &[Number]) {
        let mut table = self.table();
        for number in numbers {
            if let Some(place) = table.clients.remove(number) {
                self.let_go(*number, &place.client);
            }
        }
    }

    /// The data server of this generation has these.
    pub fn hold(&self, numbers: &[Number], generation: u64) {
        let mut table = self.table();
        for number in numbers {
            if let Some(place) = table.clients.get_mut(number) {
                place.owner = Some(generation);
            }
        }
    }

    /// Keeps the epolls of the data server that serves.
    pub fn keep_epolls(&self, epolls: Vec<OwnedFd>) {
        self.table().epolls = epolls.into();
    }

    /// Those that were kept last, for the next data server.
    pub fn epolls(&self) -> Arc<[OwnedFd]> {
        Arc::clone(&self.table().epolls)
    }

    /// Puts all clients at the head of the queue that other data servers had than that of this generation: those are dead. Of them the
    /// `first` stand first, who may wait for an answer, while a thousand others may be silent. Returns how many they are.
    pub fn requeue(&self, generation: u64, first: &[Number]) -> usize {
        let mut table = self.table();
        let orphaned = |place: &Place| place.owner.is_some_and(|owner| owner != generation);
        let orphans = table.clients.iter().filter(|(_, place)| orphaned(place));
        let mut orphans: Vec<Number> = orphans.map(|(number, _)| *number).collect();
        if orphans.is_empty() {
            return 0;
        }
        orphans.sort_unstable();
        // Where the data server could know of nobody.
        let mut queue = if first.is_empty() { table.speaking(&orphans) } else { first.to_vec() };
        let count = orphans.len();
        queue.append(&mut orphans);
        // Each stands where it is named first.
        queue.retain(|number| {
            let orphan = table.clients.get_mut(number).filter(|place| orphaned(place));
            orphan.is_some_and(|place| place.owner.take().is_some())
        });
        queue.into_iter().rev().for_each(|number| table.waiting.push_front(number));
        count
    }

    /// Ends the connections of all whom other data servers had than that of this generation, and nobody can serve any more.
    pub fn end_orphans(&self, generation: u64) {
        let is_orphan = |place: &Place| place.owner.is_some_and(|owner| owner != generation);
        let orphans: Vec<(Number, Place)> =
            self.table().clients.extract_if(|_, place| is_orphan(place)).collect();
        for (number, place) in orphans {
            // It may be closed from the other side already.
            let _ = rustix::net::shutdown(&place.client.socket, Shutdown::Both);
            self.let_go(number, &place.client);
        }
    }

    fn let_go(&self, number: Number, client: &Client) {
        if let Some(store) = &self.store {
            store.let_go(client_name(number, client.transport));
        }
    }

    /// Where TCP clients are.
    pub fn addresses(&self) -> HashMap<Number, SocketAddr> {
        let sockets: Vec<(Number, Arc<OwnedFd>)> = {
            let table = self.table();
            let tcp = table.clients.iter().filter(|(_, place)| place.client.transport == Transport::Tcp);
            tcp.map(|(number, place)| (*number, Arc::clone(&place.client.socket))).collect()
        };
        // One that is closed meanwhile has none.
        let address = |socket: &OwnedFd| SocketAddr::try_from(rustix::net::getpeername(socket).ok()??).ok();
        sockets.into_iter().filter_map(|(number, socket)| Some((number, address(&socket)?))).collect()
    }
}

#[cfg(test)]
mod tests {
    //! Goal: nobody is lost, nobody is handed over twice. Method: socket pairs.

    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    const MOST: u32 = 3;

    fn connect(clients: &Clients) -> (OwnedFd, Result<Number, OwnedFd>) {
        let (far, near) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::NONBLOCK, None).expect("a pair");
        (far, clients.add(Transport::Unix, near, MOST))
    }

    fn numbers(taken: &[(Number, Client)]) -> Vec<Number> {
        taken.iter().map(|(number, _)| *number).collect()
    }

    #[test]
    fn clients_are_handed_over_once_in_the_order_of_arrival() {
        let clients = Clients::new();
        let ends: Vec<_> = (0..MOST).map(|_| connect(&clients)).collect();
        let added: Vec<Number> = ends.iter().map(|(_, added)| *added.as_ref().expect("room")).collect();
        let taken = clients.take_waiting(2, 1);
        assert_eq!(numbers(&taken), added[..2]);
        assert_eq!(clients.count(), Count { all: 3, waiting: 1, ever: 3 });
        clients.put_back(&taken);
        assert_eq!(numbers(&clients.take_waiting(10, 2)), added);
        assert!(clients.take_waiting(10, 2).is_empty());
    }

    #[test]
    fn clients_above_the_limit_get_their_socket_back() {
        let clients = Clients::new();
        let ends: Vec<_> = (0..MOST).map(|_| connect(&clients)).collect();
        assert!(connect(&clients).1.is_err());
        let first = *ends[0].1.as_ref().expect("room");
        clients.take_waiting(1, 1);
        clients.remove(&[first, first, 77]);
        let again = connect(&clients).1.expect("one has left");
        assert!(again > first, "a number is never used again");
    }

    #[test]
    fn clients_of_a_dead_data_server_go_first_to_the_next_and_those_it_has_stay() {
        let clients = Clients::new();
        let (_silent, silent) = connect(&clients);
        let (speaking, spoke) = connect(&clients);
        clients.take_waiting(2, 1);
        let (_waiting, waiting) = connect(&clients);
        rustix::net::send(&speaking, b"request", rustix::net::SendFlags::empty()).expect("open");
        assert_eq!(clients.requeue(1, &[]), 0);
        assert_eq!(clients.requeue(2, &[]), 2);
        let expected = [spoke, silent, waiting].map(|added| added.expect("room"));
        assert_eq!(numbers(&clients.take_waiting(10, 2)), expected);
        clients.hold(&expected[..1], 3);
        assert_eq!(clients.requeue(3, &[]), 2);
        assert_eq!(numbers(&clients.take_waiting(10, 3)), expected[1..]);
    }

    #[test]
    fn clients_who_may_wait_for_an_answer_go_before_all_others() {
        let clients = Clients::new();
        let ends: Vec<_> = (0..3).map(|_| connect(&clients)).collect();
        let numbers_of: Vec<Number> =
            ends.iter().map(|(_, number)| *number.as_ref().expect("room")).collect();
        clients.take_waiting(10, 1);
        // One of them is unknown, and one is named twice.
        assert_eq!(clients.requeue(2, &[77, numbers_of[2], numbers_of[1], numbers_of[2]]), 3);
        let expected = [2, 1, 0].map(|index| numbers_of[index]);
        assert_eq!(numbers(&clients.take_waiting(10, 2)), expected);
    }

    #[test]
    fn clients_introduced_count_and_are_not_waiting() {
        let clients = Clients::new();
        let (_far, near) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::NONBLOCK, None).expect("a pair");
        clients.introduce(5, Client { transport: Transport::Unix, socket: Arc::new(near) }, 1);
        assert_eq!(clients.count(), Count { all: 1, waiting: 0, ever: 0 });
        assert!(clients.take_waiting(10, 2).is_empty());
        assert_eq!(clients.requeue(2, &[]), 1);
        assert_eq!(numbers(&clients.take_waiting(10, 2)), [5]);
    }

    #[test]
    fn clients_whom_nobody_can_serve_are_ended() {
        let clients = Clients::new();
        let (far, near) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::NONBLOCK, None).expect("a pair");
        clients.introduce(5, Client { transport: Transport::Unix, socket: Arc::new(near) }, 0);
        let (_far, number) = connect(&clients);
        clients.end_orphans(1);
        assert_eq!(clients.count(), Count { all: 1, waiting: 1, ever: 1 });
        assert_eq!(numbers(&clients.take_waiting(10, 1)), [number.expect("room")]);
        let mut byte = [0];
        let (_, ended) =
            rustix::net::recv(&far, &mut byte[..], rustix::net::RecvFlags::DONTWAIT).expect("the end");
        assert_eq!(ended, 0);
    }

    #[test]
    fn clients_closed_while_they_were_handed_over_are_not_put_back() {
        let clients = Clients::new();
        let (_far, number) = connect(&clients);
        let taken = clients.take_waiting(1, 1);
        clients.remove(&[number.expect("room")]);
        clients.put_back(&taken);
        assert_eq!(clients.count(), Count { all: 0, waiting: 0, ever: 1 });
    }
}
