//! How kvs and the null server are talked to.

use std::os::fd::BorrowedFd;

use anyhow::{Context as _, bail};
use kvs_core::limits::VALUE_BYTES_MAX_LIMIT;
use kvs_core::wire::{
    PROTOCOL, Request, RequestBody, Response, ResponseBody, SetCondition, decode_response, encode_request,
    encode_response, peek, response_length_max,
};
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::protocol::{Answer, Body, Protocol, Template, first_key};
use crate::bench::workload::Workload;

/// Where the number of a message is, behind the length and the version; it is a single byte here.
const NUMBER_AT: usize = 5;
/// What the load generator calls itself to the operator.
const CLIENT_NAME: &str = "kvs-tools bench";

/// kvs's frames.
pub struct Kvs {
    read: Template,
    write: Template,
    /// A whole answer with a value up to that, of request 0.
    value_head: Vec<u8>,
    value_bytes: usize,
    /// The whole answer to a store, of request 0.
    stored: Vec<u8>,
}

impl Kvs {
    /// For keys and values as long as the workload says.
    pub fn new(workload: &Workload) -> Self {
        let (key, value) = (first_key(workload), vec![0; workload.value_bytes]);
        let read = request(RequestBody::Get { key: &key });
        let mut write =
            request(RequestBody::Set { condition: SetCondition::Always, key: &key, value: &value });
        write.truncate(write.len() - value.len());
        let mut value_head = response(ResponseBody::Value { value: &value });
        value_head.truncate(value_head.len() - value.len());
        let (read_key_at, write_key_at) = (read.len() - key.len(), key_place(&write, &key, value.len()));
        Self {
            read: Template::new(read, read_key_at, workload),
            write: Template::new(write, write_key_at, workload),
            value_head,
            value_bytes: workload.value_bytes,
            stored: response(ResponseBody::Stored),
        }
    }

    /// Anything but the answers that are expected.
    #[cold]
    fn unexpected(&self, input: &[u8], number: u8) -> Result<Option<Answer<'static>>, String> {
        let extent =
            peek(input, response_length_max(VALUE_BYTES_MAX_LIMIT)).map_err(|error| error.to_string())?;
        let Some((extent, payload)) = extent.and_then(|extent| Some((extent, extent.payload(input)?))) else {
            return Ok(None);
        };
        let response = decode_response(payload).map_err(|error| error.to_string())?;
        if let ResponseBody::Error { message, .. } = response.body {
            return Err(format!("it says: {message}"));
        }
        if response.number != u32::from(number) {
            return Err(format!("answer {} came where {number} was expected", response.number));
        }
        match response.body {
            ResponseBody::Missing => Ok(Some(Answer { length: extent.total, body: Body::Missing })),
            ResponseBody::Value { value } => {
                Err(format!("a value has {} bytes instead of {}", value.len(), self.value_bytes))
            }
            _ => Err("it answers something else than was asked; is it of another version?".into()),
        }
    }
}

fn request(body: RequestBody<'_>) -> Vec<u8> {
    let mut frame = Vec::new();
    encode_request(&mut frame, &Request { number: 0, body });
    frame
}

fn response(body: ResponseBody<'_>) -> Vec<u8> {
    let mut frame = Vec::new();
    encode_response(&mut frame, &Response { number: 0, body });
    frame
}

/// Where the key is in a store without its value: before the value's length, a varint.
fn key_place(head: &[u8], key: &[u8], value_bytes: usize) -> usize {
    let length_bytes = (1..).find(|bytes| value_bytes >> (7 * bytes) == 0).unwrap_or(1);
    head.len() - length_bytes - key.len()
}

/// Whether `input` begins with `head`, but for the number, which is this one.
#[inline]
fn begins_with(input: &[u8], head: &[u8], number: u8) -> bool {
    input.len() >= head.len()
        && input[..NUMBER_AT] == head[..NUMBER_AT]
        && input[NUMBER_AT] == number
        && input[NUMBER_AT + 1..head.len()] == head[NUMBER_AT + 1..]
}

impl Protocol for Kvs {
    fn greet(&self, socket: BorrowedFd<'_>) -> anyhow::Result<()> {
        let hello = RequestBody::Hello { protocol: PROTOCOL, name: CLIENT_NAME, pid: std::process::id() };
        send(socket, &request(hello), SendFlags::NOSIGNAL).context("can't greet it")?;
        let (mut input, mut filled) = ([0; 1024], 0);
        loop {
            match recv(socket, &mut input[filled..], RecvFlags::empty()).context("it doesn't greet")? {
                (_, 0) => bail!("it closes new connections"),
                (_, count) => filled += count,
            }
            let extent = peek(&input[..filled], input.len())?;
            let Some(payload) = extent.and_then(|extent| extent.payload(&input[..filled])) else { continue };
            return match decode_response(payload)?.body {
                ResponseBody::Welcome { .. } => Ok(()),
                ResponseBody::Error { message, .. } => bail!("it refuses: {message}"),
                _ => bail!("it answers the greeting with something else; is it of another version?"),
            };
        }
    }

    #[inline]
    fn ask_read(&self, output: &mut Vec<u8>, number: u8, index: u64) {
        let from = self.read.append(output, index);
        output[from + NUMBER_AT] = number;
    }

    #[inline]
    fn ask_write(&self, output: &mut Vec<u8>, number: u8, index: u64, value: &[u8]) {
        let from = self.write.append(output, index);
        output[from + NUMBER_AT] = number;
        output.extend_from_slice(value);
    }

    #[inline]
    fn answer<'i>(&self, input: &'i [u8], number: u8) -> Result<Option<Answer<'i>>, String> {
        let head = self.value_head.len();
        if begins_with(input, &self.value_head, number) {
            let length = head + self.value_bytes;
            return Ok(input.get(head..length).map(|value| Answer { length, body: Body::Value(value) }));
        }
        if begins_with(input, &self.stored, number) {
            return Ok(Some(Answer { length: self.stored.len(), body: Body::Stored }));
        }
        self.unexpected(input, number)
    }
}
