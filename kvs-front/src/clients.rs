//! A duplicate of every client's socket, so that a connection doesn't end with the data server's descriptors.
//!
//! Invariant: a client is here before the data server hears of it, and until the data server says that it is closed.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use kvs_core::control::Transport;
use rustix::net::Shutdown;

/// Connections a second that could be numbered without a number being used twice by two front servers.
const NUMBERS_PER_SECOND: u64 = 1_000_000;

/// A client.
pub struct Client {
    /// How it came.
    pub transport: Transport,
    /// Its socket.
    pub socket: OwnedFd,
    /// Whether a data server has it.
    pub adopted: bool,
}

/// All clients, by number of the connection.
pub struct Clients {
    all: Mutex<Table>,
}

struct Table {
    next: u64,
    clients: HashMap<u64, Client>,
}

impl Clients {
    /// None.
    pub fn new() -> Self {
        // A number is never used again, not even by the next front server on the same segment.
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let next = seconds.wrapping_mul(NUMBERS_PER_SECOND);
        Self { all: Mutex::new(Table { next, clients: HashMap::new() }) }
    }

    fn all(&self) -> MutexGuard<'_, Table> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.all().clients.len()
    }

    /// Adds one and gives it its number.
    pub fn add(&self, transport: Transport, socket: OwnedFd) -> u64 {
        let mut all = self.all();
        let number = all.next;
        all.next += 1;
        all.clients.insert(number, Client { transport, socket, adopted: false });
        number
    }

    /// Lets clients go that the data server has closed.
    pub fn remove(&self, numbers: &[u64]) {
        let mut all = self.all();
        numbers.iter().for_each(|number| drop(all.clients.remove(number)));
    }

    /// Numbers of the clients that no data server has, oldest first.
    pub fn waiting(&self) -> Vec<u64> {
        let all = self.all();
        let waiting = all.clients.iter().filter(|(_, client)| !client.adopted);
        let mut numbers: Vec<u64> = waiting.map(|(number, _)| *number).collect();
        numbers.sort_unstable();
        numbers
    }

    /// Lets `give` see the clients of these numbers, and notes that they are adopted if it succeeds.
    pub fn hand_over<E>(
        &self,
        numbers: &[u64],
        give: impl FnOnce(&[(u64, &Client)]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut all = self.all();
        let chosen: Vec<(u64, &Client)> = numbers
            .iter()
            .filter_map(|number| all.clients.get(number).map(|client| (*number, client)))
            .collect();
        give(&chosen)?;
        for number in numbers {
            if let Some(client) = all.clients.get_mut(number) {
                client.adopted = true;
            }
        }
        Ok(())
    }

    /// Ends the connections that a data server had, which is dead: its clients connect again.
    pub fn end_adopted(&self) {
        self.all().clients.retain(|_, client| {
            if client.adopted {
                // It may be closed from the other side already.
                let _ = rustix::net::shutdown(&client.socket, Shutdown::Both);
            }
            !client.adopted
        });
    }
}
