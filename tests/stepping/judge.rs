//! The promises, held against one image of the segment: what a process that died there left.
//!
//! 1. A lock-free reader finds every key, the changed one as it was or as it becomes, and never the old one again.
//! 2. With the decided logs completed: the verifier finds no fault, `committed` stands at the end of a request's answer, those
//!    answers are in the output ring, the requests that are not executed in the input ring, and in the table is what the
//!    executed ones, and no others, made of it, as in the backup ring, in order, is what they changed.
//! 3. After recovery as the data server does it: the same of the table, no fault, every lock free.
//! 4. Recovery a second time changes nothing.
//! 5. A slot that changed: its home's sequence went up, after that, and before the memory of the entry could be another's.
//! 6. The client's next try brings everything to its end.
//! 7. Where it is about the backup file: taken up by the next data server, it comes to hold what the table holds.

use std::hash::{DefaultHasher, Hash, Hasher};

use kvs_core::check;
use kvs_core::recover;
use kvs_core::segment::layout::WorkerSlot;
use kvs_core::segment::{Segment, SegmentView};
use kvs_core::sys::robust_mutex::Acquired;
use kvs_core::transaction::{self, Recovered};

use crate::agreement::{Agreement, Base};
use crate::backup::Files;
use crate::client::Client;
use crate::image::{Image, locks, owners_die};
use crate::pages::{Change, Pages, is_lock};
use crate::readers::{self, Order};
use crate::store::{Expected, Model, look_up};
use crate::violation::{demand, must};

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
    base: Base,
    /// How far readers have seen the requests happen.
    seen: usize,
    order: Order,
}

impl<'e> Judge<'e> {
    /// Of images with these pages; `segment` is now as it is before the mutation.
    ///
    /// # Errors
    /// Never, with memory.
    pub fn new(segment: &Segment, pages: &Pages, expected: &'e Expected) -> anyhow::Result<Self> {
        let before = Image::of(segment, pages)?;
        Ok(Self {
            expected,
            shared_pages: pages.below(segment.regions().data),
            pages: pages.clone(),
            image: Image::of(segment, pages)?,
            work: Image::of(segment, pages)?,
            recovered: Image::of(segment, pages)?,
            base: Base::of(segment)?,
            before,
            seen: 0,
            order: Order::default(),
        })
    }

    /// The mutation begins anew.
    pub fn begin(&mut self) {
        self.seen = 0;
        self.order = Order::default();
    }

    /// These words have changed since the image before.
    ///
    /// # Errors
    /// A violation.
    pub fn follow(&mut self, changes: &[Change]) -> anyhow::Result<()> {
        self.order.follow(&self.image, changes)
    }

    /// Takes what `segment` is now for the image at hand; whoever holds a lock in it is dead there, and the kernel has said so.
    ///
    /// # Errors
    /// Never.
    pub fn take(&mut self, segment: &Segment) -> anyhow::Result<()> {
        self.pages.copy(segment.memory(), self.image.segment.memory())?;
        owners_die(&self.image.segment)
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
        self.seen = readers::find_everything(&self.image, self.expected, self.seen)?;
        let done = self.completed_agrees()?;
        self.recovered_is_sound(done)?;
        let changes = self.pages.differences(self.image.segment.memory(), self.work.segment.memory())?;
        let kind = self.kind(done, &changes)?;
        readers::sequences_went_up(&self.shared_pages, &self.before, &self.work)?;
        readers::nothing_freed_unsaid(&self.shared_pages, &self.before, &self.image)?;
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
        self.recovered_is_sound(done)
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
        let Image { segment, table } = &self.work;
        let agreement = Agreement { segment, table, expected: self.expected, base: &self.base };
        let done = agreement.requests_committed()?;
        self.table_is(&self.expected.models[done], "with the logs completed")?;
        agreement.backup_ring_holds(done)?;
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

    /// Recovers the image at hand twice.
    fn recovered_is_sound(&self, done: usize) -> anyhow::Result<()> {
        self.begin_work()?;
        must("recovery", recover::recover(&self.work.anew()?))?;
        self.no_fault("after recovery")?;
        self.table_is(&self.expected.models[done], "after recovery")?;
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
