//! A duplicate of every client's socket, so that a connection doesn't end with the data server's descriptors.
//!
//! Invariants
//! - A client is here before the data server hears of it, and until the data server says that it is closed.
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
use rustix::net::Shutdown;
use rustix::time::{ClockId, clock_gettime};

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
}

struct Table {
    first: Number,
    next: Number,
    clients: HashMap<Number, Place>,
    waiting: VecDeque<Number>,
}

struct Place {
    client: Client,
    /// Generation of the data server that has it.
    owner: Option<u64>,
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
        let table = Table { first, next: first, clients: HashMap::new(), waiting: VecDeque::new() };
        Self { table: Mutex::new(table) }
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
            table.clients.remove(number);
        }
    }

    /// Ends the connections of a data server that is dead: its clients connect again. Returns how many they were.
    pub fn end_of(&self, generation: u64) -> usize {
        let ended: Vec<Place> = {
            let mut table = self.table();
            table
                .clients
                .extract_if(|_, place| place.owner == Some(generation))
                .map(|(_, place)| place)
                .collect()
        };
        for place in &ended {
            // It may be closed from the other side already.
            let _ = rustix::net::shutdown(&place.client.socket, Shutdown::Both);
        }
        ended.len()
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
    //! Goal: nobody is lost, nobody is handed over twice. Method: socket pairs whose other ends tell what became of them.

    use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, recv, socketpair};

    use super::*;

    const MOST: u32 = 3;

    fn connect(clients: &Clients) -> (OwnedFd, Result<Number, OwnedFd>) {
        let (far, near) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::NONBLOCK, None).expect("a pair");
        (far, clients.add(Transport::Unix, near, MOST))
    }

    fn is_open(far: &OwnedFd) -> bool {
        recv(far, &mut [0u8; 1][..], RecvFlags::empty()) == Err(rustix::io::Errno::AGAIN)
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
    fn clients_of_a_dead_data_server_are_ended_and_the_waiting_are_not() {
        let clients = Clients::new();
        let (served, _) = connect(&clients);
        clients.take_waiting(1, 1);
        let (other, _) = connect(&clients);
        clients.take_waiting(1, 2);
        let (waiting, _) = connect(&clients);
        assert_eq!(clients.end_of(1), 1);
        assert_eq!((is_open(&served), is_open(&other), is_open(&waiting)), (false, true, true));
        assert_eq!(clients.count(), Count { all: 2, waiting: 1, ever: 3 });
    }

    #[test]
    fn clients_introduced_count_and_end_with_their_data_server() {
        let clients = Clients::new();
        let (far, near) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::NONBLOCK, None).expect("a pair");
        clients.introduce(5, Client { transport: Transport::Unix, socket: Arc::new(near) }, 1);
        assert_eq!(clients.count(), Count { all: 1, waiting: 0, ever: 0 });
        assert!(clients.take_waiting(10, 2).is_empty());
        assert_eq!(clients.end_of(1), 1);
        assert!(!is_open(&far));
    }

    #[test]
    fn clients_ended_while_they_were_handed_over_are_not_put_back() {
        let clients = Clients::new();
        let (_far, _) = connect(&clients);
        let taken = clients.take_waiting(1, 1);
        clients.end_of(1);
        clients.put_back(&taken);
        assert_eq!(clients.count(), Count { all: 0, waiting: 0, ever: 1 });
    }
}
