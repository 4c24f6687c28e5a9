//! A client's reads, served from the shared memory of the very server that it is connected to.
//!
//! Invariants
//! - The segment is the server's own: the server tells its name and identity over the connection, and the segment that has this
//!   identity also has this connection among those it serves. So neither a server on another machine, reached through a port
//!   that is forwarded, nor another instance is ever taken for it.
//! - What was answered is seen: a change is in the segment before its answer is given.
//! - What can't be read here is asked of the server: nothing fails because of this.

use std::time::Duration;

use super::segment::{LOOK_EVERY_NS, Replaced, coarse_ns};
use crate::{Error, LocalReader, Statistic};

/// Where a client's reads come from.
pub struct LocalReads {
    /// Whether the server of the connection that there is was asked where its segment is.
    has_met: bool,
    /// The segment of the server that was met last; None when it is not on this machine, or no longer the one.
    reader: Option<LocalReader>,
    /// When the connection was looked at last.
    looked_ns: i64,
}

impl Default for LocalReads {
    fn default() -> Self {
        Self { has_met: false, reader: None, looked_ns: coarse_ns() }
    }
}

impl LocalReads {
    /// Whether it is time to see whether the connection is still there: a client that only reads would else never find out, and
    /// its server may be another one by now.
    pub fn is_due(&mut self) -> bool {
        let now = coarse_ns();
        let is_due = now.wrapping_sub(self.looked_ns) >= LOOK_EVERY_NS;
        self.looked_ns = if is_due { now } else { self.looked_ns };
        is_due
    }

    /// Whether the server of the connection was asked where its segment is.
    pub fn has_met(&self) -> bool {
        self.has_met
    }

    /// There is another connection, maybe to another server. Until it is asked, nothing is known of it.
    pub fn forget(&mut self) {
        (self.has_met, self.reader) = (false, None);
    }

    /// Takes what the server of connection `number` tells of itself; nothing when it couldn't be asked.
    pub fn meet(&mut self, number: u64, statistics: &[(String, Statistic)]) {
        (self.has_met, self.reader) = (true, find(number, statistics));
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

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use kvs_core::connection::slot;
    use kvs_core::control::{Adopted, Transport};
    use kvs_core::limits::CAPACITY_BYTES_MIN;
    use kvs_core::segment::{Segment, identity};

    use super::*;

    struct Removed(PathBuf);

    impl Drop for Removed {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    fn told(name: &str, identity: &str) -> Vec<(String, Statistic)> {
        let text = |name: &str, text: &str| (name.to_owned(), Statistic::Text(text.to_owned()));
        vec![text("name", name), text("version", "0"), text("segment_identity", identity)]
    }

    #[test]
    fn local_reads_are_of_the_server_that_has_this_connection_in_this_segment() {
        let name = format!("client-unit-{}", std::process::id());
        let path = Removed(format!("/dev/shm/kvs-{name}").into());
        let segment = Segment::open_or_create(&path.0, CAPACITY_BYTES_MIN).expect("room").segment;
        let identity = identity(segment.header().expect("sound"));
        let adopted = Adopted { connection: 7, transport: Transport::Tcp };
        let slot = slot::open(&segment, 0, adopted).expect("room");
        let greet = |pid| slot::store_client(segment.memory(), slot, Transport::Tcp, "unit", pid);
        greet(std::process::id());
        assert!(find(7, &told(&name, &identity)).is_some());
        assert!(find(8, &told(&name, &identity)).is_none(), "another connection");
        assert!(find(7, &told(&name, &identity.replace(&identity[..8], "00000000"))).is_none());
        assert!(find(7, &told("no-such-instance", &identity)).is_none());
        assert!(find(7, &told(&name, &identity)[..2]).is_none(), "an earlier server");
        assert!(find(7, &[]).is_none());
        greet(std::process::id() + 1);
        assert!(find(7, &told(&name, &identity)).is_none(), "another client");
    }
}
