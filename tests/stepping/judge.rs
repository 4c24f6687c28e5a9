//! The promises, held against one image of the segment: what a process that died there left.
//!
//! 1. A lock-free reader finds every key, the changed one as it was or as it becomes, and never the old one again.
//! 2. With the decided logs completed: the verifier finds no fault, `committed` stands at the end of a request's answer, those
//!    answers are in the output ring, the requests that are not executed in the input ring, and in the table is what the
//!    executed ones, and no others, made of it, as in the backup ring, in order, is what they changed.
//! 3. After recovery as the data server does it: the same of the table, no fault, every lock free.
//! 4. Recovery a second time changes nothing.
//! 5. A slot that changed: its home's sequence went up, and did so before the memory of the entry was free again.
//! 6. The client's next try brings everything to its end.
//! 7. Where it is about the backup file: taken up by the next data server, it comes to hold what the table holds.

use std::hash::{DefaultHasher, Hash, Hasher};

use kvs_core::arena::block_list::{BlockList, Chunk};
use kvs_core::arena::slab::{Meta, Slab, block_index, slab_of};
use kvs_core::backup::record::Kind;
use kvs_core::backup::ring::Ring;
use kvs_core::check;
use kvs_core::connection::slot;
use kvs_core::recover;
use kvs_core::segment::layout::{BUCKET_BYTES, ConnectionSlot, WorkerSlot};
use kvs_core::segment::{Segment, SegmentView};
use kvs_core::sys::memory::{Offset, WORD_BYTES, Word};
use kvs_core::sys::robust_mutex::{Acquired, RobustMutex};
use kvs_core::table::Table;
use kvs_core::table::bucket::{BucketHeader, Buckets, Slot};
use kvs_core::table::entry::Entry;
use kvs_core::table::geometry::Geometry;
use kvs_core::transaction::{self, Recovered};

use crate::backup::Files;
use crate::client::Client;
use crate::pages::{Change, Pages, is_lock};
use crate::store::{Expected, Model, look_up};
use crate::violation::{Violation, demand, must};

/// A segment in this process's memory, for images.
pub struct Image {
    /// The segment.
    pub segment: Segment,
    /// Its table.
    pub table: Table,
}

impl Image {
    /// A copy of `pages` of `from`.
    ///
    /// # Errors
    /// Never, with memory.
    pub fn of(from: &Segment, pages: &Pages) -> anyhow::Result<Self> {
        let segment = Segment::on_heap(from.regions().capacity_bytes)?;
        pages.copy(from.memory(), segment.memory())?;
        // The table keeps the seed, so it comes after the header.
        let table = Table::new(&segment)?;
        Ok(Self { segment, table })
    }

    /// Its table as a new process has it.
    fn anew(&self) -> anyhow::Result<Table> {
        Ok(Table::new(&self.segment)?)
    }
}

/// Every lock of `segment`, with its name.
fn locks(segment: &Segment) -> anyhow::Result<Vec<(String, &RobustMutex)>> {
    let mut locks = vec![("the arena's lock".to_owned(), &segment.header()?.arena_lock)];
    for index in 0..segment.regions().shard_count {
        locks.push((format!("the lock of shard {index}"), &segment.shard(index)?.lock));
    }
    Ok(locks)
}

/// In the first word of a lock as glibc has it: what the kernel knows it by, of that the thread that holds it, and what the
/// kernel leaves there when that thread dies. That it does so at every instruction is what the real kills are for.
const FUTEX_MASK: u64 = 0xffff_ffff;
const OWNER_MASK: u64 = 0x3fff_ffff;
const OWNER_DIED: u64 = 0x4000_0000;

fn lock_word<'s>(segment: &'s Segment, lock: &RobustMutex) -> anyhow::Result<&'s Word> {
    let start = std::ptr::from_ref(segment.memory().word(0)?).addr();
    Ok(segment.memory().word((std::ptr::from_ref(lock).addr() - start) as u64)?)
}

/// Demands that nobody would wait for a lock of a process that was killed; returns how many were found held.
///
/// # Errors
/// A violation.
pub fn no_lock_blocks(segment: &Segment) -> anyhow::Result<usize> {
    let mut held = 0;
    for (name, lock) in locks(segment)? {
        match must(&name, lock.try_lock())? {
            Some(Acquired::Clean(_)) => {}
            Some(Acquired::OwnerDied(mut guard)) => {
                guard.mark_consistent();
                held += 1;
            }
            None => demand!(false, "{name} is held by a dead process, and its successor isn't told"),
        }
    }
    Ok(held)
}

/// What an image looks like to recovery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Judged {
    /// Requests that have happened.
    pub done: usize,
    /// The same for images that recovery can't tell apart.
    pub kind: u64,
}

/// Judges images of one mutation.
pub struct Judge<'e> {
    expected: &'e Expected,
    pages: Pages,
    shared_pages: Pages,
    /// Before the mutation.
    before: Image,
    /// The image at hand.
    pub image: Image,
    /// Where recovery runs.
    work: Image,
    recovered: Image,
    base: (u32, u32),
    received: u64,
    ring_head: u64,
    /// How far readers have seen the requests happen.
    seen: usize,
}

impl<'e> Judge<'e> {
    /// Of images with these pages; `segment` is now as it is before the mutation.
    ///
    /// # Errors
    /// Never, with memory.
    pub fn new(segment: &Segment, pages: &Pages, expected: &'e Expected) -> anyhow::Result<Self> {
        let before = Image::of(segment, pages)?;
        let slot: &ConnectionSlot = segment.memory().object(segment.regions().connection(0))?;
        let worker: &WorkerSlot = segment.memory().object(segment.regions().worker(0))?;
        Ok(Self {
            expected,
            shared_pages: pages.below(segment.regions().data),
            pages: pages.clone(),
            image: Image::of(segment, pages)?,
            work: Image::of(segment, pages)?,
            recovered: Image::of(segment, pages)?,
            base: slot::unpack(slot.committed.load()),
            received: slot.received.load(),
            ring_head: worker.ring_head.load(),
            before,
            seen: 0,
        })
    }

    /// The mutation begins anew.
    pub fn begin(&mut self) {
        self.seen = 0;
    }

    /// Takes what `segment` is now for the image at hand; whoever holds a lock in it is dead there, and the kernel has said so.
    ///
    /// # Errors
    /// Never.
    pub fn take(&mut self, segment: &Segment) -> anyhow::Result<()> {
        let memory = self.image.segment.memory();
        self.pages.copy(segment.memory(), memory)?;
        for (_, lock) in locks(&self.image.segment)? {
            let word = lock_word(&self.image.segment, lock)?;
            if word.load() & OWNER_MASK != 0 {
                memory.store(word, word.load() & !FUTEX_MASK | OWNER_DIED);
            }
        }
        Ok(())
    }

    /// What is different in `segment` from before the mutation.
    ///
    /// # Errors
    /// Never.
    pub fn changes_in(&self, segment: &Segment) -> anyhow::Result<Vec<Change>> {
        Ok(self.pages.differences(self.before.segment.memory(), segment.memory())?)
    }

    /// The bytes of the image that are the same in every run: all but the locks, which name the process.
    ///
    /// # Errors
    /// Never.
    pub fn fingerprint(&self, watched: &Pages) -> anyhow::Result<u64> {
        let mut hasher = DefaultHasher::new();
        for change in watched.differences(self.before.segment.memory(), self.image.segment.memory())? {
            if !is_lock(&self.before.segment, change.offset) {
                (change.offset, change.new).hash(&mut hasher);
            }
        }
        Ok(hasher.finish())
    }

    /// Holds every promise against the image at hand, found while the mutation runs, and against the backup `files` if it is
    /// about those.
    ///
    /// # Errors
    /// A violation.
    pub fn judge(&mut self, files: Option<&Files>) -> anyhow::Result<Judged> {
        self.readers_find_everything()?;
        let done = self.completed_agrees()?;
        self.recovered_is_sound(Some(done))?;
        let changes = self.pages.differences(self.image.segment.memory(), self.work.segment.memory())?;
        let kind = self.kind(done, &changes)?;
        self.sequences_went_up()?;
        if let Some(files) = files {
            self.begin_work()?;
            let table = self.work.anew()?.backed_up();
            must("recovery", recover::recover(&table))?;
            files.judge(&table, &self.expected.models[done])?;
            self.no_fault("after the backup file was taken up")?;
        }
        Ok(Judged { done, kind })
    }

    /// As [`Judge::judge`], for an image that a recovery left that was killed, of an image in which `done` requests had
    /// happened.
    ///
    /// # Errors
    /// A violation.
    pub fn judge_recovery(&mut self, done: usize) -> anyhow::Result<()> {
        self.recovered_is_sound(Some(done))
    }

    fn readers_find_everything(&mut self) -> anyhow::Result<()> {
        for key in &self.expected.keys {
            let found = must("a reader is told", look_up(&self.image.table, key))?;
            let seen = (self.seen..self.expected.models.len())
                .find(|&done| self.expected.models[done].get(key) == found.as_ref());
            let key = String::from_utf8_lossy(key);
            demand!(
                seen.is_some(),
                "a reader finds {key:?} as it can't be, or as it was before it was changed"
            );
            self.seen = seen.unwrap_or(self.seen);
        }
        Ok(())
    }

    fn begin_work(&self) -> anyhow::Result<()> {
        Ok(self.pages.copy(self.image.segment.memory(), self.work.segment.memory())?)
    }

    fn no_fault(&self, when: &str) -> anyhow::Result<()> {
        let report = must(when, check::check_view(&SegmentView::of(&self.work.segment)))?;
        demand!(report.fault_count == 0, "{when}: {}", report.faults.join("; "));
        Ok(())
    }

    /// Completes the logs, and nothing more; how many requests have happened, by `committed` and by the table.
    fn completed_agrees(&self) -> anyhow::Result<usize> {
        self.begin_work()?;
        let segment = &self.work.segment;
        for index in 0..segment.header()?.worker_slots_reserved.load() {
            let slot: &WorkerSlot = segment.memory().object(segment.regions().worker(index))?;
            let recovered = must("completing a log", transaction::recover(segment.memory(), slot))?;
            demand!(recovered != Recovered::Damaged, "the log of worker {index} contradicts itself");
        }
        self.no_fault("with the logs completed")?;
        let done = self.requests_committed()?;
        self.table_is(&self.expected.models[done], "with the logs completed")?;
        self.backup_ring_holds(done)?;
        Ok(done)
    }

    fn table_is(&self, model: &Model, when: &str) -> anyhow::Result<()> {
        for key in &self.expected.keys {
            let found = must(when, look_up(&self.work.table, key))?;
            let key_text = String::from_utf8_lossy(key);
            demand!(
                found.as_ref() == model.get(key),
                "{when}: {key_text:?} is not what the executed requests made of it"
            );
        }
        let (found, wanted) = (self.work.table.totals().entries, model.len() as u64);
        demand!(found == wanted, "{when}: there are {found} entries instead of {wanted}");
        Ok(())
    }

    /// How many requests `committed` says have happened. Their answers, and the requests that are not executed, must be where
    /// the next data server looks for them.
    fn requests_committed(&self) -> anyhow::Result<usize> {
        let segment = &self.work.segment;
        let slot: &ConnectionSlot = segment.memory().object(segment.regions().connection(0))?;
        let (executed, produced) = slot::unpack(slot.committed.load());
        let executed = u64::from(executed.wrapping_sub(self.base.0));
        let produced = u64::from(produced.wrapping_sub(self.base.1));
        let marks = &self.expected.marks;
        let done = marks.iter().position(|mark| mark.1 == produced);
        let Some(done) = done else {
            demand!(false, "committed says that {produced} bytes of answers are there: no answer ends there");
            return Ok(0);
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
        let received = slot.received.load().wrapping_sub(self.received);
        let unread = part(&self.expected.requests, executed, received)?;
        self.ring_holds(slot.input.load(), u64::from(self.base.0) + executed, unread, "requests")?;
        let sent = slot.sent.load().wrapping_sub(u64::from(self.base.1));
        let unsent = part(&self.expected.answers, sent, produced)?;
        self.ring_holds(slot.output.load(), u64::from(self.base.1) + sent, unsent, "answers")?;
        Ok(done)
    }

    /// The list of the value that comes in ends with what was executed last.
    fn pieces_are_kept(&self, slot: &ConnectionSlot, executed: &[u8]) -> anyhow::Result<()> {
        let list = must("the list of a value", BlockList::open(&self.work.segment, slot.assembly.load()))?;
        let key_bytes = slot.assembly_key_bytes.load().next_multiple_of(WORD_BYTES);
        let count = list.filled()?.saturating_sub(key_bytes);
        let mut found = Vec::new();
        while (found.len() as u64) < count {
            let (offset, length) = list.piece(key_bytes + found.len() as u64)?;
            demand!(length > 0, "the list of a value ends too early");
            let start = found.len();
            found.resize(start + length as usize, 0);
            self.work.segment.memory().read_bytes(offset, &mut found[start..])?;
        }
        demand!(executed.ends_with(&found), "the list of a value does not end with what was executed last");
        Ok(())
    }

    fn ring_holds(&self, word: u64, at: u64, wanted: &[u8], what: &str) -> anyhow::Result<()> {
        if wanted.is_empty() {
            return Ok(());
        }
        let ring = Chunk::decode(word).filter(|chunk| chunk.offset != 0);
        let Some(ring) = ring else {
            demand!(false, "there is no ring, and {} bytes of {what} should be in it", wanted.len());
            return Ok(());
        };
        let start = at % ring.bytes();
        let (first, second) = wanted.split_at(wanted.len().min((ring.bytes() - start) as usize));
        for (offset, wanted) in [(ring.offset + start, first), (ring.offset, second)] {
            let mut found = vec![0; wanted.len()];
            self.work.segment.memory().read_bytes(offset, &mut found)?;
            demand!(found == wanted, "the {what} behind `committed` are not in the ring");
        }
        Ok(())
    }

    /// The backup ring holds what `done` requests changed.
    fn backup_ring_holds(&self, done: usize) -> anyhow::Result<()> {
        let (table, memory) = (&self.work.table, self.work.segment.memory());
        let slot: &WorkerSlot = memory.object(self.work.segment.regions().worker(0))?;
        let ring = Ring::of(&self.work.segment, slot)?;
        let (mut at, head) = (self.ring_head, slot.ring_head.load());
        let records = &self.expected.records[..self.expected.record_counts[done]];
        for (index, (key, value)) in records.iter().enumerate() {
            demand!(at < head, "{index} changes are in the backup ring instead of {}", records.len());
            let record = must("the backup ring", ring.record(at, head))?;
            let mut found = Vec::new();
            if record.entry == 0 {
                ring.copy(&record, &mut found)?;
            } else {
                let entry = must("a large value in the backup ring", Entry::load(memory, record.entry))?;
                let Some(entry) = entry else {
                    demand!(false, "the backup ring names a large value that isn't there");
                    return Ok(());
                };
                must("a large value in the backup ring", entry.append_content(&mut found))?;
            }
            let wanted = [&key[..], value.as_deref().unwrap_or_default()].concat();
            let kind = if value.is_some() { Kind::Set } else { Kind::Delete };
            demand!(record.kind == kind && found == wanted, "the backup ring holds another change");
            let is_last = !records[index + 1..].iter().any(|(other, _)| other == key);
            let version = table.view().find(table.hash_of(key), key, |place| Ok(place.entry.version()));
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

    /// Recovers the image at hand twice.
    fn recovered_is_sound(&self, done: Option<usize>) -> anyhow::Result<()> {
        self.begin_work()?;
        must("recovery", recover::recover(&self.work.anew()?))?;
        self.no_fault("after recovery")?;
        if let Some(done) = done {
            self.table_is(&self.expected.models[done], "after recovery")?;
        }
        self.pages.copy(self.work.segment.memory(), self.recovered.segment.memory())?;
        must("recovery again", recover::recover(&self.work.anew()?))?;
        let mut again =
            self.pages.differences(self.recovered.segment.memory(), self.work.segment.memory())?;
        // A lock that was used before isn't byte for byte one that wasn't; that it is free is seen below.
        again.retain(|change| !is_lock(&self.work.segment, change.offset));
        demand!(again.is_empty(), "recovery again changes {} words: {again:x?}", again.len());
        for (name, lock) in locks(&self.work.segment)? {
            let acquired = must(&name, lock.try_lock())?;
            demand!(matches!(acquired, Some(Acquired::Clean(_))), "{name} is not free after recovery");
        }
        Ok(())
    }

    /// Images of one kind are the same to recovery: what it changes is the same, and so is all that it looks at before it
    /// decides what to do.
    fn kind(&self, done: usize, changes: &[Change]) -> anyhow::Result<u64> {
        let (segment, mut hasher) = (&self.image.segment, DefaultHasher::new());
        (done, self.seen).hash(&mut hasher);
        for change in changes.iter().filter(|change| !is_lock(segment, change.offset)) {
            change.hash(&mut hasher);
        }
        let regions = segment.regions();
        let slots = segment.header()?.worker_slots_reserved.load();
        for change in self.shared_pages.differences(self.before.segment.memory(), segment.memory())? {
            // What is in a backup ring counts only up to its head, which is a word of the worker's slot.
            if (regions.rings..regions.buckets).contains(&change.offset) {
                continue;
            }
            let in_slot = (0..slots).find(|&index| {
                let start = regions.worker(index).bytes();
                (start..start + size_of::<WorkerSlot>() as u64).contains(&change.offset)
            });
            let undecided = match in_slot {
                Some(index) => segment.memory().object(regions.worker(index))?.intent.load() == 0,
                None => false,
            };
            if !undecided && !is_lock(segment, change.offset) {
                change.hash(&mut hasher);
            }
        }
        Ok(hasher.finish())
    }

    /// For readers that were in the midst of a read: of each slot that changed, the home says so, and said so before the memory
    /// of the entry could be another's.
    fn sequences_went_up(&self) -> anyhow::Result<()> {
        let before = &self.before;
        for change in self.slots_changed(&self.work)? {
            for (image, word) in [(before, change.old), (&self.work, change.new)] {
                if let Some((home, header)) = home_of(image, change.offset, word)? {
                    let now = header_word(&self.work, change.offset, home)?;
                    let was = if std::ptr::eq(image, before) {
                        header
                    } else {
                        header_word(before, change.offset, home)?
                    };
                    demand!(
                        was.sequence != now.sequence,
                        "a slot of bucket {home} changed, its sequence did not"
                    );
                }
            }
        }
        for change in self.slots_changed(&self.image)? {
            let Some(slot) = Slot::decode(change.old) else { continue };
            let Some((home, header)) = home_of(before, change.offset, change.old)? else { continue };
            // While the shard is locked, nobody takes a free block.
            let lock = &self.image.segment.shard(shard_of(before, change.offset))?.lock;
            let locked = lock_word(&self.image.segment, lock)?.load() & (OWNER_MASK | OWNER_DIED) != 0;
            if !locked && is_free(&self.image.segment, slot.offset)? {
                let now = header_word(&self.image, change.offset, home)?;
                demand!(
                    now.sequence != header.sequence,
                    "the entry at {:#x} can be another's before the sequence of its home says that it was replaced",
                    slot.offset
                );
            }
        }
        Ok(())
    }

    /// Slots that differ from those before the mutation.
    fn slots_changed(&self, image: &Image) -> anyhow::Result<Vec<Change>> {
        let regions = self.before.segment.regions();
        let changes = self.shared_pages.differences(self.before.segment.memory(), image.segment.memory())?;
        let is_slot = |change: &Change| {
            change.offset >= regions.buckets
                && !(change.offset - regions.buckets).is_multiple_of(BUCKET_BYTES)
        };
        Ok(changes.into_iter().filter(is_slot).collect())
    }

    /// Lets the client try again what hasn't happened, on what recovery left.
    ///
    /// # Errors
    /// A violation.
    pub fn next_try_succeeds(&self, done: usize) -> anyhow::Result<()> {
        self.begin_work()?;
        let table = self.work.anew()?.backed_up();
        must("recovery", recover::recover(&table))?;
        let (from, last) = (self.expected.marks[done], self.expected.models.len() - 1);
        let mut answers = Vec::new();
        let mut client = Client::greeted(&table)?;
        must("the next try", client.exchange(&self.expected.requests[from.0 as usize..], &mut answers))?;
        must("the end of the next try", client.close())?;
        demand!(answers == self.expected.answers[from.1 as usize..], "the next try is answered differently");
        self.no_fault("after the next try")?;
        self.table_is(&self.expected.models[last], "after the next try")
    }
}

/// The bytes of a stream from position `from` to `to`.
fn part(stream: &[u8], from: u64, to: u64) -> Result<&[u8], Violation> {
    let part = stream.get(from as usize..to as usize);
    part.ok_or_else(|| Violation(format!("a stream of {} bytes has none from {from} to {to}", stream.len())))
}

/// The shard that the bucket slot at `offset` belongs to.
fn shard_of(image: &Image, offset: u64) -> u64 {
    let regions = image.segment.regions();
    (offset - regions.buckets) / regions.bucket_region_bytes
}

/// The home of the entry that slot `word` names, and its header, if there is one.
fn home_of(image: &Image, offset: u64, word: u64) -> anyhow::Result<Option<(u64, BucketHeader)>> {
    let Some(slot) = Slot::decode(word) else { return Ok(None) };
    let Some(entry) = Entry::load(image.segment.memory(), slot.offset)? else { return Ok(None) };
    let mut key = Vec::new();
    entry.copy_key(&mut key)?;
    let hash = image.table.hash_of(&key);
    let shard = image.segment.shard(shard_of(image, offset))?;
    let Some(geometry) = Geometry::decode(shard.geometry.load()) else { return Ok(None) };
    let home = geometry.home(hash.0);
    Ok(Some((home, header_word(image, offset, home)?)))
}

fn header_word(image: &Image, offset: u64, home: u64) -> anyhow::Result<BucketHeader> {
    Ok(Buckets::of(&image.segment, shard_of(image, offset)).header(home)?)
}

/// Whether the block of an entry is marked free in its slab, or the slab is gone.
fn is_free(segment: &Segment, offset: u64) -> anyhow::Result<bool> {
    let slab: &Slab = segment.memory().object(Offset::new(slab_of(offset)))?;
    let Some(meta) = Meta::decode(slab.meta.load()) else { return Ok(true) };
    let Some(block) = block_index(offset, meta.class) else { return Ok(true) };
    Ok(slab.bitmap[(block / 64) as usize].load() >> (block % 64) & 1 == 1)
}
