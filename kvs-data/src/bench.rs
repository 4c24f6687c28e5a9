//! Where a client is in a data server, and where those of a standby sit until they are served.
//!
//! The slot of a client in the segment tells its worker, its place there and the number of its descriptor: the same in every data
//! server of an instance. An epoll knows what it waits for by file and number. So a standby goes on with the epolls of the one
//! that died as if it had filled them itself: what is ready is known at once, nothing has to be done for a client that is silent, and nothing
//! that was registered has to be taken out when a process dies.
//!
//! ```text
//! slot 5 of 2 workers:  worker 1, place 2, descriptor 517
//! ```
//!
//! Where a number is taken, a client keeps that with which it came. It is served all the same, but a data server that takes over
//! registers it once more, and is told twice of what comes, until the connection ends.
//!
//! Lock: one a bench, for a moment. Once the worker has begun, nobody but the worker knows its clients.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvs_core::connection::slot::SlotIndex;
use kvs_core::control::{Adopted, Seat, token_connection};
use kvs_core::limits::FIRST_CLIENT_DESCRIPTOR;
use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};

/// Where a client is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Index of its worker.
    pub worker: usize,
    /// Its place there.
    pub place: usize,
}

impl Place {
    /// Where the client in a slot is, among so many workers.
    pub fn of(slot: SlotIndex, workers: usize) -> Self {
        // There are fewer slots than an address has values.
        let slot = slot as usize;
        Self { worker: slot % workers, place: slot / workers }
    }
}

/// A client that isn't served yet.
pub struct Seated {
    /// Its slot.
    pub index: SlotIndex,
    /// The slot is its own even while it is free: this data server has claimed it. Else the one before did, and may have given it to
    /// another client since.
    pub owns_slot: bool,
    /// Who it is.
    pub adopted: Adopted,
    /// Its socket.
    pub socket: OwnedFd,
}

impl Seated {
    /// A client with its socket, which gets the number that goes with the slot.
    pub fn new(Seat { adopted, slot: index }: Seat, owns_slot: bool, socket: OwnedFd) -> Self {
        Self { index, owns_slot, adopted, socket: renumber(socket, index) }
    }

    /// What others know it by.
    pub fn seat(&self) -> Seat {
        Seat { adopted: self.adopted, slot: self.index }
    }
}

/// Gives a socket the number of the client in a slot, unless something else has it, or there are no numbers that high.
fn renumber(socket: OwnedFd, slot: SlotIndex) -> OwnedFd {
    let number = i32::try_from(slot).ok().and_then(|slot| FIRST_CLIENT_DESCRIPTOR.checked_add(slot));
    let Some(number) = number else { return socket };
    match rustix::io::fcntl_dupfd_cloexec(&socket, number) {
        Ok(renumbered) if renumbered.as_raw_fd() == number => renumbered,
        _ => socket,
    }
}

/// Clients of whom an epoll is asked, at most.
const SPEAKING_MAX: usize = 256;

/// Connections from which something has come, as the epolls know; some of them, if they are many. What is said once only is not said again:
/// for a data server whose workers have not begun.
pub fn speaking(epolls: &[OwnedFd]) -> Vec<u64> {
    let events_of = |epoll| {
        let mut events = Vec::with_capacity(SPEAKING_MAX);
        // Whatever goes wrong, it is only about the order.
        let _ = epoll::wait(epoll, spare_capacity(&mut events), Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
        events
    };
    epolls.iter().flat_map(events_of).map(|event| token_connection(event.data.u64())).collect()
}

/// Those who sit, by their place at the worker.
type Seats = Vec<Option<Seated>>;

/// Where the clients of a worker sit.
pub struct Bench {
    /// None once the worker has begun.
    seats: Mutex<Option<Seats>>,
}

impl Bench {
    /// An empty one.
    pub fn new() -> Self {
        Self { seats: Mutex::new(Some(Vec::new())) }
    }

    fn seats(&self) -> MutexGuard<'_, Option<Seats>> {
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a client its `place`. Whoever sat there has left, and that wasn't told yet: its number is given.
    ///
    /// # Errors
    /// The client, when the worker has begun.
    pub fn sit(&self, place: usize, seat: Seat, socket: OwnedFd) -> Result<Option<u64>, Seated> {
        let mut seats = self.seats();
        let Some(seats) = &mut *seats else { return Err(Seated::new(seat, false, socket)) };
        if seats.len() <= place {
            seats.resize_with(place + 1, || None);
        }
        // Its descriptor's number is the next one's.
        let before = seats[place].take().map(|before| before.adopted.connection);
        seats[place] = Some(Seated::new(seat, false, socket));
        Ok(before)
    }

    /// A client has been closed, by whom it was registered. False when the worker has begun, which finds that out.
    pub fn leave(&self, place: usize) -> bool {
        let mut seats = self.seats();
        let Some(seats) = &mut *seats else { return false };
        seats[place] = None;
        true
    }

    /// The worker begins.
    pub fn clear(&self) -> Seats {
        self.seats().take().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    //! Goal: the same client has the same number in every process. Method: sockets of this one.

    use std::collections::HashSet;

    use kvs_core::control::{Transport, token};
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    fn socket() -> OwnedFd {
        socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).expect("a pair").0
    }

    fn seat(connection: u64, slot: SlotIndex) -> Seat {
        Seat { adopted: Adopted { connection, transport: Transport::Unix }, slot }
    }

    #[test]
    fn place_of_every_slot_is_its_own() {
        for workers in 1..5 {
            let places = (0..100).map(|slot| Place::of(slot, workers));
            let distinct: HashSet<(usize, usize)> =
                places.map(|Place { worker, place }| (worker, place)).collect();
            assert_eq!(distinct.len(), 100);
            assert!(distinct.iter().all(|&(worker, place)| worker < workers && place <= 100 / workers));
        }
    }

    #[test]
    fn socket_has_the_number_of_its_slot_unless_that_is_taken() {
        // Slots of their own: tests run side by side in one process.
        let seated = Seated::new(seat(1, 300), true, socket());
        assert_eq!(seated.socket.as_raw_fd(), FIRST_CLIENT_DESCRIPTOR + 300);
        assert!(
            rustix::io::fcntl_getfd(&seated.socket).expect("open").contains(rustix::io::FdFlags::CLOEXEC)
        );
        let other = Seated::new(seat(2, 300), true, socket());
        assert_ne!(other.socket.as_raw_fd(), seated.socket.as_raw_fd());
        for slot in [u64::MAX, i32::MAX as u64, i32::MAX as u64 - 512] {
            let unplaced = Seated::new(seat(3, slot), true, socket());
            assert!(unplaced.socket.as_raw_fd() < FIRST_CLIENT_DESCRIPTOR, "slot {slot}");
        }
    }

    #[test]
    fn epolls_name_those_from_whom_something_has_come() {
        let [one, other] = [(); 2].map(|()| epoll::create(epoll::CreateFlags::CLOEXEC).expect("an epoll"));
        let mut ends = Vec::new();
        for (connection, epoll) in [(7, &one), (8, &one), (9, &other)] {
            let flags = SocketFlags::CLOEXEC;
            let (far, near) =
                socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).expect("a pair");
            let data = epoll::EventData::new_u64(token(3, connection));
            epoll::add(epoll, &near, data, epoll::EventFlags::IN).expect("room");
            ends.push((far, near));
        }
        let epolls = [one, other];
        assert!(speaking(&epolls).is_empty());
        for (far, _) in &ends[1..] {
            rustix::net::send(far, b"request", rustix::net::SendFlags::empty()).expect("open");
        }
        assert_eq!(speaking(&epolls), [8, 9]);
    }

    #[test]
    fn bench_gives_the_number_on_with_the_place_and_keeps_nobody_for_a_worker_that_has_begun() {
        let bench = Bench::new();
        assert!(matches!(bench.sit(3, seat(1, 310), socket()), Ok(None)));
        assert!(matches!(bench.sit(3, seat(2, 310), socket()), Ok(Some(1))));
        assert!(matches!(bench.sit(0, seat(3, 307), socket()), Ok(None)));
        assert!(bench.leave(0));
        let seats = bench.clear();
        let connections = seats.iter().map(|seated| Some(seated.as_ref()?.adopted.connection));
        assert_eq!(connections.collect::<Vec<_>>(), [None, None, None, Some(2)]);
        let second = seats[3].as_ref().expect("sits");
        assert_eq!(second.socket.as_raw_fd(), FIRST_CLIENT_DESCRIPTOR + 310);
        assert!(!bench.leave(3));
        assert!(matches!(bench.sit(0, seat(4, 307), socket()), Err(late) if late.adopted.connection == 4));
    }
}
