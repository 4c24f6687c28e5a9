//! Copying all entries while they are being changed, for a new backup file: home by home, each as it was at one moment.
//!
//! Large values are pinned instead of copied, before the home is found unchanged, and let go when they are written.
//!
//! Lock: none, unless writers are faster every time. A crash forgets the pins with the process.

use super::entry::Entry;
use super::pins::Pins;
use super::view::{Collector, Position};
use super::{Table, TableError};
use crate::arena::size_class::SIZE_MAX;
use crate::sys::memory::Damaged;

impl Table {
    /// Copies the entries of the home at `cursor` into `found`, large ones pinned instead; returns the cursor of the next home,
    /// None at the end. Every key that is there from the first call to the last is found exactly once, also while the table
    /// grows.
    ///
    /// # Errors
    /// As [`Table::read`].
    pub fn snapshot_home(&self, cursor: u64, found: &mut HomeEntries) -> Result<Option<u64>, TableError> {
        let position = Position::of(cursor);
        if position.shard >= self.segment.regions().shard_count {
            return Ok(None);
        }
        let mut collecting = Collecting { pins: &self.pins, found };
        let next = self.settle(position.shard, || self.view().collect_home(position, &mut collecting))?;
        let next = position.next(next);
        Ok(Some(next).filter(|next| next.shard < self.segment.regions().shard_count).map(Position::cursor))
    }

    /// Lets every large entry of `found` go, and forgets the rest.
    pub fn release_home(&self, found: &mut HomeEntries) {
        Collecting { pins: &self.pins, found }.clear();
    }
}

/// What [`Table::snapshot_home`] found.
#[derive(Default)]
pub struct HomeEntries {
    /// Keys and values of the small entries, one behind the other.
    bytes: Vec<u8>,
    entries: Vec<HomeEntry>,
}

#[derive(Clone, Copy)]
struct HomeEntry {
    version: u64,
    key_length: usize,
    value_length: usize,
    /// Where it is; 0 when it was copied.
    pinned: u64,
}

/// An entry of a home.
pub struct Snapshot<'h> {
    /// Its version.
    pub version: u64,
    /// Bytes of its key.
    pub key_length: usize,
    /// Bytes of its value.
    pub value_length: usize,
    /// Key and value, or where the pinned entry is that holds them.
    pub content: Result<&'h [u8], u64>,
}

impl HomeEntries {
    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = Snapshot<'_>> {
        let mut rest = &self.bytes[..];
        self.entries.iter().map(move |entry| {
            let HomeEntry { version, key_length, value_length, pinned } = *entry;
            let content = if pinned == 0 {
                let (now, later) = rest.split_at(key_length + value_length);
                rest = later;
                Ok(now)
            } else {
                Err(pinned)
            };
            Snapshot { version, key_length, value_length, content }
        })
    }
}

struct Collecting<'c> {
    pins: &'c Pins,
    found: &'c mut HomeEntries,
}

impl Collector for Collecting<'_> {
    fn clear(&mut self) {
        let pinned = self.found.entries.drain(..).filter(|entry| entry.pinned != 0);
        pinned.for_each(|entry| self.pins.remove(entry.pinned));
        self.found.bytes.clear();
    }

    fn push(&mut self, entry: &Entry<'_>) -> Result<(), Damaged> {
        // Pinned before the home is found unchanged: see `pins`.
        let pinned = if entry.is_chunked() {
            self.pins.add(entry.offset);
            entry.offset
        } else {
            if entry.key_length() + entry.value_length() > SIZE_MAX {
                return Err(Damaged { offset: entry.offset });
            }
            entry.append_content(&mut self.found.bytes)?;
            0
        };
        let (key_length, value_length) = (entry.key_length() as usize, entry.value_length() as usize);
        self.found.entries.push(HomeEntry { version: entry.version(), key_length, value_length, pinned });
        Ok(())
    }
}
