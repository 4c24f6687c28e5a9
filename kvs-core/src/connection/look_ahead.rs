//! Requests looked at before they are executed, so that their cache misses overlap: first the buckets of all of them are asked
//! for, then all entries. They may be of one client's pipeline, or of several clients that ask one thing each.
//!
//! What was found out on the way is kept for their execution: the hash, and of a read where its key is. A request is known by its
//! connection and its place in the stream, where nothing else will ever be.

use std::ops::Range;

use crate::limits::KEY_BYTES_MAX;
use crate::table::{KeyHash, Table};
use crate::wire::{self, FRAME_HEADER_BYTES, Request, RequestBody};

/// Requests looked at together: about as many misses as a core can have under way.
const REQUESTS_MAX: usize = 16;

/// What was looked at ahead.
pub(super) struct LookAhead {
    seen: Vec<Seen>,
    /// Where the one is expected that is asked for next.
    next: usize,
}

/// A request that was looked at ahead.
pub(super) struct Seen {
    /// Number of the connection it came on.
    connection: u64,
    /// Where it begins in the stream.
    position: u64,
    /// The hash of its key.
    pub hash: KeyHash,
    /// It changes what is there.
    is_change: bool,
    /// What its home names for it is asked for.
    is_near: bool,
    /// What else is to be known of it, if it is a read.
    pub read: Option<Read>,
}

/// A read that was decoded ahead.
#[derive(Clone)]
pub(super) struct Read {
    /// The client's number of it.
    pub number: u32,
    /// The hash of its key.
    pub hash: KeyHash,
    /// Where in its frame the key is.
    pub key: Range<usize>,
    /// Bytes of its frame.
    pub total: usize,
}

impl LookAhead {
    pub fn new() -> Self {
        Self { seen: Vec::with_capacity(REQUESTS_MAX), next: 0 }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.seen.clear();
        self.next = 0;
    }

    /// Whether no more are looked at now.
    pub fn is_full(&self) -> bool {
        self.seen.len() >= REQUESTS_MAX
    }

    /// Asks for the buckets of the requests in `bytes`, which begin at stream position `at` of the connection.
    pub fn look(&mut self, table: &Table, connection: u64, at: u64, bytes: &[u8]) {
        let (mut position, mut rest) = (at, bytes);
        while !self.is_full() {
            let Ok(Some(extent)) = wire::peek(rest, rest.len()) else { break };
            let Some(payload) = rest.get(FRAME_HEADER_BYTES..extent.total) else { break };
            if let Some(seen) = look_at(table, (connection, position), payload, extent.total) {
                table.prefetch_bucket(seen.hash);
                self.seen.push(seen);
            }
            position += extent.total as u64;
            rest = &rest[extent.total..];
        }
    }

    /// Asks for the entries of the requests, whose buckets have been asked for; a single one gains nothing by it.
    pub fn fetch(&mut self, table: &Table) {
        if self.seen.len() < 2 {
            return;
        }
        self.seen.iter_mut().for_each(|seen| seen.is_near = table.prefetch_entry(seen.hash, seen.is_change));
        let beyond = self.seen.iter().filter(|seen| !seen.is_near);
        beyond.for_each(|seen| table.prefetch_entry_beyond(seen.hash, seen.is_change));
    }

    /// The request at stream position `at` of the connection, if it was looked at.
    #[inline]
    pub fn find(&mut self, connection: u64, at: u64) -> Option<&Seen> {
        let later = self.seen.get(self.next..)?;
        let step = later.iter().position(|seen| seen.position == at && seen.connection == connection)?;
        self.next += step;
        self.seen.get(self.next)
    }
}

/// What concerns a key, of the request at a position of a connection's stream.
fn look_at(table: &Table, (connection, position): (u64, u64), payload: &[u8], total: usize) -> Option<Seen> {
    let Request { number, body } = wire::decode_request(payload).ok()?;
    let (key, is_read) = match body {
        RequestBody::Get { key } => (key, true),
        RequestBody::Set { key, .. } | RequestBody::Delete { key } | RequestBody::Increment { key, .. } => {
            (key, false)
        }
        _ => return None,
    };
    let hash = table.hash_of(key);
    let read = (is_read && (1..=KEY_BYTES_MAX).contains(&key.len())).then(|| {
        let start = FRAME_HEADER_BYTES + (key.as_ptr().addr() - payload.as_ptr().addr());
        Read { number, hash, key: start..start + key.len(), total }
    });
    Some(Seen { connection, position, hash, is_change: !is_read, is_near: false, read })
}
