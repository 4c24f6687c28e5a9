//! The wire: what a client and the data server say to each other over a stream socket.
//!
//! # Format
//!
//! ```text
//! frame    = length | version | payload
//! length     u32, little endian: the number of bytes after this field (version and payload)
//! version    u8, now 1
//! payload    one Request (from the client) or one Response (from the server), in postcard's encoding
//!
//! Request  = number | variant | fields of the variant, in order
//! Response = number | variant | fields of the variant, in order
//! ```
//!
//! postcard's encoding, as far as it is used here: `u16`, `u32`, `u64`, lengths and variants are varints (seven bits
//! a byte, lowest first, the top bit says that another byte follows); `i64` is zigzag-encoded first (0, -1, 1,
//! -2 … become 0, 1, 2, 3 …); byte strings and text are a length and the bytes; a sequence is its length and its
//! elements; an option is `00`, or `01` and the value. The version byte is a plain byte.
//!
//! `set "a" = "xyz"` as request 7, and its answer:
//!
//! ```text
//! 0a 00 00 00   01        07       02    00       01 61     03 78 79 7a
//! length = 10   version   number   Set   Always   key "a"   value "xyz"
//!
//! 03 00 00 00   01        07       02
//! length = 3    version   number   Stored
//! ```
//!
//! # Conversation
//!
//! A client opens with [`RequestBody::Hello`]; the server answers [`ResponseBody::Welcome`], or
//! [`ResponseBody::Error`] and closes. After that the client sends requests without waiting if it likes; answers come
//! in the order of the requests, each with its request's number. A connection that is refused before anything was read
//! gets an `Error` frame with number 0.
//!
//! # Invariants
//!
//! - The order of variants is the format. New ones are appended, none is ever removed or moved; the golden tests
//!   in this module hold every byte.
//! - Decoding borrows from the frame, never panics whatever the bytes are, and takes no memory for a length that is
//!   not backed by bytes already received. A payload with bytes left over is malformed.
//! - The two ways of making or reading a large value ([`SetPrefix`], [`value_response_head`]) agree byte for byte with
//!   the plain ones.
//!
//! This module holds no state, takes no lock and does no I/O: a crash in it has nothing to leave behind.

mod error;
mod frame;
mod large_value;
mod message;
mod session;

pub use error::{DecodeError, ErrorCode};
pub use frame::{
    FRAME_HEADER_BYTES, FrameError, FrameExtent, LIST_PAGE_BYTES_MAX, WIRE_VERSION, looks_like_http, peek,
    request_length_max, response_length_max,
};
pub use large_value::{SetPrefix, VALUE_HEAD_BYTES_MAX, decode_set_prefix, value_response_head};
pub use message::{
    KeyBytes, PROTOCOL, Request, RequestBody, Response, ResponseBody, SetCondition, Statistic,
    StatisticValue, decode_request, decode_response, encode_request, encode_response,
};

pub use session::{SESSION_TOKEN_BYTES, SessionToken};

#[cfg(test)]
mod tests;
