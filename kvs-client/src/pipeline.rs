//! Many requests at once: sent without waiting, answered in order.

use kvs_core::limits::KEY_BYTES_MAX;
use kvs_core::wire::{Request, RequestBody, Response, ResponseBody, SetCondition, encode_request};

use crate::{Client, Error};

/// The answer to one request of a [`Pipeline`].
#[derive(Debug)]
#[non_exhaustive]
pub enum Answer {
    /// To a get: the value, if there is one.
    Value(Option<Vec<u8>>),
    /// To a set, or to a conditional one that stored its value.
    Stored,
    /// To a conditional set: the key exists.
    Exists,
    /// To a delete: whether the key was there.
    Deleted(bool),
    /// To an increment: the sum.
    Number(i64),
    /// The request was not done.
    Failed(Error),
}

/// What kind of request it is: decides what its answer means, and whether it may be repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Get,
    Set,
    SetIfAbsent,
    Delete,
    Increment,
}

impl Kind {
    /// Whether doing it twice is the same as doing it once.
    fn is_repeatable(self) -> bool {
        matches!(self, Kind::Get | Kind::Set)
    }
}

/// Requests that are sent together. Build it, then [`run`](Pipeline::run) it.
pub struct Pipeline<'c> {
    client: &'c mut Client,
    frames: Vec<u8>,
    requests: Vec<(usize, Kind)>,
    failed: Vec<(usize, Error)>,
}

impl<'c> Pipeline<'c> {
    pub(crate) fn new(client: &'c mut Client) -> Self {
        Self { client, frames: Vec::new(), requests: Vec::new(), failed: Vec::new() }
    }

    /// Reads a value.
    pub fn get(&mut self, key: impl AsRef<[u8]>) -> &mut Self {
        let key = key.as_ref();
        self.add(Kind::Get, key, 0, RequestBody::Get { key })
    }

    /// Stores a value.
    pub fn set(&mut self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> &mut Self {
        let (key, value) = (key.as_ref(), value.as_ref());
        let body = RequestBody::Set { condition: SetCondition::Always, key, value };
        self.add(Kind::Set, key, value.len(), body)
    }

    /// Stores a value unless the key exists.
    pub fn set_if_absent(&mut self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> &mut Self {
        let (key, value) = (key.as_ref(), value.as_ref());
        let body = RequestBody::Set { condition: SetCondition::IfAbsent, key, value };
        self.add(Kind::SetIfAbsent, key, value.len(), body)
    }

    /// Removes a key.
    pub fn delete(&mut self, key: impl AsRef<[u8]>) -> &mut Self {
        let key = key.as_ref();
        self.add(Kind::Delete, key, 0, RequestBody::Delete { key })
    }

    /// Adds to a decimal value.
    pub fn increment(&mut self, key: impl AsRef<[u8]>, by: i64) -> &mut Self {
        let key = key.as_ref();
        self.add(Kind::Increment, key, 0, RequestBody::Increment { key, by })
    }

    /// Number of requests so far.
    pub fn len(&self) -> usize {
        self.requests.len()
    }

    /// Whether there is none yet.
    pub fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    fn add(&mut self, kind: Kind, key: &[u8], value_length: usize, body: RequestBody<'_>) -> &mut Self {
        let index = self.requests.len();
        match check(key, value_length, self.client.value_bytes_max()) {
            Ok(()) => encode_request(&mut self.frames, &Request { number: index as u32, body }),
            Err(error) => self.failed.push((index, error)),
        }
        self.requests.push((self.frames.len(), kind));
        self
    }

    /// Sends all and returns the answers, one for each request, in order. A request that failed by itself has its
    /// error among them. When the connection breaks, what may be repeated is; what may not and was possibly executed gets
    /// [`Error::Interrupted`].
    ///
    /// # Errors
    /// When no connection can be had any more, or the server makes no sense.
    pub fn run(self) -> Result<Vec<Answer>, Error> {
        let Self { client, frames, requests, failed } = self;
        let mut answers: Vec<Option<Answer>> = requests.iter().map(|_| None).collect();
        for (index, error) in failed {
            answers[index] = Some(Answer::Failed(error));
        }
        while answers.iter().any(Option::is_none) {
            let waiting: Vec<usize> = (0..answers.len()).filter(|&index| answers[index].is_none()).collect();
            let frame = |index: usize| {
                let start = if index == 0 { 0 } else { requests[index - 1].0 };
                &frames[start..requests[index].0]
            };
            let out: Vec<u8> = waiting.iter().flat_map(|&index| frame(index)).copied().collect();
            let mut taken = 0;
            let lost = client.exchange(&out, waiting.len(), &mut |response| {
                let index = waiting[taken];
                answers[index] = Some(interpret(requests[index].1, index, response)?);
                taken += 1;
                Ok(())
            })?;
            let Some(sent) = lost else { continue };
            let mut end = 0;
            for (position, &index) in waiting.iter().enumerate() {
                end += frame(index).len();
                if position >= taken && end <= sent && !requests[index].1.is_repeatable() {
                    answers[index] = Some(Answer::Failed(Error::Interrupted));
                }
            }
        }
        Ok(answers.into_iter().flatten().collect())
    }
}

/// Holds a request against the limits before it is sent.
pub(crate) fn check(key: &[u8], value_length: usize, value_bytes_max: u64) -> Result<(), Error> {
    if !(1..=KEY_BYTES_MAX).contains(&key.len()) {
        return Err(Error::KeyLength { found: key.len() });
    }
    if value_length as u64 > value_bytes_max {
        return Err(Error::ValueLength { found: value_length, max: value_bytes_max });
    }
    Ok(())
}

fn interpret(kind: Kind, index: usize, response: &Response<'_>) -> Result<Answer, Error> {
    if response.number != index as u32 {
        let message = format!("answer {} came where {index} was due", response.number);
        return Err(Error::Protocol(message));
    }
    match (kind, &response.body) {
        (_, ResponseBody::Error { code, message }) => Ok(Answer::Failed(Error::from_answer(*code, message))),
        (Kind::Get, ResponseBody::Value { value }) => Ok(Answer::Value(Some(value.to_vec()))),
        (Kind::Get, ResponseBody::Missing) => Ok(Answer::Value(None)),
        (Kind::Set | Kind::SetIfAbsent, ResponseBody::Stored) => Ok(Answer::Stored),
        (Kind::SetIfAbsent, ResponseBody::Exists) => Ok(Answer::Exists),
        (Kind::Delete, ResponseBody::Deleted) => Ok(Answer::Deleted(true)),
        (Kind::Delete, ResponseBody::Missing) => Ok(Answer::Deleted(false)),
        (Kind::Increment, ResponseBody::Number { value }) => Ok(Answer::Number(*value)),
        _ => Err(Error::Protocol("an answer of another kind of request".into())),
    }
}
