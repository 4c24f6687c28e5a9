//! What the client was told, what it has asked and what the backup file will be told, as a segment has it whose logs are
//! completed: they must agree on which requests have happened.

use kvs_core::arena::block_list::{BlockList, Chunk};
use kvs_core::backup::record::Kind;
use kvs_core::backup::ring::{Record, Ring};
use kvs_core::connection::slot;
use kvs_core::segment::Segment;
use kvs_core::segment::layout::{ConnectionSlot, RingPlace, WorkerSlot};
use kvs_core::sys::memory::WORD_BYTES;
use kvs_core::table::Table;
use kvs_core::table::entry::Entry;

use crate::store::Expected;
use crate::violation::{Violation, demand, must, violation};

/// Where streams and ring stand before the mutation.
pub struct Base {
    executed: u32,
    produced: u32,
    received: u64,
    ring_head: u64,
}

impl Base {
    /// As `segment` has it.
    ///
    /// # Errors
    /// Never.
    pub fn of(segment: &Segment) -> anyhow::Result<Self> {
        let connection: &ConnectionSlot = segment.memory().object(segment.regions().connection(0))?;
        let worker: &WorkerSlot = segment.memory().object(segment.regions().worker(0))?;
        if !slot::is_used(connection) {
            return Ok(Self { executed: 0, produced: 0, received: 0, ring_head: worker.ring_head.load() });
        }
        let (executed, produced) = slot::unpack(connection.committed.load());
        Ok(Self {
            executed,
            produced,
            received: connection.received.load(),
            ring_head: worker.ring_head.load(),
        })
    }
}

/// A segment and what is expected of it.
pub struct Agreement<'a> {
    /// The segment.
    pub segment: &'a Segment,
    /// Its table.
    pub table: &'a Table,
    /// What must come of the requests.
    pub expected: &'a Expected,
    /// Where all stood before.
    pub base: &'a Base,
}

impl Agreement<'_> {
    /// How many requests `committed` says have happened. Their answers, and the requests that are not executed, must be where
    /// the next data server looks for them.
    ///
    /// # Errors
    /// A violation.
    pub fn requests_committed(&self) -> anyhow::Result<usize> {
        let slot: &ConnectionSlot = self.segment.memory().object(self.segment.regions().connection(0))?;
        // Not begun yet, or ended.
        if !slot::is_used(slot) {
            return Ok(0);
        }
        let (executed, produced) = slot::unpack(slot.committed.load());
        let executed = u64::from(executed.wrapping_sub(self.base.executed));
        let produced = u64::from(produced.wrapping_sub(self.base.produced));
        let marks = &self.expected.marks;
        let Some(done) = marks.iter().position(|mark| mark.1 == produced) else {
            return Err(violation(format!(
                "committed says that {produced} bytes of answers are there: none ends there"
            )));
        };
        // A value that comes in piece by piece is executed up to the last piece that is kept.
        let collects = slot.assembly_end.load() != 0;
        let most = marks.get(done + 1).filter(|_| collects).map_or(marks[done].0, |mark| mark.0);
        demand!(
            (marks[done].0..=most).contains(&executed),
            "committed says that {done} requests are answered, and that {executed} bytes are executed"
        );
        if collects {
            self.pieces_are_kept(slot, part(&self.expected.requests, 0, executed)?)?;
        }
        let received = slot.received.load().wrapping_sub(self.base.received);
        // What a large value goes on with may have been received where its list goes on.
        let direct_until = slot.direct_until.load().saturating_sub(self.base.received);
        let in_ring = direct_until.min(received).max(executed);
        self.list_goes_on(slot, part(&self.expected.requests, executed, in_ring)?)?;
        let unread = part(&self.expected.requests, in_ring, received)?;
        self.ring_holds(&slot.input, u64::from(self.base.executed) + in_ring, unread, "requests")?;
        let sent = slot.sent.load().wrapping_sub(u64::from(self.base.produced));
        let outgoing = slot.outgoing_start.load().wrapping_sub(u64::from(self.base.produced));
        let in_ring = outgoing.clamp(sent, produced);
        self.entry_holds(slot, part(&self.expected.answers, in_ring, produced)?)?;
        let unsent = part(&self.expected.answers, sent, in_ring)?;
        self.ring_holds(&slot.output, u64::from(self.base.produced) + sent, unsent, "answers")?;
        Ok(done)
    }

    /// The list of the value that comes in ends with what was executed last.
    fn pieces_are_kept(&self, slot: &ConnectionSlot, executed: &[u8]) -> anyhow::Result<()> {
        let list = must("the list of a value", BlockList::open(self.segment, slot.assembly.load()))?;
        let key_bytes = slot.assembly_key_bytes.load().next_multiple_of(WORD_BYTES);
        let count = list.filled()?.saturating_sub(key_bytes);
        let mut found = Vec::new();
        while (found.len() as u64) < count {
            let (offset, length) = list.piece(key_bytes + found.len() as u64)?;
            demand!(length > 0, "the list of a value ends too early");
            let start = found.len();
            found.resize(start + length as usize, 0);
            self.segment.memory().read_bytes(offset, &mut found[start..])?;
        }
        demand!(executed.ends_with(&found), "the list of a value does not end with what was executed last");
        Ok(())
    }

    /// Behind what it has, the list of the value that comes in holds what was received and isn't executed.
    fn list_goes_on(&self, slot: &ConnectionSlot, wanted: &[u8]) -> anyhow::Result<()> {
        if wanted.is_empty() {
            return Ok(());
        }
        let list = must("the list of a value", BlockList::open(self.segment, slot.assembly.load()))?;
        let (offset, _) = list.piece(list.filled()?)?;
        let mut found = vec![0; wanted.len()];
        self.segment.memory().read_bytes(offset, &mut found)?;
        demand!(found == wanted, "the requests behind `committed` are not where the list of a value goes on");
        Ok(())
    }

    fn ring_holds(&self, ring: &RingPlace, at: u64, wanted: &[u8], what: &str) -> anyhow::Result<()> {
        if wanted.is_empty() {
            return Ok(());
        }
        let base = ring.base.load();
        let Some(ring) = Chunk::decode(ring.block.load()).filter(|chunk| chunk.offset != 0) else {
            return Err(violation(format!(
                "there is no ring, and {} bytes of {what} should be in it",
                wanted.len()
            )));
        };
        let start = at.wrapping_sub(base) % ring.bytes();
        let (first, second) = wanted.split_at(wanted.len().min((ring.bytes() - start) as usize));
        for (offset, wanted) in [(ring.offset + start, first), (ring.offset, second)] {
            let mut found = vec![0; wanted.len()];
            self.segment.memory().read_bytes(offset, &mut found)?;
            demand!(found == wanted, "the {what} behind `committed` are not in the ring");
        }
        Ok(())
    }

    /// The end of an answer that is sent from its entry is there.
    fn entry_holds(&self, slot: &ConnectionSlot, wanted: &[u8]) -> anyhow::Result<()> {
        if wanted.is_empty() {
            return Ok(());
        }
        let offset = slot.outgoing.load() & !slot::pinned(0);
        let entry = must("what is sent from its entry", Entry::load(self.segment.memory(), offset))?;
        let entry = entry.ok_or_else(|| violation("what is to be sent is no entry"))?;
        let mut content = Vec::new();
        must("what is sent from its entry", entry.append_content(&mut content))?;
        demand!(content.ends_with(wanted), "what is to be sent is not in its entry");
        Ok(())
    }

    /// The backup ring holds what `done` requests changed.
    ///
    /// # Errors
    /// A violation.
    pub fn backup_ring_holds(&self, done: usize) -> anyhow::Result<()> {
        let slot: &WorkerSlot = self.segment.memory().object(self.segment.regions().worker(0))?;
        let ring = Ring::of(self.segment, slot)?;
        let (mut at, head) = (self.base.ring_head, slot.ring_head.load());
        let records = &self.expected.records[..self.expected.record_counts[done]];
        for (index, (key, value)) in records.iter().enumerate() {
            demand!(at < head, "{index} changes are in the backup ring instead of {}", records.len());
            let record = must("the backup ring", ring.record(at, head))?;
            let wanted = [&key[..], value.as_deref().unwrap_or_default()].concat();
            let kind = if value.is_some() { Kind::Set } else { Kind::Delete };
            let found = self.content_of(&ring, &record)?;
            demand!(record.kind == kind && found == wanted, "the backup ring holds another change");
            let is_last = !records[index + 1..].iter().any(|(other, _)| other == key);
            let version =
                self.table.view().find(self.table.hash_of(key), key, |place| Ok(place.entry.version()));
            let version = must("the version", version)?.filter(|_| is_last);
            demand!(
                version.is_none_or(|version| version == record.version),
                "the entry has another version than its change in the backup ring"
            );
            at += record.bytes;
        }
        demand!(at == head, "there is a change in the backup ring that did not happen");
        Ok(())
    }

    /// Key and value of a record.
    fn content_of(&self, ring: &Ring<'_>, record: &Record) -> anyhow::Result<Vec<u8>> {
        let mut content = Vec::new();
        if record.entry == 0 {
            ring.copy(record, &mut content)?;
            return Ok(content);
        }
        let entry =
            must("a large value in the backup ring", Entry::load(self.segment.memory(), record.entry))?;
        let entry = entry.ok_or_else(|| violation("the backup ring names a large value that isn't there"))?;
        must("a large value in the backup ring", entry.append_content(&mut content))?;
        Ok(content)
    }
}

/// The bytes of a stream from position `from` to `to`.
fn part(stream: &[u8], from: u64, to: u64) -> Result<&[u8], Violation> {
    let part = stream.get(from as usize..to as usize);
    part.ok_or_else(|| Violation(format!("a stream of {} bytes has none from {from} to {to}", stream.len())))
}
