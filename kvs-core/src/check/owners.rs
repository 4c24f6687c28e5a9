//! What workers and connections name: values still to be freed, buffers, lists.

use super::Walk;
use super::blocks::Owner;
use crate::arena::block_list::{self, Chunk, HEAD_ORDER};
use crate::connection::slot;
use crate::limits::{CONNECTIONS_MAX_LIMIT, WORKERS_MAX};
use crate::segment::layout::{ConnectionSlot, Header, WorkerSlot};
use crate::sys::memory::{Damaged, Word};
use crate::table::entry::Entry;

impl Walk<'_> {
    /// Claims what workers have replaced and not yet freed.
    pub(super) fn workers(&mut self, header: &Header) -> Result<(), Damaged> {
        let count = header.worker_slots_reserved.load();
        let count = super::bounded(&mut self.report, "worker slots", count, WORKERS_MAX as u64);
        for index in 0..count {
            let slot: &WorkerSlot = self.view.view().object(self.view.regions().worker(index))?;
            let walked = self.garbage(slot.garbage.load());
            self.report.sound(walked.map_err(|fault| format!("worker {index}: replaced values: {fault}")));
        }
        Ok(())
    }

    fn garbage(&mut self, first: u64) -> Result<(), String> {
        let mut offset = first;
        while offset != 0 {
            let entry = Entry::load(self.view.view(), offset).map_err(|damaged| damaged.to_string())?;
            let entry =
                entry.filter(Entry::is_chunked).ok_or(format!("{offset:#x} is no value in chunks"))?;
            self.claim_entry(&entry, None)?;
            offset = entry.garbage_word().map_err(|damaged| damaged.to_string())?.load();
        }
        Ok(())
    }

    /// Claims what connections hold.
    pub(super) fn connections(&mut self, header: &Header) -> Result<(), Damaged> {
        let count = header.connection_slots_reserved.load();
        let count =
            super::bounded(&mut self.report, "connection slots", count, u64::from(CONNECTIONS_MAX_LIMIT));
        for index in 0..count {
            let slot: &ConnectionSlot = self.view.view().object(self.view.regions().connection(index))?;
            self.report.connections += u64::from(slot::is_used(slot));
            for (what, owner, is_list) in [
                ("input buffer", &slot.input.block, false),
                ("output buffer", &slot.output.block, false),
                ("collected value", &slot.assembly, true),
                ("outgoing answer", &slot.outgoing, true),
            ] {
                let claimed = self.owned_by_connection(slot::is_used(slot), owner, is_list);
                self.report
                    .sound(claimed.map_err(|fault| format!("connection slot {index}: {what}: {fault}")));
            }
        }
        Ok(())
    }

    fn owned_by_connection(&mut self, used: bool, owner: &Word, is_list: bool) -> Result<(), String> {
        let word = owner.load();
        if word == 0 {
            return Ok(());
        }
        if !used {
            return Err(format!("the slot is free, but names {word:#x}"));
        }
        if !is_list {
            let chunk = Chunk::decode(word).ok_or(format!("{word:#x} is none"))?;
            return self.blocks.claim(chunk.offset, chunk.order, Owner::Ring);
        }
        match slot::outgoing_list(word) {
            // A value that is sent from its entry, which owns it.
            0 => Ok(()),
            list => self.list(list),
        }
    }

    fn list(&mut self, offset: u64) -> Result<(), String> {
        self.blocks.claim(offset, HEAD_ORDER, Owner::List)?;
        let (length, filled, chunks) =
            block_list::describe(self.view.view(), offset).map_err(|damaged| damaged.to_string())?;
        if filled > length {
            return Err(format!("the list at {offset:#x} holds {filled} bytes, of {length}"));
        }
        for chunk in chunks {
            let chunk = chunk.ok_or(format!("the list at {offset:#x} names what is no chunk"))?;
            self.blocks.claim(chunk.offset, chunk.order, Owner::List)?;
        }
        Ok(())
    }
}
