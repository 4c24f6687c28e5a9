//! What can go wrong, for whoever called.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use kvs_core::limits::KEY_BYTES_MAX;
use kvs_core::wire::ErrorCode;

/// Why a call did not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The address can't be one.
    #[error(
        "{address:?} is no address of a server: {reason}; write HOST:PORT, unix:PATH or a path with a slash"
    )]
    Address {
        /// As given.
        address: String,
        /// Why not.
        reason: String,
    },
    /// Nobody is there.
    #[error("can't connect to {address}: {source}; is the server running there?")]
    Connect {
        /// Where.
        address: String,
        /// What the system says.
        source: io::Error,
    },
    /// Somebody else is there.
    #[error("what answers on {address} is no kvs server: {reason}")]
    NotKvs {
        /// Where.
        address: String,
        /// How that showed.
        reason: String,
    },
    /// The server doesn't take this client.
    #[error("the server refused the connection: {message}")]
    Refused {
        /// Why, and what to do.
        message: String,
    },
    /// The connection broke, and for so long no other could be made.
    #[error("the connection to the server is lost, and connecting again failed for {tried:?}: {source}")]
    Disconnected {
        /// How long it was tried.
        tried: Duration,
        /// How the last attempt failed.
        source: io::Error,
    },
    /// The connection broke before the answer came, and the server that is there now remembers nothing of this client: the
    /// machine was started again, the store was purged, or it keeps no sessions.
    #[error(
        "the connection broke before the answer came, and the server has lost its memory of this client: the request may have \
         been executed or not; look before you repeat it"
    )]
    Interrupted,
    /// The key is empty or too long.
    #[error("a key of {found} bytes is not possible; keys have 1 to {KEY_BYTES_MAX} bytes")]
    KeyLength {
        /// Its length.
        found: usize,
    },
    /// The value is too long.
    #[error(
        "a value of {found} bytes is longer than the server's limit of {max}; send a smaller one or start the server with a larger --max-value"
    )]
    ValueLength {
        /// Its length.
        found: usize,
        /// The longest the server takes.
        max: u64,
    },
    /// The value to increment is not a decimal number.
    #[error("the value is not a decimal number of 64 bits, so nothing can be added to it")]
    NotANumber,
    /// The sum can't be held.
    #[error("the sum would leave the range of a 64-bit number")]
    NumberRange,
    /// There is no memory for it.
    #[error("{message}")]
    StoreFull {
        /// What to do.
        message: String,
    },
    /// Something else the server says.
    #[error("the server says: {message}")]
    Server {
        /// What.
        message: String,
    },
    /// No instance can have this name.
    #[error("{reason}")]
    InstanceName {
        /// Why not.
        reason: String,
    },
    /// There is no store to read from: it was never started, or it was purged.
    #[error("there is no store at {}: start one with `kvs-front --name NAME` on this machine", path.display())]
    NoStore {
        /// Where its segment would be.
        path: PathBuf,
    },
    /// The store is loading its backup file.
    #[error("the store at {} is still loading its backup file; try again when it is ready", path.display())]
    Loading {
        /// Where its segment is.
        path: PathBuf,
    },
    /// The segment can't be read.
    #[error("{reason}")]
    Segment {
        /// What is wrong with it, and what to do.
        reason: String,
    },
    /// A part of the store is damaged.
    #[error(
        "the key's part of the store, shard {shard}, is damaged and set aside; `kvs-tools check` says what is wrong"
    )]
    Quarantined {
        /// Which.
        shard: u64,
    },
    /// Writers were faster every time.
    #[error("the value changes faster than it can be copied; try again, or ask the server for it")]
    Contended,
    /// What came is no answer to what was asked.
    #[error("the server sent what this client does not understand ({0}); use matching releases")]
    Protocol(String),
}

impl Error {
    /// What the server answered, as an error of the call.
    pub(crate) fn from_answer(code: ErrorCode, message: &str) -> Self {
        let message = message.to_owned();
        match code {
            ErrorCode::NotANumber => Error::NotANumber,
            ErrorCode::NumberRange => Error::NumberRange,
            ErrorCode::StoreFull => Error::StoreFull { message },
            ErrorCode::TooManyConnections | ErrorCode::UnsupportedVersion => Error::Refused { message },
            _ => Error::Server { message },
        }
    }
}
