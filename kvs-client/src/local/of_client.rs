//! A client's reads, served from the shared memory of the very server that it is connected to.
//!
//! Invariants
//! - The segment is the server's own: the server tells its name and identity over the connection, and the segment that has this
//!   identity also has this connection among those it serves. So neither a server on another machine, reached through a port
//!   that is forwarded, nor another instance is ever taken for it.
//! - What was answered is seen: a change is in the segment before its answer is given.
//! - What can't be read here is asked of the server: nothing fails because of this.

use crate::{Error, LocalReader, Statistic};

use super::segment::Replaced;
use std::time::Duration;

/// Where a client's reads come from.
#[derive(Default)]
pub struct LocalReads {
    /// Number of the connection whose server was asked last.
    asked_over: Option<u64>,
    /// The server's segment; None when it is not on this machine, or no longer the one.
    reader: Option<LocalReader>,
}

impl LocalReads {
    /// Whether the server of connection `number` is still to be asked where its segment is.
    pub fn is_new(&self, number: u64) -> bool {
        self.asked_over != Some(number)
    }

    /// Takes what the server of connection `number` tells of itself; nothing when it couldn't be asked.
    pub fn meet(&mut self, number: u64, statistics: &[(String, Statistic)]) {
        self.asked_over = Some(number);
        self.reader = find(number, statistics);
    }

    /// Reads a value, if that can be done here.
    pub fn get(&mut self, key: &[u8]) -> Option<Option<Vec<u8>>> {
        let read = self.reader.as_mut()?.get(key);
        self.settle(read)
    }

    /// Reads the values of all keys, if that can be done here.
    pub fn get_many(&mut self, keys: &[&[u8]]) -> Option<Vec<Option<Vec<u8>>>> {
        let mut values = Vec::with_capacity(keys.len());
        let read = self.reader.as_mut()?.get_many(keys, |_, value| values.push(value.map(<[u8]>::to_vec)));
        self.settle(read).map(|()| values)
    }

    /// What was read; None after an error, and never again from a segment that is of no more use.
    fn settle<T>(&mut self, read: Result<T, Error>) -> Option<T> {
        match read {
            Ok(read) => Some(read),
            Err(Error::Contended | Error::KeyLength { .. } | Error::Quarantined { .. }) => None,
            Err(_) => {
                self.reader = None;
                None
            }
        }
    }
}

/// The segment of the server that tells this over connection `number`.
fn find(number: u64, statistics: &[(String, Statistic)]) -> Option<LocalReader> {
    let text = |wanted: &str| {
        statistics.iter().find_map(|(name, value)| match value {
            Statistic::Text(text) if name == wanted => Some(text.as_str()),
            _ => None,
        })
    };
    let identity = text("segment_identity")?;
    let mut reader = LocalReader::open(text("name")?).ok()?;
    let mapped = reader.mapped.as_ref()?;
    if mapped.identity()? != identity || !mapped.has_connection(number) {
        return None;
    }
    // The server is there to be asked.
    (reader.replaced, reader.patience) = (Replaced::Refuse, Duration::ZERO);
    Some(reader)
}
