//! Frames: where a message begins and ends in a stream of bytes.
//!
//! Invariants: a length is checked against its limit as soon as its four bytes are there, before anything is
//! waited for or taken on its account. Finding the extent of a frame is separate from having all of it, because the data
//! server streams frames that are larger than its buffer.

use thiserror::Error;

use super::ErrorCode;
use crate::limits::{FRAME_OVERHEAD_BYTES_MAX, KEY_BYTES_MAX, VALUE_BYTES_MAX_LIMIT};

/// Version of the frame and message format; the fifth byte of every frame.
pub const WIRE_VERSION: u8 = 1;
/// Bytes before the payload: the length field and the version.
pub const FRAME_HEADER_BYTES: usize = LENGTH_FIELD_BYTES + 1;
/// Most bytes of keys, with their lengths, in one [`Keys`](super::ResponseBody::Keys) answer, not counting the last key.
pub const LIST_PAGE_BYTES_MAX: usize = 1 << 20;

pub(super) const LENGTH_FIELD_BYTES: usize = 4;
/// The version and the shortest message, a number and a variant of one byte each.
const LENGTH_MIN: usize = 3;

/// The first four bytes of what HTTP clients and servers say.
const HTTP_STARTS: [&[u8; 4]; 11] =
    [b"GET ", b"POST", b"HEAD", b"PUT ", b"OPTI", b"DELE", b"PATC", b"TRAC", b"CONN", b"PRI ", b"HTTP"];

// Four letters read as a length are at least 0x20000000. As long as no frame may be that long, an HTTP request is never
// taken for a frame.
const _: () =
    assert!(VALUE_BYTES_MAX_LIMIT as usize + KEY_BYTES_MAX + FRAME_OVERHEAD_BYTES_MAX < 0x2000_0000);

/// Why the start of a frame is refused. The stream has no next frame then: the connection ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The length is above the limit.
    #[error(
        "a frame of {found} bytes is longer than the {max} allowed here; send smaller values or raise --max-value"
    )]
    Length {
        /// The length field as received.
        found: usize,
        /// The largest one allowed.
        max: usize,
    },
    /// The frame is of another version of the format.
    #[error(
        "a frame of wire version {0} cannot be read, this is version {WIRE_VERSION}; use matching releases"
    )]
    Version(u8),
    /// The frame is too short to hold any message.
    #[error("a frame of {0} bytes has no room for a message; the sender does not speak the kvs protocol")]
    Empty(usize),
}

impl FrameError {
    /// The code that tells this to the other side.
    pub fn code(&self) -> ErrorCode {
        match self {
            FrameError::Length { .. } => ErrorCode::FrameTooLarge,
            FrameError::Version(_) => ErrorCode::UnsupportedVersion,
            FrameError::Empty(_) => ErrorCode::Malformed,
        }
    }
}

/// How far a frame reaches, known from its header alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameExtent {
    /// Bytes of the whole frame, header included.
    pub total: usize,
}

impl FrameExtent {
    /// Bytes of the payload.
    pub fn payload_length(&self) -> usize {
        self.total - FRAME_HEADER_BYTES
    }

    /// The payload, when all of it is in `bytes`, which starts where the frame starts.
    pub fn payload<'a>(&self, bytes: &'a [u8]) -> Option<&'a [u8]> {
        bytes.get(FRAME_HEADER_BYTES..self.total)
    }

    /// As much of the payload as is in `bytes`, which starts where the frame starts.
    pub fn payload_start<'a>(&self, bytes: &'a [u8]) -> &'a [u8] {
        let end = self.total.min(bytes.len());
        bytes.get(FRAME_HEADER_BYTES..end).unwrap_or_default()
    }
}

/// Reads the header of the frame that starts `bytes`. `None` means that the header is not complete yet; whether
/// the *payload* is, [`FrameExtent::payload`] tells.
///
/// # Errors
/// A length above `length_max` (see [`request_length_max`], [`response_length_max`]) or too short for a message, or another version.
pub fn peek(bytes: &[u8], length_max: usize) -> Result<Option<FrameExtent>, FrameError> {
    let Some((length_field, rest)) = bytes.split_first_chunk::<LENGTH_FIELD_BYTES>() else {
        return Ok(None);
    };
    let length = u32::from_le_bytes(*length_field) as usize;
    if length > length_max {
        return Err(FrameError::Length { found: length, max: length_max });
    }
    if length < LENGTH_MIN {
        return Err(FrameError::Empty(length));
    }
    match rest.first() {
        None => Ok(None),
        Some(&WIRE_VERSION) => Ok(Some(FrameExtent { total: LENGTH_FIELD_BYTES + length })),
        Some(&version) => Err(FrameError::Version(version)),
    }
}

/// The largest length field of a request, where values may be `value_bytes_max` long.
pub fn request_length_max(value_bytes_max: u64) -> usize {
    let value_bytes_max = value_bytes_max.min(VALUE_BYTES_MAX_LIMIT) as usize;
    value_bytes_max + KEY_BYTES_MAX + FRAME_OVERHEAD_BYTES_MAX
}

/// The largest length field of a response, where values may be `value_bytes_max` long.
pub fn response_length_max(value_bytes_max: u64) -> usize {
    request_length_max(value_bytes_max.max(LIST_PAGE_BYTES_MAX as u64))
}

/// Whether the other side speaks HTTP: a browser or a probe pointed at the wrong port, or a client at a web server.
pub fn looks_like_http(bytes: &[u8]) -> bool {
    bytes.first_chunk::<4>().is_some_and(|start| HTTP_STARTS.contains(&start))
}
