//! Executing one request, and answering it.
//!
//! A read writes its answer behind the produced mark, then one store of `committed` moves consumption and answer. A
//! change writes its answer there too, but `committed` is one of the words its transaction decides on.

use std::borrow::Cow;

use super::context::{Context, Counter};
use super::in_session::Turn;
use super::ring::RING_ORDER;
use super::slot::Phase;
use super::{ANSWER_ROOM, Connection, Fatal, Step, color, extents_bytes, slot};
use crate::backup::gate::Admission;
use crate::control::StatisticOwned;
use crate::limits::{KEY_BYTES_MAX, VALUE_BYTES_MAX_LIMIT};
use crate::sys::memory::Damaged;
use crate::table::{DIGITS_MAX, KeyHash, Table, TableError};
use crate::transaction::{Transaction, TransactionError};
use crate::wire::{
    self, ErrorCode, FrameExtent, KeyBytes, PROTOCOL, Request, RequestBody, Response, ResponseBody,
    SetCondition, Statistic, StatisticValue, VALUE_HEAD_BYTES_MAX,
};

/// What a client is told when there is no memory.
pub(super) const STORE_FULL: &str = "store full: the capacity is reached or /dev/shm has no room; delete something or start with a larger --capacity";
/// What a client is told when a large answer finds no memory.
pub(super) const NO_ROOM_FOR_ANSWER: &str =
    "store full: no memory for an answer of this size; delete something or start with a larger --capacity";
/// Keys of a page are collected until they take so many bytes, so that pages fit the ring unless keys are long.
const PAGE_BYTES: usize = 16 << 10;
/// Smaller answers never need a list.
const RING_BYTES: u64 = extents_bytes(RING_ORDER);

/// Whether an answer with a value of `length` bytes doesn't fit a ring.
fn is_large(length: u64) -> bool {
    length + VALUE_HEAD_BYTES_MAX as u64 > RING_BYTES
}

/// What a client is told whose request holds nothing but a key, or a prefix, and is `frame_bytes` long.
pub(super) fn key_too_long(frame_bytes: usize) -> String {
    format!("a request of {frame_bytes} bytes has too long a key; keys have 1 to {KEY_BYTES_MAX} bytes")
}

/// What to tell the client; what the process can't survive is passed on.
pub(super) fn explain(error: TableError) -> Result<(ErrorCode, Cow<'static, str>), Fatal> {
    let told = |code, error: &TableError| Ok((code, Cow::Owned(error.to_string())));
    match error {
        TableError::Full(_) => Ok((ErrorCode::StoreFull, Cow::Borrowed(STORE_FULL))),
        TableError::Quarantined { .. } => told(ErrorCode::Damaged, &error),
        TableError::BackupBehind => told(ErrorCode::BackupFailed, &error),
        TableError::NotANumber => told(ErrorCode::NotANumber, &error),
        TableError::NumberRange => told(ErrorCode::NumberRange, &error),
        TableError::Transaction(TransactionError::LogFull) => {
            log::error!("{error}");
            told(ErrorCode::Internal, &error)
        }
        TableError::Transaction(TransactionError::Damaged(_)) => {
            log::error!("{error}");
            told(ErrorCode::Damaged, &error)
        }
        TableError::Transaction(fatal) => Err(fatal.into()),
    }
}

/// What copying a value into the ring came to.
enum Copied {
    /// The answer takes so many bytes.
    Whole(u64),
    /// There is no room now.
    NoRoom,
    /// It is sent from where it is.
    Large,
}

impl<'s> Connection<'s> {
    /// Decodes and executes the whole frame at the beginning of the input.
    pub(super) fn request(
        &mut self,
        context: &mut Context<'s>,
        payload: &[u8],
        extent: FrameExtent,
    ) -> Result<Step, Fatal> {
        let request = match wire::decode_request(payload) {
            Ok(request) => request,
            Err(error @ wire::DecodeError::UnknownMessage { number, .. }) if self.phase == Phase::Open => {
                return self.skip_frame(context, extent, number, error.code(), &error.to_string());
            }
            Err(_) if self.phase == Phase::Greeting => return self.refuse_unknown_client(context),
            Err(error) => return self.refuse(context, error.number(), error.code(), &error.to_string()),
        };
        let (number, end) = (request.number, self.executed + extent.total as u64);
        if let RequestBody::Hello { protocol, name, pid } = request.body {
            self.introduced_until = end;
            return self.greet(context, end, number, (protocol, name, pid));
        }
        if self.phase == Phase::Greeting {
            return self.refuse_unknown_client(context);
        }
        if !request.body.is_change() {
            return self.perform(context, payload, extent, request);
        }
        match self.begin_change(context, number) {
            Turn::Execute(_lock) => {
                let step = self.perform(context, payload, extent, request);
                self.place = None;
                step
            }
            Turn::Answer(outcome) => self.answer(context, end, &Response { number, body: outcome.body() }),
            Turn::Refuse(message) => self.refuse(context, number, ErrorCode::Session, message),
            Turn::Wait => Ok(Step::NeedsBackup),
        }
    }

    /// Executes `request`, whose frame is at the beginning of the input.
    fn perform(
        &mut self,
        context: &mut Context<'s>,
        payload: &[u8],
        extent: FrameExtent,
        request: Request<'_>,
    ) -> Result<Step, Fatal> {
        let (number, end) = (request.number, self.executed + extent.total as u64);
        match request.body {
            RequestBody::Hello { .. } => Ok(Step::Done),
            RequestBody::Session { token, attempt } => {
                self.introduced_until = end;
                self.join_session(context, end, number, (token, attempt))
            }
            RequestBody::EndSession => self.end_session(context, end, number),
            RequestBody::Stats => self.stats(context, end, number),
            RequestBody::List { prefix, cursor, limit } => {
                self.list(context, end, number, (prefix, cursor, limit))
            }
            RequestBody::Get { key } => match self.hash_of(context, end, number, key)? {
                Err(step) => Ok(step),
                Ok(hash) => self.get(context, end, number, (hash, key)),
            },
            RequestBody::Delete { key } => match self.admit(context, end, number, (key, 0))? {
                Err(step) => Ok(step),
                Ok(hash) => self.change(context, end, number, Counter::Delete, |table, transaction| {
                    let deleted = table.delete(transaction, hash, key)?;
                    Ok(if deleted { ResponseBody::Deleted } else { ResponseBody::Missing })
                }),
            },
            RequestBody::Increment { key, by } => {
                match self.admit(context, end, number, (key, DIGITS_MAX))? {
                    Err(step) => Ok(step),
                    Ok(hash) => {
                        self.change(context, end, number, Counter::Increment, |table, transaction| {
                            Ok(ResponseBody::Number { value: table.increment(transaction, hash, key, by)? })
                        })
                    }
                }
            }
            RequestBody::Set { condition, key, value } => {
                match self.admit(context, end, number, (key, value.len()))? {
                    Err(step) => Ok(step),
                    Ok(hash) => self.set(context, payload, extent, (number, condition, hash, key, value)),
                }
            }
        }
    }

    /// The key's hash, or the step that told the client that it is no key.
    fn hash_of(
        &mut self,
        context: &mut Context<'s>,
        end: u64,
        number: u32,
        key: &[u8],
    ) -> Result<Result<KeyHash, Step>, Fatal> {
        if (1..=KEY_BYTES_MAX).contains(&key.len()) {
            return Ok(Ok(context.hash_of(self.id, self.executed, key)));
        }
        let found = key.len();
        let message = format!("a key of {found} bytes is not possible; keys have 1 to {KEY_BYTES_MAX} bytes");
        let body = ResponseBody::Error { code: ErrorCode::KeyLength, message: &message };
        self.answer(context, end, &Response { number, body }).map(Err)
    }

    /// The key's hash, or the step of a change that can't be made, or not now. What a value larger than a block takes of the
    /// ring is its key at most.
    fn admit(
        &mut self,
        context: &mut Context<'s>,
        end: u64,
        number: u32,
        (key, value_length): (&[u8], usize),
    ) -> Result<Result<KeyHash, Step>, Fatal> {
        let value_length = if Table::fits_inline(key.len(), value_length) { value_length } else { 0 };
        match context.admission(key.len(), value_length) {
            Admission::Go => self.hash_of(context, end, number, key),
            Admission::Wait => Ok(Err(Step::NeedsBackup)),
            Admission::Refused(message) => {
                let body = ResponseBody::Error { code: ErrorCode::BackupFailed, message: &message };
                self.answer(context, end, &Response { number, body }).map(Err)
            }
        }
    }

    fn greet(
        &mut self,
        context: &mut Context<'s>,
        end: u64,
        number: u32,
        (protocol, name, pid): (u16, &str, u32),
    ) -> Result<Step, Fatal> {
        if protocol != PROTOCOL {
            let message = format!(
                "protocol {protocol} is not spoken here, this server speaks {PROTOCOL}; use a client of a matching release"
            );
            return self.refuse(context, number, ErrorCode::UnsupportedVersion, &message);
        }
        slot::store_client(self.segment.memory(), self.slot, self.transport, name, pid);
        let body = ResponseBody::Welcome {
            protocol: PROTOCOL,
            server: concat!("kvs ", env!("CARGO_PKG_VERSION")),
            connection: self.id,
            value_bytes_max: context.value_bytes_max,
        };
        let mut transaction = Transaction::begin(self.segment, context.slot);
        transaction.store(&self.slot.state, Phase::Open as u64);
        self.commit_answer(context, transaction, end, &Response { number, body })?;
        self.phase = Phase::Open;
        Ok(Step::Done)
    }

    pub(super) fn get(
        &mut self,
        context: &mut Context<'s>,
        end: u64,
        number: u32,
        (hash, key): (KeyHash, &[u8]),
    ) -> Result<Step, Fatal> {
        let (produced, sent) = (self.produced, self.sent);
        let memory = self.segment.memory();
        let mut ring = match self.output.take() {
            Some(ring) => ring,
            None => context.take_ring(&self.slot.output)?,
        };
        let copied = context.table.read(hash, key, |value| {
            let length = value.length();
            if length > VALUE_BYTES_MAX_LIMIT {
                return Err(Damaged { offset: 0 });
            }
            if is_large(length) {
                return Ok(Copied::Large);
            }
            let mut head = [0; VALUE_HEAD_BYTES_MAX];
            let head_length = wire::value_response_head(&mut head, number, length as usize);
            let total = head_length as u64 + length;
            if total > ring.capacity() - (produced - sent) {
                return Ok(Copied::NoRoom);
            }
            let (first, second) = ring.parts_mut(memory, produced, produced + total)?;
            let split = write_parts(first, second, &head[..head_length]);
            let (value_first, value_second) = (&mut first[split.0..], &mut second[split.1..]);
            value.copy_to(0, value_first)?;
            let from = value_first.len() as u64;
            value.copy_to(from, value_second)?;
            Ok(Copied::Whole(total))
        });
        self.output = Some(ring);
        match copied {
            Ok(Some(Copied::NoRoom)) => return Ok(Step::NeedsOutput),
            Ok(Some(Copied::Whole(total))) => self.answered(end, total),
            _ => {}
        }
        context.count(Counter::Get);
        match copied {
            Ok(Some(Copied::Large)) => self.answer_large_value(context, end, (number, hash, key)),
            Ok(Some(_)) => Ok(Step::Done),
            Ok(None) => self.answer(context, end, &Response { number, body: ResponseBody::Missing }),
            Err(error) => self.answer_table_error(context, end, number, error),
        }
    }

    fn set(
        &mut self,
        context: &mut Context<'s>,
        payload: &[u8],
        extent: FrameExtent,
        (number, condition, hash, key, value): (u32, SetCondition, KeyHash, &[u8], &[u8]),
    ) -> Result<Step, Fatal> {
        let end = self.executed + extent.total as u64;
        if value.len() as u64 > context.value_bytes_max {
            let message = context.value_too_long(value.len() as u64);
            let body = ResponseBody::Error { code: ErrorCode::ValueLength, message: &message };
            return self.answer(context, end, &Response { number, body });
        }
        if Table::fits_inline(key.len(), value.len()) {
            return self.change(context, end, number, Counter::Set, |table, transaction| {
                let stored = table.set(transaction, hash, key, value, condition)?;
                Ok(if stored { ResponseBody::Stored } else { ResponseBody::Exists })
            });
        }
        match wire::decode_set_prefix(payload, extent.payload_length()) {
            Ok(Some(prefix)) => self.begin_assembly(context, &prefix, extent),
            _ => self.refuse(context, number, ErrorCode::Malformed, "a set that can't be decoded twice"),
        }
    }

    /// Lets `change` note its change and decides it together with the answer.
    fn change(
        &mut self,
        context: &mut Context<'s>,
        end: u64,
        number: u32,
        counter: Counter,
        change: impl FnOnce(&Table, &mut Transaction<'s>) -> Result<ResponseBody<'static>, TableError>,
    ) -> Result<Step, Fatal> {
        context.count(counter);
        let mut transaction = Transaction::begin(self.segment, context.slot);
        match change(context.table, &mut transaction) {
            Ok(body) => {
                self.commit_answer(context, transaction, end, &Response { number, body })?;
                context.table.collect_garbage(context.slot)?;
                Ok(Step::Done)
            }
            Err(error) => {
                drop(transaction);
                self.answer_table_error(context, end, number, error)
            }
        }
    }

    /// Writes a small answer behind the produced mark and commits the transaction with the move of both marks.
    pub(super) fn commit_answer(
        &mut self,
        context: &mut Context<'s>,
        mut transaction: Transaction<'s>,
        end: u64,
        response: &Response<'_>,
    ) -> Result<(), Fatal> {
        let mut bytes = std::mem::take(&mut context.response);
        bytes.clear();
        wire::encode_response(&mut bytes, response);
        let place = self.note_result(&mut transaction, &response.body);
        let committed = self.commit_bytes(transaction, end, &bytes);
        context.response = bytes;
        committed?;
        self.result_noted(place);
        Ok(())
    }

    /// As [`Connection::commit_answer`], for an answer that is encoded.
    pub(super) fn commit_bytes(
        &mut self,
        mut transaction: Transaction<'s>,
        end: u64,
        bytes: &[u8],
    ) -> Result<(), Fatal> {
        let total = bytes.len() as u64;
        debug_assert!(total <= ANSWER_ROOM && total <= self.output_room());
        // A ring taken here would be a transaction within the transaction; the step before made sure of one.
        let Some(ring) = &mut self.output else { return Err(Damaged { offset: 0 }.into()) };
        ring.write(self.segment.memory(), self.produced, bytes)?;
        transaction.store(&self.slot.committed, slot::pack(end, self.produced + total));
        transaction.commit()?;
        (self.executed, self.produced) = (end, self.produced + total);
        Ok(())
    }

    /// Gives the answer to the request that ends at `end`; not done when there is no room for it now.
    pub(super) fn answer(
        &mut self,
        context: &mut Context<'s>,
        end: u64,
        response: &Response<'_>,
    ) -> Result<Step, Fatal> {
        // The error of a change of a session: it is remembered, so that what came behind it in a pipeline and was executed stays
        // behind it.
        if self.place.is_some() {
            let transaction = Transaction::begin(self.segment, context.slot);
            self.commit_answer(context, transaction, end, response)?;
            return Ok(Step::Done);
        }
        let mut bytes = std::mem::take(&mut context.response);
        bytes.clear();
        wire::encode_response(&mut bytes, response);
        let step = if bytes.len() as u64 > RING_BYTES {
            self.answer_large(context, end, response.number, &bytes)
        } else {
            self.answer_bytes(context, end, &bytes)
        };
        context.response = bytes;
        step
    }

    /// Writes bytes behind the produced mark without moving it; false when there is no room.
    pub(super) fn write_ahead(&mut self, bytes: &[u8]) -> Result<bool, Fatal> {
        let Some(ring) = &mut self.output else { return Ok(false) };
        let total = bytes.len() as u64;
        if total > ring.capacity() - (self.produced - self.sent) {
            return Ok(false);
        }
        let (first, second) = ring.parts_mut(self.segment.memory(), self.produced, self.produced + total)?;
        write_parts(first, second, bytes);
        Ok(true)
    }

    pub(super) fn answer_bytes(
        &mut self,
        context: &mut Context<'s>,
        end: u64,
        bytes: &[u8],
    ) -> Result<Step, Fatal> {
        self.ensure_output(context)?;
        if !self.write_ahead(bytes)? {
            return Ok(Step::NeedsOutput);
        }
        self.answered(end, bytes.len() as u64);
        Ok(Step::Done)
    }

    /// Makes sure that there is an output ring.
    pub(super) fn ensure_output(&mut self, context: &mut Context<'s>) -> Result<(), Fatal> {
        if self.output.is_none() {
            self.output = Some(context.take_ring(&self.slot.output)?);
        }
        if self.sent == self.produced
            && let Some(ring) = &mut self.output
        {
            ring.rebase(self.segment.memory(), &self.slot.output, self.produced, color(self.index));
        }
        Ok(())
    }

    /// Moves both marks: the request that ends at `end` is executed, and its answer of `length` bytes is there.
    fn answered(&mut self, end: u64, length: u64) {
        (self.executed, self.produced) = (end, self.produced + length);
        self.segment.memory().store(&self.slot.committed, slot::pack(end, self.produced));
    }

    /// A page of keys. It ends between two homes of the table, so it may hold a few keys more than asked for; and it
    /// ends early, perhaps empty, when looking for them has taken this turn's time.
    fn list(
        &mut self,
        context: &mut Context<'s>,
        end: u64,
        number: u32,
        (prefix, cursor, limit): (&[u8], u64, u32),
    ) -> Result<Step, Fatal> {
        let (mut bytes, mut ends) = (Vec::new(), Vec::new());
        let mut next = Some(cursor);
        while let Some(at) = next {
            if ends.len() >= limit.max(1) as usize || bytes.len() >= PAGE_BYTES || context.homes_left == 0 {
                break;
            }
            context.homes_left -= 1;
            let scanned = context.table.scan(at, 1, &mut |key| {
                if key.starts_with(prefix) {
                    bytes.extend_from_slice(key);
                    ends.push(bytes.len());
                }
            });
            next = match scanned {
                Ok(next) => next,
                Err(error) => return self.answer_table_error(context, end, number, error),
            };
        }
        let starts = std::iter::once(0).chain(ends.iter().copied());
        let keys = starts.zip(&ends).map(|(start, &end)| KeyBytes(&bytes[start..end])).collect();
        let step =
            self.answer(context, end, &Response { number, body: ResponseBody::Keys { keys, next } })?;
        if step != Step::Done {
            return Ok(step);
        }
        context.count(Counter::List);
        Ok(if context.homes_left == 0 { Step::GivesWay } else { Step::Done })
    }

    fn stats(&mut self, context: &mut Context<'s>, end: u64, number: u32) -> Result<Step, Fatal> {
        let owned = context.statistics.statistics();
        let statistics = owned
            .iter()
            .map(|(name, value)| {
                let value = match value {
                    StatisticOwned::Number(number) => StatisticValue::Number(*number),
                    StatisticOwned::Text(text) => StatisticValue::Text(text),
                    StatisticOwned::Absent => StatisticValue::Absent,
                };
                Statistic { name, value }
            })
            .collect();
        self.answer(context, end, &Response { number, body: ResponseBody::Stats { statistics } })
    }
}

/// Writes `bytes` into the beginning of two parts; returns how much of each it took.
fn write_parts(first: &mut [u8], second: &mut [u8], bytes: &[u8]) -> (usize, usize) {
    let in_first = bytes.len().min(first.len());
    first[..in_first].copy_from_slice(&bytes[..in_first]);
    let in_second = bytes.len() - in_first;
    second[..in_second].copy_from_slice(&bytes[in_first..]);
    (in_first, in_second)
}
