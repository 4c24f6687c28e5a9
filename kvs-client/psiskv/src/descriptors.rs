//! The table of descriptors: small positive integers for clients.
//!
//! Locks: the table's, for looking up only, then the client's, for a call. Never the table's while a call runs, so a slow server on one
//! descriptor holds up no other.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvs_client::Client;

/// A client in the table, and the process it belongs to.
pub struct Entry {
    process: u32,
    client: Mutex<Client>,
}

impl Entry {
    /// The client, for one call at a time; None in a process that only inherited it: two processes on one stream would get each
    /// other's answers.
    pub fn client(&self) -> Option<MutexGuard<'_, Client>> {
        (self.process == std::process::id()).then(|| lock(&self.client))
    }
}

static TABLE: Mutex<Vec<Option<Arc<Entry>>>> = Mutex::new(Vec::new());

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Gives the client the lowest free descriptor.
pub fn insert(client: Client) -> Option<i32> {
    let mut table = lock(&TABLE);
    let place = table.iter().position(Option::is_none).unwrap_or(table.len());
    let descriptor = i32::try_from(place + 1).ok()?;
    if place == table.len() {
        table.push(None);
    }
    table[place] = Some(Arc::new(Entry { process: std::process::id(), client: Mutex::new(client) }));
    Some(descriptor)
}

/// What the descriptor stands for.
pub fn get(descriptor: i32) -> Option<Arc<Entry>> {
    let place = usize::try_from(descriptor).ok()?.checked_sub(1)?;
    lock(&TABLE).get(place)?.clone()
}

/// Frees the descriptor. A call that runs on it in another thread ends first.
pub fn remove(descriptor: i32) {
    let place = usize::try_from(descriptor).ok().and_then(|descriptor| descriptor.checked_sub(1));
    let removed = place.and_then(|place| lock(&TABLE).get_mut(place)?.take());
    drop(removed);
}
