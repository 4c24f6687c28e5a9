//! Large values without a buffer of their size: reading the start of a Set before its value is there, and writing all of
//! a Value answer but the value.
//!
//! Invariant: both agree byte for byte with [`decode_request`](super::decode_request) and
//! [`encode_response`](super::encode_response); the tests compare them on random messages.

use super::error::DecodeError;
use super::frame::{FRAME_HEADER_BYTES, LENGTH_FIELD_BYTES, WIRE_VERSION};
use super::message::{
    REQUEST_VARIANTS, SET_VARIANT, SetCondition, VALUE_VARIANT, describe, malformed, take_head,
};
use crate::limits::KEY_BYTES_MAX;

/// Most bytes before the value in a frame with a Value answer: header, number, variant and length.
pub const VALUE_HEAD_BYTES_MAX: usize = FRAME_HEADER_BYTES + 5 + 1 + 10;

/// A Set up to where its value starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SetPrefix<'a> {
    /// The number of the request.
    pub number: u32,
    /// When to store the value.
    pub condition: SetCondition,
    /// The key, 1 to [`KEY_BYTES_MAX`] bytes.
    pub key: &'a [u8],
    /// Bytes of the value; it ends where the payload ends.
    pub value_length: usize,
    /// Where in the payload the value starts.
    pub value_offset: usize,
}

/// Decodes a Set of `payload_length` bytes from the part of its payload that has arrived. `None` means that more bytes
/// are needed; never more than [`KEY_BYTES_MAX`] and [`FRAME_OVERHEAD_BYTES_MAX`](crate::limits::FRAME_OVERHEAD_BYTES_MAX)
/// together.
///
/// # Errors
/// The message is none, not a Set, or its key is empty or too long. In the last case the rest of the frame can be skipped
/// and the connection goes on.
pub fn decode_set_prefix(
    payload_start: &[u8],
    payload_length: usize,
) -> Result<Option<SetPrefix<'_>>, DecodeError> {
    match take_set_prefix(payload_start) {
        Ok(prefix) if prefix.value_offset.checked_add(prefix.value_length) == Some(payload_length) => {
            Ok(Some(prefix))
        }
        Ok(_) => Err(malformed(payload_start, "the length of the value does not fit the frame")),
        Err(Stop::Incomplete) if payload_start.len() < payload_length => Ok(None),
        Err(Stop::Incomplete) => Err(malformed(payload_start, "it ends too early")),
        Err(Stop::Refused(error)) => Err(error),
    }
}

/// Why a prefix was not decoded.
enum Stop {
    Incomplete,
    Refused(DecodeError),
}

fn take_set_prefix(payload: &[u8]) -> Result<SetPrefix<'_>, Stop> {
    let stop = |error| match error {
        postcard::Error::DeserializeUnexpectedEnd => Stop::Incomplete,
        error => Stop::Refused(malformed(payload, describe(&error))),
    };
    let (number, variant, rest) = take_head(payload).map_err(stop)?;
    if variant != SET_VARIANT {
        return Err(Stop::Refused(not_a_set(number, variant)));
    }
    let ((condition, key_length), rest) =
        postcard::take_from_bytes::<(SetCondition, usize)>(rest).map_err(stop)?;
    if !(1..=KEY_BYTES_MAX).contains(&key_length) {
        return Err(Stop::Refused(DecodeError::KeyLength { number, found: key_length }));
    }
    let (key, rest) = rest.split_at_checked(key_length).ok_or(Stop::Incomplete)?;
    let (value_length, rest) = postcard::take_from_bytes(rest).map_err(stop)?;
    let value_offset = payload.len() - rest.len();
    Ok(SetPrefix { number, condition, key, value_length, value_offset })
}

fn not_a_set(number: u32, variant: u32) -> DecodeError {
    if variant < REQUEST_VARIANTS {
        DecodeError::NotASet { number }
    } else {
        DecodeError::UnknownMessage { number, variant }
    }
}

/// Writes everything that comes before the value in the frame of a Value answer, and returns how many bytes that is. The
/// frame is complete when `value_length` bytes of value follow.
///
/// # Panics
/// When the frame would be longer than a `u32` can say; stored values are far below that.
pub fn value_response_head(head: &mut [u8; VALUE_HEAD_BYTES_MAX], number: u32, value_length: usize) -> usize {
    let start = (number, VALUE_VARIANT, value_length);
    let written = postcard::to_slice(&start, &mut head[FRAME_HEADER_BYTES..])
        .expect("the head has room for the longest number and length")
        .len();
    let head_length = FRAME_HEADER_BYTES + written;
    let length_field = u32::try_from(head_length - LENGTH_FIELD_BYTES + value_length)
        .expect("stored values are far below the limit of a frame");
    head[..LENGTH_FIELD_BYTES].copy_from_slice(&length_field.to_le_bytes());
    head[LENGTH_FIELD_BYTES] = WIRE_VERSION;
    head_length
}
