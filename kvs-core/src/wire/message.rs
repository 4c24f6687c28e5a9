//! Messages: what a client can ask and a server can answer, and their encoding.
//!
//! Invariants: the order of variants and fields is the format. Messages borrow what they carry from the frame they
//! were decoded from. Lengths are not judged here (a key may be empty or too long): that is the server's to answer.

use serde::{Deserialize, Serialize};

use super::error::{DecodeError, ErrorCode};
use super::frame::{FRAME_HEADER_BYTES, LENGTH_FIELD_BYTES, WIRE_VERSION};
use super::session::SessionToken;

/// Version of the conversation, told in Hello and Welcome.
pub const PROTOCOL: u16 = 1;

/// Variants of [`RequestBody`]; an index from here on is unknown.
pub(super) const REQUEST_VARIANTS: u32 = 9;
/// Variants of [`ResponseBody`]; an index from here on is unknown.
pub(super) const RESPONSE_VARIANTS: u32 = 11;
/// Index of [`RequestBody::Set`].
pub(super) const SET_VARIANT: u32 = 2;
/// Index of [`ResponseBody::Value`].
pub(super) const VALUE_VARIANT: u32 = 1;

/// What a client sends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request<'a> {
    /// Chosen by the client; its answer carries it.
    pub number: u32,
    /// What is asked.
    #[serde(borrow)]
    pub body: RequestBody<'a>,
}

/// What a client can ask.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RequestBody<'a> {
    /// The first message of a connection. Answered by Welcome.
    Hello {
        /// The client's [`PROTOCOL`].
        protocol: u16,
        /// What the client calls itself, for the operator.
        name: &'a str,
        /// The client's process id, for the operator; 0 when there is none.
        pid: u32,
    },
    /// Reads a value. Answered by Value or Missing.
    Get {
        /// The key.
        #[serde(with = "serde_bytes")]
        key: &'a [u8],
    },
    /// Stores a value. Answered by Stored or, on a condition, Exists.
    Set {
        /// When to store it.
        condition: SetCondition,
        /// The key.
        #[serde(with = "serde_bytes")]
        key: &'a [u8],
        /// The value.
        #[serde(with = "serde_bytes")]
        value: &'a [u8],
    },
    /// Removes a key. Answered by Deleted or Missing.
    Delete {
        /// The key.
        #[serde(with = "serde_bytes")]
        key: &'a [u8],
    },
    /// Adds to a decimal value; a missing key counts as 0. Answered by Number.
    Increment {
        /// The key.
        #[serde(with = "serde_bytes")]
        key: &'a [u8],
        /// What to add.
        by: i64,
    },
    /// Lists keys, a page at a time and in no order. Answered by Keys.
    List {
        /// Only keys that start with this.
        #[serde(with = "serde_bytes")]
        prefix: &'a [u8],
        /// 0 for the first page, then what the page before gave as `next`.
        cursor: u64,
        /// Most keys wanted in the page.
        limit: u32,
    },
    /// Asks for the counters of the store. Answered by Stats.
    Stats,
    /// From here on the changes of this connection are the client's session's: each carries a number one above that of the
    /// change before, and one that is repeated with its number is answered, not executed again. Answered by Session.
    Session {
        /// Which session; a new one when it is not known.
        token: SessionToken,
        /// Which of the client's connections this is: the highest one has the session.
        attempt: u64,
    },
    /// The session of this connection is over: nothing of it will be repeated. Answered by Session.
    EndSession,
}

impl RequestBody<'_> {
    /// Whether it may change what is stored.
    pub fn is_change(&self) -> bool {
        matches!(self, Self::Set { .. } | Self::Delete { .. } | Self::Increment { .. })
    }
}

/// When a Set stores its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SetCondition {
    /// Whatever is there.
    Always,
    /// Only when there is no such key.
    IfAbsent,
}

/// What a server answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Response<'a> {
    /// The number of the request this answers; 0 when the server refuses a connection unasked.
    pub number: u32,
    /// The answer.
    #[serde(borrow)]
    pub body: ResponseBody<'a>,
}

/// What a server can answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ResponseBody<'a> {
    /// The connection is served.
    Welcome {
        /// The server's [`PROTOCOL`].
        protocol: u16,
        /// The server's name and version, for people.
        server: &'a str,
        /// The number the server knows this connection by, for the operator.
        connection: u64,
        /// Longest value the server takes.
        value_bytes_max: u64,
    },
    /// The value of the key.
    Value {
        /// The value.
        #[serde(with = "serde_bytes")]
        value: &'a [u8],
    },
    /// The value is stored.
    Stored,
    /// The key is removed.
    Deleted,
    /// There is no such key.
    Missing,
    /// The key exists, so nothing was stored.
    Exists,
    /// The value after an increment.
    Number {
        /// The value.
        value: i64,
    },
    /// One page of keys.
    Keys {
        /// The keys of the page; there may be none although more pages follow.
        #[serde(borrow)]
        keys: Vec<KeyBytes<'a>>,
        /// Cursor of the next page; `None` when this is the last.
        next: Option<u64>,
    },
    /// The counters of the store.
    Stats {
        /// The counters, in the server's order.
        #[serde(borrow)]
        statistics: Vec<Statistic<'a>>,
    },
    /// The request was not done.
    Error {
        /// Why, for programs.
        code: ErrorCode,
        /// What, why and what to do, for people.
        message: &'a str,
    },
    /// How it is with the session.
    Session {
        /// Whether it was known: what was executed for it will not be executed again.
        resumed: bool,
        /// Changes whose results are remembered: the client has no more of them unanswered. 0 when the session is over.
        window: u32,
    },
}

/// A key in a page of keys, encoded as one byte string.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct KeyBytes<'a>(
    /// The key.
    #[serde(borrow, with = "serde_bytes")]
    pub &'a [u8],
);

/// One counter of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statistic<'a> {
    /// What is counted.
    pub name: &'a str,
    /// The count.
    #[serde(borrow)]
    pub value: StatisticValue<'a>,
}

/// The value of a counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum StatisticValue<'a> {
    /// A number.
    Number(u64),
    /// A text, such as a name or a path.
    Text(&'a str),
    /// Nothing now, such as the process id of a standby that is not there.
    Absent,
}

/// Appends `request` to `out` as a whole frame.
///
/// # Panics
/// When the frame would be longer than a `u32` can say. Callers check values against their limit, far below that.
pub fn encode_request(out: &mut Vec<u8>, request: &Request<'_>) {
    append_frame(out, request);
}

/// Appends `response` to `out` as a whole frame.
///
/// # Panics
/// When the frame would be longer than a `u32` can say. Callers check values against their limit, far below that.
pub fn encode_response(out: &mut Vec<u8>, response: &Response<'_>) {
    append_frame(out, response);
}

/// Decodes the payload of a whole frame as a request.
///
/// # Errors
/// An unknown kind of message, or bytes that are no message.
pub fn decode_request(payload: &[u8]) -> Result<Request<'_>, DecodeError> {
    decode(payload, REQUEST_VARIANTS)
}

/// Decodes the payload of a whole frame as a response.
///
/// # Errors
/// An unknown kind of message, or bytes that are no message.
pub fn decode_response(payload: &[u8]) -> Result<Response<'_>, DecodeError> {
    decode(payload, RESPONSE_VARIANTS)
}

/// The number and the variant index a payload starts with, and the rest.
pub(super) fn take_head(payload: &[u8]) -> Result<(u32, u32, &[u8]), postcard::Error> {
    let ((number, variant), rest) = postcard::take_from_bytes(payload)?;
    Ok((number, variant, rest))
}

fn decode<'a, M: Deserialize<'a>>(payload: &'a [u8], variants: u32) -> Result<M, DecodeError> {
    match postcard::take_from_bytes(payload) {
        Ok((message, [])) => Ok(message),
        Ok(_) => Err(malformed(payload, "bytes are left over behind it")),
        Err(error) => Err(refusal(payload, variants, error)),
    }
}

/// Finds out what was wrong, off the path of good messages: postcard reports an unknown variant like any other fault.
fn refusal(payload: &[u8], variants: u32, error: postcard::Error) -> DecodeError {
    match take_head(payload) {
        Ok((number, variant, _)) if variant >= variants => DecodeError::UnknownMessage { number, variant },
        _ => malformed(payload, describe(&error)),
    }
}

pub(super) fn malformed(payload: &[u8], reason: &'static str) -> DecodeError {
    let number = postcard::take_from_bytes(payload).map_or(0, |(number, _)| number);
    DecodeError::Malformed { number, reason }
}

pub(super) fn describe(error: &postcard::Error) -> &'static str {
    match error {
        postcard::Error::DeserializeUnexpectedEnd => "it ends too early",
        postcard::Error::DeserializeBadVarint => "a number in it is out of range",
        postcard::Error::DeserializeBadUtf8 => "a text in it is not UTF-8",
        postcard::Error::DeserializeBadOption => "an optional field is neither there nor absent",
        _ => "a field in it has an impossible value",
    }
}

fn append_frame<M: Serialize>(out: &mut Vec<u8>, message: &M) {
    let start = out.len();
    out.extend_from_slice(&[0, 0, 0, 0, WIRE_VERSION]);
    postcard::serialize_with_flavor(message, Append(out)).expect("memory takes any message");
    let length = out.len() - start - LENGTH_FIELD_BYTES;
    let length_field = u32::try_from(length).expect("values are checked against their limit before encoding");
    out[start..start + LENGTH_FIELD_BYTES].copy_from_slice(&length_field.to_le_bytes());
    debug_assert!(out.len() > start + FRAME_HEADER_BYTES);
}

/// Lets postcard write behind what is already in a buffer, without a copy.
struct Append<'a>(&'a mut Vec<u8>);

impl postcard::ser_flavors::Flavor for Append<'_> {
    type Output = ();

    fn try_push(&mut self, byte: u8) -> postcard::Result<()> {
        self.0.push(byte);
        Ok(())
    }

    fn try_extend(&mut self, bytes: &[u8]) -> postcard::Result<()> {
        self.0.extend_from_slice(bytes);
        Ok(())
    }

    fn finalize(self) -> postcard::Result<()> {
        Ok(())
    }
}
