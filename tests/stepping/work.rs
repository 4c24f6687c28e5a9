//! What a child does between its two stops.

use crate::backup::Backup;

/// What is stepped through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// A worker executes requests.
    Requests,
    /// A worker takes up a connection and answers the client's hello.
    Connect,
    /// A worker ends a connection.
    Close,
    /// The housekeeping thread reserves an extent.
    Reserve,
    /// What the backup thread does.
    Backup(Backup),
}

/// All of them with their names on the command line.
const NAMES: [(Work, &str); 6] = [
    (Work::Requests, "requests"),
    (Work::Connect, "connect"),
    (Work::Close, "close"),
    (Work::Reserve, "reserve"),
    (Work::Backup(Backup::Drain), "drain"),
    (Work::Backup(Backup::HandOver), "hand-over"),
];

impl Work {
    /// Its name.
    pub fn name(self) -> &'static str {
        NAMES.iter().find(|(work, _)| *work == self).map_or("", |(_, name)| name)
    }

    /// What is called so.
    pub fn called(name: &str) -> Option<Self> {
        NAMES.iter().find(|(_, other)| *other == name).map(|(work, _)| *work)
    }
}
