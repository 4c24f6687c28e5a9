//! One client's connection, from bytes taken off its socket to bytes ready for it. The sockets are the data server's;
//! this is everything between them.
//!
//! ```text
//! socket ─ recv ─► input ring ─ whole frames ─► execute ─► output ─ send ─► socket
//!                  │                             │          ├ ring: answers that fit
//!                  └ value larger than the ring ─┴ assembly └ outgoing: an answer that doesn't
//! ```
//!
//! | module | what it is |
//! |---|---|
//! | [`slot`] | what of it lives in the segment, and giving that back |
//! | [`ring`] | the buffers |
//! | [`context`] | what all connections of a worker share |
//! | [`request`] | executing one request |
//! | `in_session` | executing a change once, however often the client repeats it |
//! | [`large`] | values and answers larger than a ring |
//! | `look_ahead` | having the table's cache misses of several requests overlap |
//! | [`resume`] | going on where a dead data server stopped |
//!
//! Invariants
//! - Stream positions only go up: executed ≤ received, sent ≤ produced.
//! - A request's consumption and its answer move in one store, `committed`, which is part of the transaction of its
//!   change, if it has one. What else the slot says of the conversation changes in a transaction with it.
//! - Whatever a client does, it holds its rings and at most one list each way, and no worker waits for it.
//!
//! Lock: none; a connection belongs to one worker. A crash leaves the slot, from which the next data server takes it up, if
//! somebody has kept its socket.

pub mod context;
#[cfg(all(test, not(miri), not(feature = "shuttle")))]
mod crashes;
mod in_session;
#[cfg(all(test, not(miri), not(feature = "shuttle")))]
mod in_session_crashes;
#[cfg(all(test, not(miri), not(feature = "shuttle")))]
mod in_session_tests;
pub mod large;
mod look_ahead;
pub mod request;
pub mod resume;
pub mod ring;
pub mod slot;
#[cfg(all(test, not(miri), not(feature = "shuttle")))]
mod survivals;
#[cfg(all(test, not(miri), not(feature = "shuttle")))]
mod tests;
pub mod usage;

use std::io::IoSlice;

use crate::control::{Adopted, ClientInfo, Seat, Transport};
use crate::limits::VALUE_BYTES_MAX_LIMIT;
use crate::segment::layout::ConnectionSlot;
use crate::segment::{OutOfMemory, Segment};
use crate::session::Membership;
use crate::sys::memory::Damaged;
use crate::transaction::{Transaction, TransactionError};
use crate::wire::{
    self, DecodeError, ErrorCode, FRAME_HEADER_BYTES, FrameExtent, Response, ResponseBody, SetPrefix,
};
use context::Context;
use in_session::Turn;
use large::{Assembly, Outgoing};
use ring::{RING_ORDER, RING_ORDER_MAX, Ring};
use slot::{Phase, SlotIndex};

/// Room in the output ring without which no request is begun: more than any answer but a value, a page or the
/// counters takes.
const ANSWER_ROOM: u64 = 1024;
/// Different places in their rings at which connections begin, and bytes between them.
const COLORS: u64 = 64;
const COLOR_BYTES: u64 = 128;
/// Bytes that are received into the input ring where a large value is expected to begin: its head, and a long key.
const HEAD_BYTES: u64 = 4 << 10;
/// Parts that are sent at once: what is in the ring, and two pieces of a large value, whose last one is often short.
const PARTS_MAX: usize = 4;
/// Bytes of a refused client's input that are read and thrown away, so that it gets to see the error.
const LINGER_BYTES_MAX: u64 = 1 << 20;

/// Why a worker, and with it the data server, can't go on.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct Fatal(#[from] pub TransactionError);

impl From<Damaged> for Fatal {
    fn from(damaged: Damaged) -> Self {
        Self(damaged.into())
    }
}

/// What executing came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Everything that is there is executed; more input is needed.
    NeedsInput,
    /// Output must be sent before anything more can be executed.
    NeedsOutput,
    /// There is more to execute, but it took its time: it's the turn of others.
    GivesWay,
    /// There is a change to execute, for which the backup ring has no room now.
    NeedsBackup,
}

/// How one step ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Something was done; go on.
    Done,
    /// Nothing was done for want of input.
    NeedsInput,
    /// Nothing was done for want of room in the output.
    NeedsOutput,
    /// Something was done that took long enough.
    GivesWay,
    /// Nothing was done for want of room in the backup ring.
    NeedsBackup,
}

/// A client's connection.
pub struct Connection<'s> {
    segment: &'s Segment,
    slot: &'s ConnectionSlot,
    index: SlotIndex,
    id: u64,
    transport: Transport,
    phase: Phase,
    input: Option<Ring>,
    output: Option<Ring>,
    received: u64,
    executed: u64,
    produced: u64,
    sent: u64,
    /// Input up to here belongs to a frame that was refused.
    discard_until: u64,
    /// Input from what is executed up to here is in the list of the assembly, not in the ring.
    direct_until: u64,
    /// The last request was a large value: the next may be one, too.
    expects_large: bool,
    /// Input up to here said who the client is, and asked for nothing.
    introduced_until: u64,
    /// What was received when the kernel began to count.
    counted_from: u64,
    assembly: Option<Assembly>,
    outgoing: Option<Outgoing>,
    /// Its client's session.
    session: Option<Membership<'s>>,
    /// Where in it the result of the change at hand goes.
    place: Option<u64>,
}

impl<'s> Connection<'s> {
    /// Begins the connection that was adopted, in slot `index`.
    ///
    /// # Errors
    /// [`OutOfMemory`] when `/dev/shm` has no room for the slot.
    pub fn open(segment: &'s Segment, index: SlotIndex, adopted: Adopted) -> Result<Self, OutOfMemory> {
        let slot = slot::open(segment, index, adopted)?;
        Ok(Self {
            segment,
            slot,
            index,
            id: adopted.connection,
            transport: adopted.transport,
            phase: Phase::Greeting,
            input: None,
            output: None,
            received: 0,
            executed: 0,
            produced: 0,
            sent: 0,
            discard_until: 0,
            direct_until: 0,
            expects_large: false,
            introduced_until: 0,
            counted_from: 0,
            assembly: None,
            outgoing: None,
            session: None,
            place: None,
        })
    }

    /// Its number.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Its slot.
    pub fn index(&self) -> SlotIndex {
        self.index
    }

    /// What those know it by who keep its socket.
    pub fn seat(&self) -> Seat {
        let adopted = Adopted { connection: self.id(), transport: self.transport };
        Seat { adopted, slot: self.index }
    }

    /// Who is connected, for the operator.
    pub fn describe(&self) -> ClientInfo {
        ClientInfo {
            connection: self.id,
            transport: self.transport,
            name: crate::segment::text_of(&self.slot.client_name),
            pid: self.slot.client.load() as u32,
            received: self.received,
            sent: self.sent,
        }
    }

    /// Where the kernel is to put what comes next, in two parts; both are empty while something must be executed first. They are of
    /// the input ring, not all of it if one part is large enough; or, for a large value, the first is the place of its next bytes.
    ///
    /// # Errors
    /// [`Fatal`].
    pub fn input_space(&mut self, context: &mut Context<'s>) -> Result<(&mut [u8], &mut [u8]), Fatal> {
        if self.executed < self.received.min(self.direct_until) {
            return Ok((&mut [], &mut []));
        }
        let direct = self.direct_room(context)?;
        let memory = self.segment.memory();
        let ring = match self.input.take() {
            Some(ring) => ring,
            None => context.take_ring(&self.slot.input)?,
        };
        let ring = self.input.insert(ring);
        // Where the ring's part begins, and nothing is in it.
        let at = self.received + direct.map_or(0, |(_, length)| length);
        if self.executed == self.received {
            ring.rebase(memory, &self.slot.input, at, color(self.index));
        }
        if let (Some(room), Some(assembly)) = (direct, &mut self.assembly) {
            self.direct_until = at;
            memory.store(&self.slot.direct_until, at);
            let (behind, _) = ring.parts_mut(memory, at, at + HEAD_BYTES)?;
            return Ok((ring::list_room(memory, &mut assembly.list, room)?, behind));
        }
        if std::mem::take(&mut self.direct_until) > 0 {
            memory.store(&self.slot.direct_until, 0);
        }
        let most = if std::mem::take(&mut self.expects_large) { HEAD_BYTES } else { ring.capacity() };
        let end = (self.executed + ring.capacity()).min(at + most);
        let (first, second) = ring.parts_mut(memory, at, end)?;
        let is_enough = first.len() as u64 >= extents_bytes(RING_ORDER) / 2;
        Ok((first, if is_enough { &mut [] } else { second }))
    }

    /// Notes that the kernel put `count` bytes there.
    pub fn received(&mut self, count: u64) {
        self.received += count;
        self.segment.memory().store(&self.slot.received, self.received);
    }

    /// Brings near what the requests will need that were just received, together with those of other clients.
    ///
    /// # Errors
    /// [`Fatal`].
    pub fn add_to_wave(&self, context: &mut Context<'s>) -> Result<(), Fatal> {
        let is_between_frames = self.phase == Phase::Open
            && self.executed >= self.discard_until
            && self.assembly.is_none()
            && self.outgoing.is_none();
        if is_between_frames && let Some(ring) = &self.input {
            let (first, _) = ring.parts(self.segment.memory(), self.executed, self.received)?;
            context.add_to_wave(self.id, self.executed, first);
        }
        Ok(())
    }

    /// Notes that the client has sent its last byte: from then on the kernel's count of its bytes is one more.
    pub fn input_ended(&mut self) {
        self.segment.memory().store(&self.slot.input_ended, 1);
    }

    /// Whether the client has sent its last byte.
    pub fn has_input_ended(&self) -> bool {
        self.slot.input_ended.load() != 0
    }

    /// Whether something was received that is not executed, perhaps for want of the rest.
    pub fn has_input(&self) -> bool {
        self.executed < self.received
            || self.assembly.as_ref().is_some_and(|value| self.executed == value.end)
    }

    /// How the client is connected.
    #[inline]
    pub fn transport(&self) -> Transport {
        self.transport
    }

    /// Whether there is something to send.
    pub fn has_output(&self) -> bool {
        self.sent < self.produced
    }

    /// Whether the last answer was given because the client can't be served.
    pub fn is_refused(&self) -> bool {
        self.phase == Phase::Refused
    }

    /// Whether a refused client sent so much more that it isn't listened to any longer.
    pub fn is_exhausted(&self) -> bool {
        self.phase == Phase::Refused && self.received.saturating_sub(self.discard_until) > LINGER_BYTES_MAX
    }

    /// What is to be sent next, in parts; those at the end may be empty.
    ///
    /// # Errors
    /// [`Fatal`].
    pub fn pending(&self, context: &Context<'s>) -> Result<[IoSlice<'_>; PARTS_MAX], Fatal> {
        let memory = self.segment.memory();
        let ring_end = self.outgoing.as_ref().map_or(self.produced, |outgoing| outgoing.start);
        let mut parts = [IoSlice::new(&[]); PARTS_MAX];
        let mut free = parts.iter_mut();
        if self.sent < ring_end
            && let Some(ring) = &self.output
        {
            let (first, second) = ring.parts(memory, self.sent, ring_end)?;
            let in_ring = [first, second].into_iter().filter(|part| !part.is_empty());
            in_ring.zip(&mut free).for_each(|(bytes, part)| *part = IoSlice::new(bytes));
        }
        if let Some(outgoing) = &self.outgoing {
            let mut at = self.sent.max(ring_end);
            for part in free {
                let piece = outgoing.piece(context.table, at)?;
                *part = IoSlice::new(ring::list_bytes(memory, piece)?);
                at += piece.1;
            }
        }
        Ok(parts)
    }

    /// How much was sent so far.
    #[inline]
    pub fn sent_so_far(&self) -> u64 {
        self.sent
    }

    /// Notes that the kernel took `count` bytes of it.
    ///
    /// # Errors
    /// [`Fatal`].
    pub fn sent(&mut self, context: &mut Context<'s>, count: u64) -> Result<(), Fatal> {
        self.sent += count;
        self.segment.memory().store(&self.slot.sent, self.sent);
        if self.sent == self.produced {
            self.end_outgoing(context)?;
        }
        Ok(())
    }

    /// Gives buffers back that nothing is in, if they are larger than usual, or far too many are held, or the client has asked for nothing
    /// so far: many connect long before they do.
    ///
    /// # Errors
    /// [`Fatal`].
    pub fn rest(&mut self, context: &mut Context<'s>) -> Result<(), Fatal> {
        if context.holds_far_too_many_rings() || self.executed == self.introduced_until {
            return self.give_back_rings(context);
        }
        if self.executed == self.received
            && let Some(ring) = self.input.take_if(|ring| ring.order() != RING_ORDER)
        {
            context.give_back_ring(ring, &self.slot.input)?;
        }
        Ok(())
    }

    /// Gives all buffers back that nothing is in.
    ///
    /// # Errors
    /// [`Fatal`].
    pub fn give_back_rings(&mut self, context: &mut Context<'s>) -> Result<(), Fatal> {
        if self.executed == self.received
            && let Some(ring) = self.input.take()
        {
            context.give_back_ring(ring, &self.slot.input)?;
        }
        if self.sent == self.produced
            && let Some(ring) = self.output.take()
        {
            context.give_back_ring(ring, &self.slot.output)?;
        }
        Ok(())
    }

    /// Ends it and frees all it holds.
    ///
    /// # Errors
    /// [`Fatal`].
    pub fn close(mut self, context: &mut Context<'s>) -> Result<(), Fatal> {
        self.end_outgoing(context)?;
        self.leave_session(context)?;
        for (ring, owner) in [(self.input.take(), &self.slot.input), (self.output.take(), &self.slot.output)]
        {
            if let Some(ring) = ring {
                context.give_back_ring(ring, owner)?;
            }
        }
        Ok(slot::release(self.segment, context.slot, self.slot)?)
    }

    /// Executes all that is there and can be.
    ///
    /// # Errors
    /// [`Fatal`] when the data server can't go on; whatever is wrong with the client is answered to the client.
    pub fn execute(&mut self, context: &mut Context<'s>) -> Result<Progress, Fatal> {
        context.begin_turn();
        loop {
            match self.step(context)? {
                Step::Done => {}
                Step::NeedsInput => return Ok(Progress::NeedsInput),
                Step::NeedsOutput => return Ok(Progress::NeedsOutput),
                Step::GivesWay => return Ok(Progress::GivesWay),
                Step::NeedsBackup => return Ok(Progress::NeedsBackup),
            }
        }
    }

    fn step(&mut self, context: &mut Context<'s>) -> Result<Step, Fatal> {
        if self.phase == Phase::Refused {
            self.consume(self.received);
            return Ok(Step::NeedsInput);
        }
        if self.executed < self.discard_until {
            self.consume(self.received.min(self.discard_until));
            if self.executed < self.discard_until {
                return Ok(Step::NeedsInput);
            }
        }
        if self.outgoing.is_some() || self.output_room() < ANSWER_ROOM {
            return Ok(Step::NeedsOutput);
        }
        if self.executed == self.received && self.assembly.is_none() {
            return Ok(Step::NeedsInput);
        }
        // A change answers inside of its transaction, in which no ring can be taken.
        self.ensure_output(context)?;
        if self.assembly.is_some() {
            return self.assemble(context);
        }
        match self.input.take() {
            None => Ok(Step::NeedsInput),
            Some(ring) => {
                let step = self.next_frame(context, &ring);
                // An enlarged ring is in its place already.
                self.input.get_or_insert(ring);
                self.enlarge_if_asked(context)?;
                step
            }
        }
    }

    /// Input up to `to` is done with, without an answer.
    fn consume(&mut self, to: u64) {
        self.executed = to;
        self.segment.memory().store(&self.slot.committed, slot::pack(self.executed, self.produced));
    }

    fn output_room(&self) -> u64 {
        match &self.output {
            None => ANSWER_ROOM,
            Some(ring) => ring.capacity() - (self.produced - self.sent),
        }
    }

    /// Looks at what the input begins with, and executes it if it is whole.
    fn next_frame(&mut self, context: &mut Context<'s>, ring: &Ring) -> Result<Step, Fatal> {
        let (first, second) = ring.parts(self.segment.memory(), self.executed, self.received)?;
        // Behind the greeting, which is a request of its own.
        if self.phase == Phase::Open
            && let Some(read) = context.read_ahead(self.id, self.executed)
            && let Some(key) = first.get(read.key)
        {
            return self.get(context, self.executed + read.total as u64, read.number, (read.hash, key));
        }
        let mut head = [0; FRAME_HEADER_BYTES];
        let known = copy_parts(first, second, &mut head);
        if self.phase == Phase::Greeting && wire::looks_like_http(&head[..known]) {
            return self.refuse_http(context);
        }
        let extent = match wire::peek(&head[..known], wire::request_length_max(VALUE_BYTES_MAX_LIMIT)) {
            Ok(Some(extent)) => extent,
            Ok(None) => return Ok(Step::NeedsInput),
            Err(error) => return self.refuse(context, 0, error.code(), &error.to_string()),
        };
        if extent.total as u64 > ring.capacity() {
            return self.large_frame(context, extent, (first, second));
        }
        if first.len() + second.len() < extent.total {
            return Ok(Step::NeedsInput);
        }
        if first.len() >= extent.total {
            context.look_ahead(self.id, self.executed, first);
            let payload = &first[FRAME_HEADER_BYTES..extent.total];
            return self.request(context, payload, extent);
        }
        let mut scratch = std::mem::take(&mut context.scratch);
        scratch.clear();
        scratch.extend_from_slice(first);
        scratch.extend_from_slice(&second[..extent.total - first.len()]);
        let step = self.request(context, &scratch[FRAME_HEADER_BYTES..], extent);
        context.scratch = scratch;
        step
    }

    /// A frame larger than the ring: a set, whose value is taken in piece by piece, or something with a long key.
    fn large_frame(
        &mut self,
        context: &mut Context<'s>,
        extent: FrameExtent,
        (first, second): (&[u8], &[u8]),
    ) -> Result<Step, Fatal> {
        if self.phase == Phase::Greeting {
            return self.refuse_unknown_client(context);
        }
        let mut scratch = std::mem::take(&mut context.scratch);
        scratch.clear();
        scratch.extend_from_slice(first);
        scratch.extend_from_slice(second);
        let payload_start = &scratch[FRAME_HEADER_BYTES..];
        let step = match wire::decode_set_prefix(payload_start, extent.payload_length()) {
            Ok(Some(prefix)) => self.begin_set_once(context, &prefix, extent),
            Ok(None) => {
                // The key alone may be longer than the ring; all before the value fits the largest one.
                context.enlarge = scratch.len() as u64 == extents_bytes(RING_ORDER);
                Ok(Step::NeedsInput)
            }
            Err(DecodeError::NotASet { .. }) if extent.total as u64 <= extents_bytes(RING_ORDER_MAX) => {
                context.enlarge = true;
                Ok(Step::NeedsInput)
            }
            Err(DecodeError::NotASet { number }) => {
                let code = ErrorCode::KeyLength;
                self.skip_frame(context, extent, number, code, &request::key_too_long(extent.total))
            }
            Err(error @ (DecodeError::KeyLength { .. } | DecodeError::UnknownMessage { .. })) => {
                let code = error.code();
                self.skip_frame(context, extent, error.number(), code, &error.to_string())
            }
            Err(error) => self.refuse(context, error.number(), error.code(), &error.to_string()),
        };
        context.scratch = scratch;
        step
    }

    fn enlarge_if_asked(&mut self, context: &mut Context<'s>) -> Result<(), Fatal> {
        if std::mem::take(&mut context.enlarge)
            && let Some(ring) = self.input.take_if(|ring| ring.order() < RING_ORDER_MAX)
        {
            let bytes = (self.executed, self.received);
            self.input = Some(ring.enlarge(self.segment, context.slot, &self.slot.input, bytes)?);
        }
        Ok(())
    }

    /// Begins a set whose value does not fit the block of an entry, unless it was executed for the client's session before.
    fn begin_set_once(
        &mut self,
        context: &mut Context<'s>,
        prefix: &SetPrefix<'_>,
        extent: FrameExtent,
    ) -> Result<Step, Fatal> {
        let number = prefix.number;
        match self.begin_change(context, number) {
            Turn::Execute(_lock) => {
                let step = self.begin_set(context, prefix, extent);
                self.place = None;
                step
            }
            Turn::Answer(outcome) => {
                self.skip_answered(context, extent, &Response { number, body: outcome.body() })
            }
            Turn::Refuse(message) => self.refuse(context, number, ErrorCode::Session, message),
            Turn::Wait => Ok(Step::NeedsBackup),
        }
    }

    /// Begins a set whose value does not fit the block of an entry.
    fn begin_set(
        &mut self,
        context: &mut Context<'s>,
        prefix: &SetPrefix<'_>,
        extent: FrameExtent,
    ) -> Result<Step, Fatal> {
        if prefix.value_length as u64 > context.value_bytes_max {
            let message = context.value_too_long(prefix.value_length as u64);
            return self.skip_frame(context, extent, prefix.number, ErrorCode::ValueLength, &message);
        }
        self.begin_assembly(context, prefix, extent)
    }

    /// Answers with an error and throws the frame away; the connection stays usable.
    fn skip_frame(
        &mut self,
        context: &mut Context<'s>,
        extent: FrameExtent,
        number: u32,
        code: ErrorCode,
        message: &str,
    ) -> Result<Step, Fatal> {
        self.skip_answered(context, extent, &Response { number, body: ResponseBody::Error { code, message } })
    }

    /// Answers and throws the frame away.
    fn skip_answered(
        &mut self,
        context: &mut Context<'s>,
        extent: FrameExtent,
        response: &Response<'_>,
    ) -> Result<Step, Fatal> {
        let until = self.executed + extent.total as u64;
        let mut transaction = Transaction::begin(self.segment, context.slot);
        transaction.store(&self.slot.discard_until, until);
        self.commit_answer(context, transaction, self.executed, response)?;
        self.discard_until = until;
        Ok(Step::Done)
    }

    /// Answers with an error and executes nothing more.
    fn refuse(
        &mut self,
        context: &mut Context<'s>,
        number: u32,
        code: ErrorCode,
        message: &str,
    ) -> Result<Step, Fatal> {
        let error = Response { number, body: ResponseBody::Error { code, message } };
        let transaction = self.last_answer(context);
        self.commit_answer(context, transaction, self.received, &error)?;
        Ok(Step::Done)
    }

    fn refuse_unknown_client(&mut self, context: &mut Context<'s>) -> Result<Step, Fatal> {
        let message = "the first message must be Hello; this port speaks the kvs protocol, use a kvs client";
        self.refuse(context, 0, ErrorCode::HelloExpected, message)
    }

    fn refuse_http(&mut self, context: &mut Context<'s>) -> Result<Step, Fatal> {
        const ANSWER: &[u8] = b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nContent-Length: 73\r\n\
            Connection: close\r\n\r\nThis port speaks the kvs protocol, not HTTP. Use kvs-tools or a library.\n";
        let transaction = self.last_answer(context);
        self.commit_bytes(transaction, self.received, ANSWER)?;
        Ok(Step::Done)
    }

    /// Begins the transaction with the last answer; all input that there is, and will be, is thrown away.
    fn last_answer(&mut self, context: &Context<'s>) -> Transaction<'s> {
        let mut transaction = Transaction::begin(self.segment, context.slot);
        transaction.store(&self.slot.state, Phase::Refused as u64);
        transaction.store(&self.slot.discard_until, self.received);
        self.phase = Phase::Refused;
        self.discard_until = self.received;
        transaction
    }
}

/// Where in its rings a connection begins: if all did so with the first byte, their bytes would be in a few sets of the caches.
const fn color(index: SlotIndex) -> u64 {
    index % COLORS * COLOR_BYTES
}

const fn extents_bytes(order: usize) -> u64 {
    crate::arena::extents::block_bytes(order)
}

/// Copies the beginning of two parts into `target`; returns how many bytes there were.
fn copy_parts(first: &[u8], second: &[u8], target: &mut [u8]) -> usize {
    let from_first = first.len().min(target.len());
    target[..from_first].copy_from_slice(&first[..from_first]);
    let from_second = second.len().min(target.len() - from_first);
    target[from_first..from_first + from_second].copy_from_slice(&second[..from_second]);
    from_first + from_second
}
