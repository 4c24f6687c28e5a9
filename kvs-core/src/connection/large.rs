//! Values and answers larger than a ring, piece by piece, in block lists that the connection's slot names.
//!
//! A value that comes in fills its list as its bytes arrive; each piece is one transaction with the consumption of its
//! input. What came with its head is copied from the ring; for the rest the list itself is where the kernel puts what it
//! receives, up to the slot's `direct_until`. When it is whole, its blocks become the entry's. A client that stops halfway holds
//! what it sent, at most one chunk more.
//!
//! A large value that goes out is sent from where it is, its entry pinned: no copy, and no memory that a full store
//! wouldn't have. Other answers that are too large for the ring, pages of very long keys, go through a list.

use super::context::{Context, Counter};
use super::in_session::Turn;
use super::{Connection, Fatal, Step, request, slot};
use crate::arena::block_list::BlockList;
use crate::arena::extents::AllocateError;
use crate::backup::gate::Admission;
use crate::limits::VALUE_BYTES_MAX_LIMIT;
use crate::sys::memory::Damaged;
use crate::table::{KeyHash, PinnedValue, Table, TableError};
use crate::transaction::Transaction;
use crate::wire::{
    ErrorCode, FRAME_HEADER_BYTES, FrameExtent, Response, ResponseBody, SetCondition, SetPrefix,
    VALUE_HEAD_BYTES_MAX, value_response_head,
};

/// A value on its way in.
pub struct Assembly {
    pub(super) list: BlockList,
    pub(super) key: Vec<u8>,
    pub(super) hash: KeyHash,
    pub(super) condition: SetCondition,
    pub(super) number: u32,
    /// Stream position behind its frame.
    pub(super) end: u64,
}

/// Where an answer on its way out is.
pub enum Source {
    /// In a list of its own.
    List(BlockList),
    /// Where the value is; its head was in the ring.
    Value(PinnedValue),
}

/// An answer on its way out that isn't in the ring.
pub struct Outgoing {
    pub(super) source: Source,
    /// Stream position at which it begins.
    pub(super) start: u64,
}

impl Outgoing {
    /// The memory with what is to be sent from stream position `at` on: its offset and length.
    pub(super) fn piece(&self, table: &Table, at: u64) -> Result<(u64, u64), Damaged> {
        match &self.source {
            Source::List(list) => list.piece(at - self.start),
            Source::Value(value) => table.pinned_piece(*value, at - self.start),
        }
    }
}

/// How getting memory failed, for the client or for good.
fn out_of_memory(error: AllocateError) -> Result<(), Fatal> {
    match error {
        AllocateError::OutOfMemory(_) => Ok(()),
        AllocateError::Transaction(error) => Err(error.into()),
    }
}

impl<'s> Connection<'s> {
    /// Makes the list for the value of a set and puts the key into it.
    pub(super) fn begin_assembly(
        &mut self,
        context: &mut Context<'s>,
        prefix: &SetPrefix<'_>,
        extent: FrameExtent,
    ) -> Result<Step, Fatal> {
        if let Admission::Refused(message) = context.admission(prefix.key.len(), 0) {
            return self.skip_frame(context, extent, prefix.number, ErrorCode::BackupFailed, &message);
        }
        let mut key = prefix.key.to_vec();
        key.resize(key.len().next_multiple_of(8), 0);
        let length = key.len() as u64 + prefix.value_length as u64;
        context.count(Counter::Set);
        let hash = context.table.hash_of(prefix.key);
        let list = match BlockList::create(self.segment, context.slot, &self.slot.assembly, length) {
            Ok(list) => list,
            Err(error) => {
                out_of_memory(error)?;
                return self.skip_full(context, extent, prefix.number);
            }
        };
        let end = self.executed + extent.total as u64;
        if !self.push(context, &list, &key)? {
            list.release(context.slot, &self.slot.assembly)?;
            return self.skip_full(context, extent, prefix.number);
        }
        key.truncate(prefix.key.len());
        let consumed = self.executed + (FRAME_HEADER_BYTES + prefix.value_offset) as u64;
        let (condition, number) = (prefix.condition, prefix.number);
        let mut transaction = Transaction::begin(self.segment, context.slot);
        transaction.store(&self.slot.assembly_end, end);
        transaction.store(&self.slot.assembly_request, slot::pack_request(number, condition));
        transaction.store(&self.slot.assembly_key_bytes, key.len() as u64);
        transaction.store(&self.slot.committed, slot::pack(consumed, self.produced));
        transaction.commit()?;
        self.executed = consumed;
        self.assembly = Some(Assembly { list, key, hash, condition, number, end });
        Ok(Step::Done)
    }

    fn skip_full(
        &mut self,
        context: &mut Context<'s>,
        extent: FrameExtent,
        number: u32,
    ) -> Result<Step, Fatal> {
        self.skip_frame(context, extent, number, ErrorCode::StoreFull, request::STORE_FULL)
    }

    /// Appends `bytes` to a list; false when there is no memory for them.
    fn push(&self, context: &Context<'s>, list: &BlockList, bytes: &[u8]) -> Result<bool, Fatal> {
        match list.append(context.slot, bytes) {
            Ok(()) => Ok(true),
            Err(error) => out_of_memory(error).map(|()| false),
        }
    }

    /// Where the next bytes of the value go, if one is on its way in and nothing before them waits in the ring.
    pub(super) fn direct_room(&self, context: &Context<'s>) -> Result<Option<(u64, u64)>, Fatal> {
        let Some(assembly) = self.assembly.as_ref().filter(|_| self.executed == self.received) else {
            return Ok(None);
        };
        match assembly.list.space(context.slot) {
            Ok((offset, room)) => {
                let length = room.min(assembly.end - self.executed);
                Ok((length > 0).then_some((offset, length)))
            }
            // Said when the bytes are there that find no room.
            Err(error) => out_of_memory(error).map(|()| None),
        }
    }

    /// Takes what there is of the value, if it is still this connection's to store.
    pub(super) fn assemble(&mut self, context: &mut Context<'s>) -> Result<Step, Fatal> {
        let Some(number) = self.assembly.as_ref().map(|assembly| assembly.number) else {
            return Ok(Step::Done);
        };
        match self.begin_change(context, number) {
            Turn::Execute(_lock) => {
                let step = self.take_value(context);
                self.place = None;
                step
            }
            Turn::Answer(outcome) => match self.assembly.take() {
                Some(assembly) => self.end_assembly(context, assembly, outcome.body()),
                None => Ok(Step::Done),
            },
            Turn::Refuse(message) => {
                self.assembly = None;
                self.refuse(context, number, ErrorCode::Session, message)
            }
            Turn::Wait => Ok(Step::NeedsBackup),
        }
    }

    /// Takes what there is of the value; stores it when it is whole.
    fn take_value(&mut self, context: &mut Context<'s>) -> Result<Step, Fatal> {
        let Some(assembly) = self.assembly.take() else { return Ok(Step::Done) };
        while self.executed < assembly.end {
            if self.executed == self.received {
                self.assembly = Some(assembly);
                return Ok(Step::NeedsInput);
            }
            let (offset, room) = match assembly.list.space(context.slot) {
                Ok(space) => space,
                Err(error) => {
                    out_of_memory(error)?;
                    return self.give_up(context, assembly, ErrorCode::StoreFull, request::STORE_FULL);
                }
            };
            if room == 0 {
                return Err(Damaged { offset }.into());
            }
            self.take_piece(context, &assembly, offset, room)?;
        }
        self.finish(context, assembly)
    }

    /// Takes one piece into the list, in one transaction with its consumption; it is there already, or in the ring.
    fn take_piece(
        &mut self,
        context: &Context<'s>,
        assembly: &Assembly,
        offset: u64,
        room: u64,
    ) -> Result<(), Fatal> {
        let mut to = self.received.min(assembly.end).min(self.executed + room);
        if self.executed < self.direct_until {
            to = to.min(self.direct_until);
        } else {
            let Some(ring) = &self.input else { return Err(Damaged { offset }.into()) };
            let memory = self.segment.memory();
            let (first, second) = ring.parts(memory, self.executed, to)?;
            memory.write_bytes(offset, first)?;
            memory.write_bytes(offset + first.len() as u64, second)?;
        }
        let mut transaction = Transaction::begin(self.segment, context.slot);
        assembly.list.fill(&mut transaction, to - self.executed)?;
        transaction.store(&self.slot.committed, slot::pack(to, self.produced));
        transaction.commit()?;
        self.executed = to;
        Ok(())
    }

    fn finish(&mut self, context: &mut Context<'s>, assembly: Assembly) -> Result<Step, Fatal> {
        match context.admission_of_large(assembly.key.len()) {
            Admission::Go => {}
            Admission::Wait => {
                self.assembly = Some(assembly);
                return Ok(Step::NeedsBackup);
            }
            Admission::Refused(message) => {
                return self.give_up(context, assembly, ErrorCode::BackupFailed, &message);
            }
        }
        let mut transaction = Transaction::begin(self.segment, context.slot);
        let Assembly { list, key, hash, condition, number, .. } = &assembly;
        let owner = &self.slot.assembly;
        let number = *number;
        match context.table.set_assembled(&mut transaction, *hash, key, list, owner, *condition) {
            Ok(true) => {
                self.expects_large = true;
                transaction.store(&self.slot.assembly_end, 0);
                let stored = Response { number, body: ResponseBody::Stored };
                self.commit_answer(context, transaction, self.executed, &stored)?;
                context.table.collect_garbage(context.slot)?;
                Ok(Step::Done)
            }
            Ok(false) => {
                drop(transaction);
                self.end_assembly(context, assembly, ResponseBody::Exists)
            }
            Err(error) => {
                drop(transaction);
                let (code, message) = request::explain(error)?;
                self.give_up(context, assembly, code, &message)
            }
        }
    }

    /// Says why, throws the rest of the frame away and frees the list.
    fn give_up(
        &mut self,
        context: &mut Context<'s>,
        assembly: Assembly,
        code: ErrorCode,
        message: &str,
    ) -> Result<Step, Fatal> {
        self.end_assembly(context, assembly, ResponseBody::Error { code, message })
    }

    /// Answers, throws the rest of the frame away if there is any, and frees the list.
    fn end_assembly(
        &mut self,
        context: &mut Context<'s>,
        assembly: Assembly,
        body: ResponseBody<'_>,
    ) -> Result<Step, Fatal> {
        let Assembly { list, number, end, .. } = assembly;
        let mut transaction = Transaction::begin(self.segment, context.slot);
        transaction.store(&self.slot.assembly_end, 0);
        transaction.store(&self.slot.discard_until, end);
        self.commit_answer(context, transaction, self.executed, &Response { number, body })?;
        self.discard_until = end;
        list.release(context.slot, &self.slot.assembly)?;
        Ok(Step::Done)
    }

    /// Sends an answer that is larger than the ring, whole in memory already; `end` is the end of its request.
    pub(super) fn answer_large(
        &mut self,
        context: &mut Context<'s>,
        end: u64,
        number: u32,
        bytes: &[u8],
    ) -> Result<Step, Fatal> {
        let owner = &self.slot.outgoing;
        let list = match BlockList::create(self.segment, context.slot, owner, bytes.len() as u64) {
            Ok(list) => list,
            Err(error) => {
                out_of_memory(error)?;
                return self.answer_full(context, end, number);
            }
        };
        if !self.push(context, &list, bytes)? {
            list.release(context.slot, owner)?;
            return self.answer_full(context, end, number);
        }
        let start = self.produced;
        self.begin_outgoing(context, end, Outgoing { source: Source::List(list), start }, bytes.len() as u64)
    }

    fn answer_full(&mut self, context: &mut Context<'s>, end: u64, number: u32) -> Result<Step, Fatal> {
        let body = ResponseBody::Error { code: ErrorCode::StoreFull, message: request::NO_ROOM_FOR_ANSWER };
        self.answer(context, end, &Response { number, body })
    }

    /// Moves both marks: what is in the ring and what is outgoing, `length` bytes together, is the answer.
    fn begin_outgoing(
        &mut self,
        context: &Context<'s>,
        end: u64,
        outgoing: Outgoing,
        length: u64,
    ) -> Result<Step, Fatal> {
        let produced = self.produced + length;
        let mut transaction = Transaction::begin(self.segment, context.slot);
        if let Source::Value(value) = &outgoing.source {
            transaction.store(&self.slot.outgoing, slot::pinned(value.offset));
        }
        transaction.store(&self.slot.outgoing_start, outgoing.start);
        transaction.store(&self.slot.committed, slot::pack(end, produced));
        transaction.commit()?;
        self.outgoing = Some(outgoing);
        (self.executed, self.produced) = (end, produced);
        Ok(Step::Done)
    }

    /// Lets go what was outgoing.
    pub(super) fn end_outgoing(&mut self, context: &Context<'s>) -> Result<(), Fatal> {
        let Some(outgoing) = self.outgoing.take() else { return Ok(()) };
        self.segment.memory().store(&self.slot.outgoing_start, slot::NOT_OUTGOING);
        match outgoing.source {
            Source::List(list) => list.release(context.slot, &self.slot.outgoing)?,
            Source::Value(value) => {
                self.segment.memory().store(&self.slot.outgoing, 0);
                context.table.unpin(value);
            }
        }
        Ok(())
    }

    /// Answers a read of a value that does not fit the ring: the head goes there, the value from where it is.
    pub(super) fn answer_large_value(
        &mut self,
        context: &mut Context<'s>,
        end: u64,
        (number, hash, key): (u32, KeyHash, &[u8]),
    ) -> Result<Step, Fatal> {
        let value = match context.table.pin(hash, key) {
            Ok(Some(value)) => value,
            // It was replaced by a small one, or removed, since it was looked at; it is looked at again.
            Ok(None) => return Ok(Step::Done),
            Err(error) => return self.answer_table_error(context, end, number, error),
        };
        if value.length > VALUE_BYTES_MAX_LIMIT {
            context.table.unpin(value);
            return Err(Damaged { offset: value.offset }.into());
        }
        let mut head = [0; VALUE_HEAD_BYTES_MAX];
        let head_length = value_response_head(&mut head, number, value.length as usize);
        let written = self.write_ahead(&head[..head_length])?;
        if !written {
            context.table.unpin(value);
            return Ok(Step::NeedsOutput);
        }
        let start = self.produced + head_length as u64;
        let length = head_length as u64 + value.length;
        self.begin_outgoing(context, end, Outgoing { source: Source::Value(value), start }, length)
    }

    /// Answers what the table could not do.
    pub(super) fn answer_table_error(
        &mut self,
        context: &mut Context<'s>,
        end: u64,
        number: u32,
        error: TableError,
    ) -> Result<Step, Fatal> {
        let (code, message) = request::explain(error)?;
        self.answer(context, end, &Response { number, body: ResponseBody::Error { code, message: &message } })
    }
}
