//! What goes wrong with a message: the codes a server answers with, and why a payload could not be decoded.
//!
//! Invariant: the order of [`ErrorCode`] is part of the wire format; codes are appended, never moved.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::limits::KEY_BYTES_MAX;

/// Why a server did not do what was asked. On the wire a variant index, so the order is the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ErrorCode {
    /// The message could not be decoded; the connection ends.
    Malformed,
    /// The version of the frame or the protocol is not spoken here.
    UnsupportedVersion,
    /// The message is of a kind this server does not know.
    UnknownMessage,
    /// The frame is longer than any message may be; the connection ends.
    FrameTooLarge,
    /// The key is empty or too long.
    KeyLength,
    /// The value is too long.
    ValueLength,
    /// The value to increment is not a decimal number.
    NotANumber,
    /// The increment would leave the range of a signed 64-bit number.
    NumberRange,
    /// There is no memory left for the entry.
    StoreFull,
    /// The server has as many connections as it may; the connection ends.
    TooManyConnections,
    /// The part of the store the key belongs to is damaged and set aside.
    Damaged,
    /// The first message was not Hello; the connection ends.
    HelloExpected,
    /// The server is ending.
    ShuttingDown,
    /// A fault of the server itself; its log says more.
    Internal,
    /// The backup file can't be written, so nothing can be changed.
    BackupFailed,
    /// The session isn't this connection's, or the number has no place in it; the connection ends.
    Session,
}

impl ErrorCode {
    /// All of them, by their index on the wire.
    const ALL: [Self; 16] = [
        Self::Malformed,
        Self::UnsupportedVersion,
        Self::UnknownMessage,
        Self::FrameTooLarge,
        Self::KeyLength,
        Self::ValueLength,
        Self::NotANumber,
        Self::NumberRange,
        Self::StoreFull,
        Self::TooManyConnections,
        Self::Damaged,
        Self::HelloExpected,
        Self::ShuttingDown,
        Self::Internal,
        Self::BackupFailed,
        Self::Session,
    ];

    /// Its index on the wire.
    pub const fn index(self) -> u8 {
        self as u8
    }

    /// The code of an index.
    pub fn from_index(index: u8) -> Option<Self> {
        Self::ALL.get(usize::from(index)).copied()
    }
}

/// Why a payload is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The kind of message is not known to this version.
    #[error(
        "message kind {variant} is not known to this version; use a newer release on this side or an older one on the other"
    )]
    UnknownMessage {
        /// The number the message carries.
        number: u32,
        /// The variant index as received.
        variant: u32,
    },
    /// The bytes are no message.
    #[error("the message cannot be decoded: {reason}; the sender does not follow the kvs protocol")]
    Malformed {
        /// The number the message carries, 0 when even that cannot be read.
        number: u32,
        /// What is wrong.
        reason: &'static str,
    },
    /// The message is larger than the buffer of the server and not a Set, the only one that may be.
    #[error("only a set may be this large; send a shorter key or prefix")]
    NotASet {
        /// The number the message carries.
        number: u32,
    },
    /// The key of a large Set is empty or too long.
    #[error("a key of {found} bytes is not possible; keys have 1 to {KEY_BYTES_MAX} bytes")]
    KeyLength {
        /// The number the message carries.
        number: u32,
        /// The length as received.
        found: usize,
    },
}

impl DecodeError {
    /// The number of the message, for the answer.
    pub fn number(&self) -> u32 {
        match *self {
            DecodeError::UnknownMessage { number, .. }
            | DecodeError::Malformed { number, .. }
            | DecodeError::NotASet { number }
            | DecodeError::KeyLength { number, .. } => number,
        }
    }

    /// The code that tells this to the other side.
    pub fn code(&self) -> ErrorCode {
        match self {
            DecodeError::UnknownMessage { .. } => ErrorCode::UnknownMessage,
            DecodeError::Malformed { .. } => ErrorCode::Malformed,
            DecodeError::NotASet { .. } => ErrorCode::FrameTooLarge,
            DecodeError::KeyLength { .. } => ErrorCode::KeyLength,
        }
    }
}
