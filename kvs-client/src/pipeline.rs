//! Many requests at once: sent without waiting, answered in order.

use std::borrow::Cow;

use kvs_core::limits::KEY_BYTES_MAX;
use kvs_core::wire::{Request, RequestBody, Response, ResponseBody, SetCondition, encode_request};

use crate::client::Readiness;
use crate::connection::Outgoing;
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
    /// Whether doing it twice is the same as doing it once, for a server that has lost its memory.
    fn is_repeatable(self) -> bool {
        matches!(self, Kind::Get | Kind::Set)
    }

    fn is_change(self) -> bool {
        self != Kind::Get
    }
}

/// One request of a pipeline.
#[derive(Debug, Clone, Copy)]
struct Asked {
    /// Where its frame is in all frames; empty for one that is refused here.
    start: usize,
    end: usize,
    /// Bytes of the key. It ends the frame of a get.
    key_length: usize,
    kind: Kind,
    number: u32,
}

/// Requests that are sent together. Build it, then [`run`](Pipeline::run) it.
pub struct Pipeline<'c> {
    client: &'c mut Client,
    frames: Vec<u8>,
    requests: Vec<Asked>,
    failed: Vec<(usize, Error)>,
    next_number: u32,
}

impl<'c> Pipeline<'c> {
    pub(crate) fn new(client: &'c mut Client) -> Self {
        let next_number = client.session.next_number;
        Self { client, frames: Vec::new(), requests: Vec::new(), failed: Vec::new(), next_number }
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
        let (start, number) = (self.frames.len(), self.next_number);
        match check(key, value_length, self.client.value_bytes_max()) {
            Ok(()) => {
                encode_request(&mut self.frames, &Request { number, body });
                self.next_number = number.wrapping_add(u32::from(kind.is_change()));
            }
            Err(error) => self.failed.push((self.requests.len(), error)),
        }
        let (end, key_length) = (self.frames.len(), key.len());
        self.requests.push(Asked { start, end, key_length, kind, number });
        self
    }

    /// Sends all and returns the answers, one for each request, in order. A request that failed by itself has its
    /// error among them. When the connection breaks, what was not answered is repeated over the next one; what was executed is
    /// not executed again. A read that is repeated gives what is stored then. Only when the server has lost its memory, as the
    /// machine was started again or the store purged, may something be in doubt: what may be repeated is, and what may not
    /// gets [`Error::Interrupted`].
    ///
    /// # Errors
    /// When no connection can be had any more, or the server makes no sense.
    pub fn run(mut self) -> Result<Vec<Answer>, Error> {
        if let Some(answers) = self.run_locally() {
            return Ok(answers);
        }
        let Self { client, frames, requests, failed, next_number } = self;
        // Whatever becomes of them, these numbers are taken.
        client.session.next_number = next_number;
        client.begin_call();
        let mut answers: Vec<Option<Answer>> = requests.iter().map(|_| None).collect();
        for (index, error) in failed {
            answers[index] = Some(Answer::Failed(error));
        }
        // Requests before this one may have been executed, and not been answered.
        let mut doubtful_to = 0;
        loop {
            let waiting: Vec<usize> = (0..answers.len()).filter(|&index| answers[index].is_none()).collect();
            let Some(&first) = waiting.first() else { break };
            let has_changes = waiting.iter().any(|&index| requests[index].kind.is_change());
            if let Readiness::Forgotten = client.prepare(has_changes, first < doubtful_to)? {
                for &index in waiting.iter().take_while(|index| **index < doubtful_to) {
                    if !requests[index].kind.is_repeatable() {
                        answers[index] = Some(Answer::Failed(Error::Interrupted));
                    }
                }
                doubtful_to = 0;
                continue;
            }
            let batch = Batch::of(&frames, &requests, &waiting);
            let mut taken = 0;
            let lost = client.exchange(&batch.bytes, &batch.requests, &mut |response| {
                let index = waiting[taken];
                answers[index] = Some(interpret(requests[index], response)?);
                taken += 1;
                Ok(())
            })?;
            // What did not reach the server whole was not executed.
            let sent = batch.requests.iter().filter(|request| lost.is_some_and(|sent| request.end <= sent));
            if let Some(last) = sent.count().checked_sub(1) {
                doubtful_to = doubtful_to.max(waiting[last] + 1);
            }
        }
        Ok(answers.into_iter().flatten().collect())
    }
}

impl Pipeline<'_> {
    /// The answers, when all requests are reads that can be done without the server. With changes among them the server keeps the
    /// order.
    fn run_locally(&mut self) -> Option<Vec<Answer>> {
        let are_reads = self.failed.is_empty() && self.requests.iter().all(|asked| !asked.kind.is_change());
        let local = if are_reads { self.client.local()? } else { return None };
        let frames = &self.frames;
        let keys: Vec<&[u8]> =
            self.requests.iter().map(|asked| &frames[asked.end - asked.key_length..asked.end]).collect();
        Some(local.get_many(&keys)?.into_iter().map(Answer::Value).collect())
    }
}

/// Requests that go out together.
struct Batch<'f> {
    bytes: Cow<'f, [u8]>,
    requests: Vec<Outgoing>,
}

impl<'f> Batch<'f> {
    /// Those of `requests` that are `waiting`.
    fn of(frames: &'f [u8], requests: &[Asked], waiting: &[usize]) -> Self {
        let frame = |index: usize| &frames[requests[index].start..requests[index].end];
        let length = waiting.iter().map(|&index| frame(index).len()).sum::<usize>();
        let bytes = if length == frames.len() {
            Cow::Borrowed(frames)
        } else {
            Cow::Owned(waiting.iter().flat_map(|&index| frame(index)).copied().collect())
        };
        let mut end = 0;
        let outgoing = waiting.iter().map(|&index| {
            end += frame(index).len();
            Outgoing { end, is_change: requests[index].kind.is_change() }
        });
        Self { bytes, requests: outgoing.collect() }
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

fn interpret(Asked { kind, number, .. }: Asked, response: &Response<'_>) -> Result<Answer, Error> {
    if response.number != number {
        let message = format!("answer {} came where {number} was due", response.number);
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
