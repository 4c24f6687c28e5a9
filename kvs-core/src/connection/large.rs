//! Values and answers larger than a ring, piece by piece, in block lists that the connection's slot names.
//!
//! A value that comes in fills its list as its bytes arrive; each piece is one transaction with the consumption of its
//! input. When it is whole, its blocks become the entry's: it was copied once. A client that stops halfway holds what it
//! sent and nothing more.

use super::context::{Context, Counter};
use super::{Connection, Fatal, Step, request, slot};
use crate::arena::block_list::BlockList;
use crate::arena::extents::AllocateError;
use crate::sys::memory::Damaged;
use crate::table::{KeyHash, TableError, Value};
use crate::transaction::Transaction;
use crate::wire::{
    ErrorCode, FRAME_HEADER_BYTES, FrameExtent, Response, ResponseBody, SetCondition, SetPrefix,
    VALUE_HEAD_BYTES_MAX, value_response_head,
};

/// A value on its way in.
pub struct Assembly {
    list: BlockList,
    key: Vec<u8>,
    hash: KeyHash,
    condition: SetCondition,
    number: u32,
    /// Stream position behind its frame.
    end: u64,
}

/// An answer on its way out.
pub struct Outgoing {
    pub(super) list: BlockList,
    /// Stream position at which it begins.
    pub(super) start: u64,
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
    fn push(&self, context: &Context<'s>, list: &BlockList, mut bytes: &[u8]) -> Result<bool, Fatal> {
        while !bytes.is_empty() {
            let (offset, room) = match list.space(context.slot) {
                Ok(space) => space,
                Err(error) => {
                    out_of_memory(error)?;
                    return Ok(false);
                }
            };
            let (now, later) = bytes.split_at(bytes.len().min(room as usize));
            if now.is_empty() {
                return Err(Damaged { offset }.into());
            }
            self.segment.memory().write_bytes(offset, now)?;
            let mut transaction = Transaction::begin(self.segment, context.slot);
            list.fill(&mut transaction, now.len() as u64)?;
            transaction.commit()?;
            bytes = later;
        }
        Ok(true)
    }

    /// Takes what there is of the value; stores it when it is whole.
    pub(super) fn assemble(&mut self, context: &mut Context<'s>) -> Result<Step, Fatal> {
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

    /// Moves one piece from the input ring into the list, in one transaction with its consumption.
    fn take_piece(
        &mut self,
        context: &Context<'s>,
        assembly: &Assembly,
        offset: u64,
        room: u64,
    ) -> Result<(), Fatal> {
        let Some(ring) = &self.input else { return Err(Damaged { offset }.into()) };
        let memory = self.segment.memory();
        let to = self.received.min(assembly.end).min(self.executed + room);
        let (first, second) = ring.parts(memory, self.executed, to)?;
        memory.write_bytes(offset, first)?;
        memory.write_bytes(offset + first.len() as u64, second)?;
        let mut transaction = Transaction::begin(self.segment, context.slot);
        assembly.list.fill(&mut transaction, to - self.executed)?;
        transaction.store(&self.slot.committed, slot::pack(to, self.produced));
        transaction.commit()?;
        self.executed = to;
        Ok(())
    }

    fn finish(&mut self, context: &mut Context<'s>, assembly: Assembly) -> Result<Step, Fatal> {
        let mut transaction = Transaction::begin(self.segment, context.slot);
        let Assembly { list, key, hash, condition, number, .. } = &assembly;
        let owner = &self.slot.assembly;
        let number = *number;
        match context.table.set_assembled(&mut transaction, *hash, key, list, owner, *condition) {
            Ok(true) => {
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
        let Some(list) = self.outgoing_list(context, bytes.len() as u64)? else {
            return self.answer_full(context, end, number);
        };
        let mut done = 0;
        while done < bytes.len() {
            let (offset, length) = list.piece(done as u64)?;
            let part = &bytes[done..done + length as usize];
            self.segment.memory().write_bytes(offset, part)?;
            done += part.len();
        }
        self.begin_outgoing(context, end, list)
    }

    fn answer_full(&mut self, context: &mut Context<'s>, end: u64, number: u32) -> Result<Step, Fatal> {
        let body = ResponseBody::Error { code: ErrorCode::StoreFull, message: request::NO_ROOM_FOR_ANSWER };
        self.answer(context, end, &Response { number, body })
    }

    /// A list of `length` bytes with all its chunks, to be written into; None when there is no memory.
    fn outgoing_list(&self, context: &Context<'s>, length: u64) -> Result<Option<BlockList>, Fatal> {
        let owner = &self.slot.outgoing;
        let list = match BlockList::create(self.segment, context.slot, owner, length) {
            Ok(list) => list,
            Err(error) => return out_of_memory(error).map(|()| None),
        };
        loop {
            match list.space(context.slot) {
                Ok((_, 0)) => return Ok(Some(list)),
                Ok((_, room)) => {
                    let mut transaction = Transaction::begin(self.segment, context.slot);
                    list.fill(&mut transaction, room)?;
                    transaction.commit()?;
                }
                Err(error) => {
                    out_of_memory(error)?;
                    list.release(context.slot, owner)?;
                    return Ok(None);
                }
            }
        }
    }

    fn begin_outgoing(&mut self, context: &Context<'s>, end: u64, list: BlockList) -> Result<Step, Fatal> {
        let start = self.produced;
        let produced = start + list.length()?;
        let mut transaction = Transaction::begin(self.segment, context.slot);
        transaction.store(&self.slot.outgoing_start, start);
        transaction.store(&self.slot.committed, slot::pack(end, produced));
        transaction.commit()?;
        self.outgoing = Some(Outgoing { list, start });
        (self.executed, self.produced) = (end, produced);
        Ok(Step::Done)
    }

    /// Answers a read of a value that does not fit the ring; it had `length` bytes when it was looked at.
    pub(super) fn answer_large_value(
        &mut self,
        context: &mut Context<'s>,
        end: u64,
        (number, hash, key): (u32, KeyHash, &[u8]),
        mut length: u64,
    ) -> Result<Step, Fatal> {
        let mut head = [0; VALUE_HEAD_BYTES_MAX];
        loop {
            let head_length = value_response_head(&mut head, number, length as usize);
            let Some(list) = self.outgoing_list(context, head_length as u64 + length)? else {
                return self.answer_full(context, end, number);
            };
            let read = context
                .table
                .read(hash, key, |value| self.copy_large(value, &list, &head[..head_length], length));
            match read {
                Ok(Some(Ok(()))) => return self.begin_outgoing(context, end, list),
                Ok(other) => {
                    list.release(context.slot, &self.slot.outgoing)?;
                    match other {
                        // It was replaced meanwhile; whoever replaces it needs longer than this loop.
                        Some(Err(now)) if request::is_large(now) => length = now,
                        Some(Err(_)) => return Ok(Step::Done),
                        _ => {
                            return self.answer(
                                context,
                                end,
                                &Response { number, body: ResponseBody::Missing },
                            );
                        }
                    }
                }
                Err(error) => {
                    list.release(context.slot, &self.slot.outgoing)?;
                    return self.answer_table_error(context, end, number, error);
                }
            }
        }
    }

    /// Copies head and value into the list; the length it has now when it isn't the one expected.
    fn copy_large(
        &self,
        value: &Value<'_>,
        list: &BlockList,
        head: &[u8],
        length: u64,
    ) -> Result<Result<(), u64>, Damaged> {
        if value.length() != length {
            return Ok(Err(value.length()));
        }
        let memory = self.segment.memory();
        let total = head.len() as u64 + length;
        let mut buffer = [0u8; 4096];
        let mut done = 0;
        while done < total {
            let (offset, room) = list.piece(done)?;
            let count = room.min(buffer.len() as u64) as usize;
            let part = &mut buffer[..count];
            let from_head = (head.len() as u64).saturating_sub(done).min(count as u64) as usize;
            part[..from_head].copy_from_slice(&head[done.min(head.len() as u64) as usize..][..from_head]);
            value.copy_to(
                (done + from_head as u64).saturating_sub(head.len() as u64),
                &mut part[from_head..],
            )?;
            memory.write_bytes(offset, part)?;
            done += count as u64;
        }
        Ok(Ok(()))
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
