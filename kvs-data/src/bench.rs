//! Where the clients of a worker sit before they are served: in a standby all of them, else those that were just passed on from a
//! data server that died.
//!
//! Their sockets are in the worker's epoll already, on which nobody waits before the worker begins. So when a standby takes
//! over, what is ready is known at once, and nothing has to be done for a client that is silent.
//!
//! Lock: one, for a moment. Once the worker has begun, nobody but the worker knows its clients.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Context as _;
use kvs_core::connection::slot::SlotIndex;
use kvs_core::control::{self, Adopted, Seat};
use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};

/// Clients with something unread after which the kernel isn't asked on.
const EVENTS_MAX: usize = 256;

/// A client that isn't served yet.
pub struct Seated {
    /// Its slot.
    pub index: SlotIndex,
    /// The slot is its own even while it is free: this data server has claimed it. Else the one before did, and may have given it to
    /// another client since, which sits somewhere else.
    pub owns_slot: bool,
    /// Who it is.
    pub adopted: Adopted,
    /// Its socket.
    pub socket: OwnedFd,
}

impl Seated {
    /// What others know it by.
    pub fn seat(&self) -> Seat {
        Seat { adopted: self.adopted, slot: self.index }
    }
}

/// The clients by their place, which is in their token in the epoll.
#[derive(Default)]
pub struct Places {
    /// Those taken.
    pub seats: Vec<Option<Seated>>,
    /// Those free.
    pub free: Vec<usize>,
}

impl Places {
    /// Takes a place.
    fn take(&mut self) -> usize {
        self.free.pop().unwrap_or_else(|| {
            self.seats.push(None);
            self.seats.len() - 1
        })
    }
}

/// The bench.
pub struct Bench {
    /// What the worker waits in.
    pub epoll: Arc<OwnedFd>,
    /// None once the worker has begun.
    places: Mutex<Option<Places>>,
}

impl Bench {
    /// An empty one.
    ///
    /// # Errors
    /// When no descriptor is to be had.
    pub fn new() -> anyhow::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).context("can't make an epoll")?;
        Ok(Self { epoll: Arc::new(epoll), places: Mutex::new(Some(Places::default())) })
    }

    fn places(&self) -> MutexGuard<'_, Option<Places>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a client a place; none when the kernel has no memory for it: then it is passed on by the front server, later.
    ///
    /// # Errors
    /// The client, when the worker has begun.
    pub fn sit(&self, seated: Seated) -> Result<Option<usize>, Seated> {
        let mut places = self.places();
        let Some(places) = &mut *places else { return Err(seated) };
        let place = places.take();
        let token = EventData::new_u64(control::token(place, seated.adopted.connection));
        if epoll::add(&self.epoll, &seated.socket, token, EventFlags::IN).is_err() {
            places.free.push(place);
            return Ok(None);
        }
        places.seats[place] = Some(seated);
        Ok(Some(place))
    }

    /// A client has been closed. False when the worker has begun, which finds that out.
    pub fn leave(&self, place: usize) -> bool {
        let mut places = self.places();
        let Some(places) = &mut *places else { return false };
        if let Some(seated) = places.seats.get_mut(place).and_then(Option::take) {
            // Other duplicates keep the socket in the epoll otherwise.
            let _ = epoll::delete(&self.epoll, seated.socket.as_fd());
            places.free.push(place);
        }
        true
    }

    /// Lets the kernel forget which clients had sent something that is read by now: it notes that for each of them, until somebody
    /// looks, and the worker's first look would be one at all of them.
    pub fn forget_noise(&self) {
        let mut events = Vec::with_capacity(EVENTS_MAX);
        // What is unread it keeps.
        let _ =
            epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
    }

    /// The worker begins.
    pub fn clear(&self) -> Places {
        self.places().take().unwrap_or_default()
    }
}
