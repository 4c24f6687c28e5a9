//! How many files a server may have open, and how many clients that leaves room for.
//!
//! Every client takes a descriptor in the front server and one in the data server, which inherits the limit. A socket
//! that the data server has no descriptor for would be lost on the way; so the front server accepts no more than both can
//! hold, and tells the others.

use anyhow::bail;
use kvs_front::options::ServerOptions;
use kvs_front::process;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// What a server needs besides its clients. The front server: standard streams, listening sockets, the data server's socket, process,
/// liveness page and segment, twice while one takes over from another; refused clients that still read why; operators. The data server,
/// which needs less: the listening sockets too, for the next front server, and that one's process and socket; the segment
/// and the files of the backup.
const OWN: u64 = 52;
/// What one worker takes: in the data server two, in the front server its epoll.
const WORKER_OWN: u64 = 2;

/// How many clients there may be at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionLimit {
    /// The number.
    pub most: u32,
    /// Why it isn't more: `--max-connections`, or the limit of open files.
    pub by_descriptors: bool,
}

impl ConnectionLimit {
    /// What the client is told that is one too many.
    pub fn message(&self) -> String {
        let remedy = if self.by_descriptors {
            "raise the server's limit of open files (ulimit -n)"
        } else {
            "raise --max-connections"
        };
        format!("the limit of {} connections is reached; close one, or {remedy}", self.most)
    }
}

/// Raises the limit of open files as far as this process may, and makes room for them. To be called before there are threads.
///
/// # Errors
/// When that leaves no room for a single client.
pub fn raise(options: &ServerOptions) -> anyhow::Result<ConnectionLimit> {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        log::warn!("can't raise the limit of open files: {error}");
    }
    let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let own = own(options.worker_count() as u64);
    let Some(limit) = room(options.max_connections, own, files) else {
        bail!(
            "only {files} files may be open, and the servers need {own} themselves; raise it with `ulimit -n`"
        );
    };
    if limit.by_descriptors {
        log::warn!(
            "only {files} files may be open, so {} clients can be served, not {}: raise it with `ulimit -n {}`, or lower \
             --max-connections",
            limit.most,
            options.max_connections,
            u64::from(options.max_connections) + own
        );
    }
    process::reserve_descriptors(u64::from(limit.most) + own);
    Ok(limit)
}

/// Descriptors that a server needs besides its clients.
fn own(workers: u64) -> u64 {
    OWN + WORKER_OWN * workers
}

/// How many of `wanted` clients there is room for; None when there is none for any.
fn room(wanted: u32, own: u64, files: u64) -> Option<ConnectionLimit> {
    let most = files.saturating_sub(own);
    match u32::try_from(most) {
        Ok(0) => None,
        Ok(most) if most < wanted => Some(ConnectionLimit { most, by_descriptors: true }),
        _ => Some(ConnectionLimit { most: wanted, by_descriptors: false }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_leave_room_for_as_many_clients_as_both_servers_can_hold() {
        let limit = |most, by_descriptors| Some(ConnectionLimit { most, by_descriptors });
        assert_eq!(room(10_000, own(2), 1_024), limit(968, true));
        assert_eq!(room(10_000, own(2), u64::MAX), limit(10_000, false));
        assert_eq!(room(10_000, own(2), 10_056), limit(10_000, false));
        assert_eq!(room(100, own(63), 256), limit(78, true));
        assert_eq!(room(10, own(1), 54), None);
        assert_eq!(room(10, own(1), 55), limit(1, true));
    }

    #[test]
    fn descriptors_a_refused_client_learns_what_to_raise() {
        let limit = ConnectionLimit { most: 16, by_descriptors: true };
        assert!(limit.message().contains("16") && limit.message().contains("ulimit"));
        let limit = ConnectionLimit { most: 10, by_descriptors: false };
        assert!(limit.message().contains("10") && limit.message().contains("--max-connections"));
    }
}
