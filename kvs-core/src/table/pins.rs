//! Entries that are being sent straight from their memory. A large value is not copied for its answer: its entry is
//! *pinned*, and stays as it is when it is replaced or removed meanwhile, until it is sent.
//!
//! How a pin can't come too late: a reader pins, then makes sure that the entry is still the key's. A writer first makes it
//! not the key's, then looks for pins before it frees anything. Whoever locks the pins second sees what the other did.
//!
//! Lock: one for all pins of this process; only large values are pinned, and only their writers look. A crash forgets the
//! pins; whoever takes the connections over pins again what they were being sent, and nothing is freed before that.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How often each entry is pinned.
#[derive(Default)]
pub struct Pins {
    counts: Mutex<HashMap<u64, u64>>,
    /// Bytes of the values that backup rings name.
    waiting_bytes: AtomicU64,
    /// Not everything that is being sent is pinned.
    held: AtomicBool,
}

impl Pins {
    fn counts(&self) -> MutexGuard<'_, HashMap<u64, u64>> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Pins the entry at `offset` once more.
    pub fn add(&self, offset: u64) {
        *self.counts().entry(offset).or_insert(0) += 1;
    }

    /// Takes one pin off.
    pub fn remove(&self, offset: u64) {
        let mut counts = self.counts();
        match counts.get_mut(&offset) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(counts.remove(&offset)),
        }
    }

    /// Pins the entry at `offset`, whose value has so many bytes, for a backup ring.
    pub fn add_waiting(&self, offset: u64, bytes: u64) {
        self.waiting_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.add(offset);
    }

    /// Takes that pin off.
    pub fn remove_waiting(&self, offset: u64, bytes: u64) {
        self.waiting_bytes.fetch_sub(bytes, Ordering::Relaxed);
        self.remove(offset);
    }

    /// Bytes of the values that backup rings name: replaced ones among them can't be freed yet.
    pub fn waiting_bytes(&self) -> u64 {
        self.waiting_bytes.load(Ordering::Relaxed)
    }

    /// Whether entries are being sent that aren't pinned: until then nothing may be freed.
    pub fn hold(&self, held: bool) {
        self.held.store(held, Ordering::Release);
    }

    /// Whether nothing may be freed.
    pub fn are_held(&self) -> bool {
        self.held.load(Ordering::Acquire)
    }

    /// Whether the entry is pinned.
    pub fn contains(&self, offset: u64) -> bool {
        self.counts().contains_key(&offset)
    }
}
