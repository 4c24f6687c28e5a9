//! Lives of a store on a simulated disk: workers that change things, the backup thread that takes them to the disk, deaths, faults of
//! the disk; and a ledger of what a power cut may leave of it.
//!
//! Everything runs in one thread, in an order that the seed decides: drains, syncs that are noted late, copies of the table a little at
//! a time, all between changes.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use super::super::disk::DiskFile;
use super::super::record::{self, FileHeader, Kind};
use super::super::simulate::{Fate, Operation, Random, SimulatedDisk, until_killed};
use super::super::writer::{SyncTicket, Writer};
use super::super::{BackupError, log, ring};
use super::{PATH, slot};
use crate::segment::Segment;
use crate::segment::layout::WorkerSlot;
use crate::table::{Table, TableError};
use crate::transaction::Transaction;
use crate::wire::SetCondition;

/// A segment in memory, and what was done to it.
pub(super) struct Store {
    pub(super) segment: Segment,
    pub(super) workers: u64,
    pub(super) ledger: Ledger,
}

/// What goes wrong in a life.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Trouble {
    /// The data server is killed before or after one operation on the disk in so many; 0 for never.
    pub(super) kills: u64,
    /// One operation on the disk in so many fails, and one sync in five; 0 for never.
    pub(super) faults: u64,
}

impl Store {
    /// An empty one.
    pub(super) fn new(workers: u64) -> Self {
        Self { segment: super::segment_of(workers), workers, ledger: Ledger::default() }
    }

    /// Lives for so many steps on `disk`; ends in order, or just so.
    pub(super) fn live(&mut self, disk: &SimulatedDisk, random: &mut Random, steps: usize, trouble: Trouble) {
        if trouble.kills + trouble.faults > 0 {
            disk.plan(fates(random.number(), trouble));
        }
        let mut left = steps;
        while left > 0 {
            until_killed(|| self.serve(disk, random, &mut left));
        }
        disk.heal();
        if random.one_in(2) {
            self.end(disk);
        }
    }

    /// Until the steps are done, or the data server dies.
    fn serve(&mut self, disk: &SimulatedDisk, random: &mut Random, left: &mut usize) {
        let segment = self.segment.clone();
        let plain = Table::new(&segment).expect("sound");
        for worker in 0..self.workers {
            ring::pin_all(&plain, slot(&segment, worker)).expect("sound");
        }
        let Some(mut server) = Server::start(disk, &plain, self.workers) else {
            *left = left.saturating_sub(1);
            return;
        };
        let table = plain.backed_up();
        while *left > 0 && !random.one_in(60) {
            *left -= 1;
            self.change(&table, &mut server, random);
            for _ in 0..random.below(4) {
                server.act(random, &mut self.ledger);
            }
        }
        // A failed sync of which a data server dies before it notes it is a second fault; see the page on power cuts.
        server.note_synced(&mut self.ledger);
    }

    /// Goes on until it can be ended in order, and ends.
    pub(super) fn end(&mut self, disk: &SimulatedDisk) {
        let segment = self.segment.clone();
        let plain = Table::new(&segment).expect("sound");
        for worker in 0..self.workers {
            ring::pin_all(&plain, slot(&segment, worker)).expect("sound");
        }
        let mut server = Server::start(disk, &plain, self.workers).expect("the disk is well");
        server.writer.end().expect("the disk is well");
        self.ledger.acknowledge(&server.tails(), disk.operations());
    }

    fn change(&mut self, table: &Table, server: &mut Server<'_>, random: &mut Random) {
        let worker = random.below(self.workers);
        let slot = slot(table.segment(), worker);
        let key = some_key(random);
        match self.try_change(table, slot, &key, random) {
            Err(TableError::BackupBehind) => server.drain(),
            made => {
                if let Some(value) = made.expect("room") {
                    let place = (worker, slot.ring_head.load());
                    self.ledger.note(&key, value, place, server.disk.operations());
                }
            }
        }
    }

    /// What the key is after the change; None when nothing changed.
    fn try_change(
        &mut self,
        table: &Table,
        worker: &WorkerSlot,
        key: &[u8],
        random: &mut Random,
    ) -> Result<Option<Option<Arc<[u8]>>>, TableError> {
        let hash = table.hash_of(key);
        let mut transaction = Transaction::begin(table.segment(), worker);
        let change = if key.starts_with(b"counter") && !random.one_in(4) {
            let sum = table.increment(&mut transaction, hash, key, 1 + random.below(9) as i64)?;
            Some(Some(sum.to_string().into_bytes().into()))
        } else if key.starts_with(b"counter") || random.one_in(4) {
            table.delete(&mut transaction, hash, key)?.then_some(None)
        } else {
            let value: Arc<[u8]> = self.ledger.some_value(random).into();
            let condition = if random.one_in(4) { SetCondition::IfAbsent } else { SetCondition::Always };
            if !Table::fits_inline(key.len(), value.len()) {
                drop(transaction);
                return Ok(super::set_large(table, worker, key, &value, condition)?.then_some(Some(value)));
            }
            table.set(&mut transaction, hash, key, &value, condition)?.then_some(Some(value))
        };
        transaction.commit()?;
        table.collect_garbage(worker)?;
        Ok(change)
    }
}

fn fates(seed: u64, trouble: Trouble) -> impl FnMut(&Operation) -> Fate + Send + 'static {
    let mut random = Random::new(seed);
    move |operation| {
        if trouble.kills > 0 && random.one_in(trouble.kills) {
            return if random.one_in(2) { Fate::DiesBefore } else { Fate::DiesAfter };
        }
        // There are few syncs, and what they fail to do matters most.
        let rarity = if matches!(operation, Operation::Sync { .. }) { 5 } else { trouble.faults };
        if trouble.faults == 0 || !random.one_in(rarity) {
            return Fate::Done;
        }
        match operation {
            Operation::Write { .. } if random.one_in(2) => Fate::Half(io::ErrorKind::StorageFull),
            Operation::Write { .. } | Operation::Create { .. } => Fate::Fails(io::ErrorKind::StorageFull),
            _ => Fate::Fails(io::ErrorKind::Other),
        }
    }
}

/// How a sync ended, when it has.
type Synced = Option<io::Result<()>>;

/// The backup thread, one action at a time.
struct Server<'s> {
    disk: &'s SimulatedDisk,
    writer: Writer<'s>,
    segment: &'s Segment,
    workers: u64,
    ticket: Option<(SyncTicket, Synced)>,
    next: Option<(Arc<dyn DiskFile>, Synced)>,
    failures: u64,
}

impl<'s> Server<'s> {
    fn start(disk: &'s SimulatedDisk, table: &'s Table, workers: u64) -> Option<Self> {
        let path = Path::new(PATH);
        let segment = table.segment();
        let failures = disk.failures();
        let found = log::open(disk, path).expect("a sound file");
        let writer = Writer::open(disk, path, found, table, slot(segment, workers));
        let writer = match writer {
            Err(_) if disk.failures() > failures => return None,
            other => other.expect("a fitting file"),
        };
        Some(Self { disk, writer, segment, workers, ticket: None, next: None, failures })
    }

    fn tails(&self) -> Vec<u64> {
        (0..self.workers).map(|index| slot(self.segment, index).ring_tail.load()).collect()
    }

    /// The result, if no fault of the disk is the reason that there is none.
    fn expect<T>(&mut self, result: Result<T, BackupError>) -> Option<T> {
        let failures = self.disk.failures();
        let news = std::mem::replace(&mut self.failures, failures) < failures;
        self.expect_unless(news, result)
    }

    fn expect_unless<T>(&mut self, failed: bool, result: Result<T, BackupError>) -> Option<T> {
        match result {
            Err(_) if failed => None,
            other => Some(other.expect("the disk is well")),
        }
    }

    fn drain(&mut self) {
        let drained = self.writer.drain();
        self.expect(drained);
    }

    fn act(&mut self, random: &mut Random, ledger: &mut Ledger) {
        match random.below(16) {
            0..6 => self.drain(),
            6..8 if self.ticket.is_none() => {
                self.ticket = self.writer.sync_ticket().expect("sound").map(|ticket| (ticket, None));
            }
            8 => {
                let ticket = self.ticket.iter_mut().find(|(_, result)| result.is_none());
                ticket.into_iter().for_each(|(ticket, result)| *result = Some(ticket.sync()));
            }
            9..11 => self.note_synced(ledger),
            11 if !self.writer.is_rewriting() && (!self.writer.has_file() || random.one_in(3)) => {
                let begun = self.writer.begin_rewrite();
                self.expect(begun);
            }
            12..15 if self.writer.is_rewriting() => self.rewrite_some(ledger),
            15 => drop(self.writer.is_in_place().expect("nobody else is there")),
            _ => {}
        }
    }

    fn note_synced(&mut self, ledger: &mut Ledger) {
        let Some((ticket, result)) = self.ticket.take() else { return };
        match result {
            None => self.ticket = Some((ticket, None)),
            Some(result) => {
                let failed = result.is_err();
                let synced = self.writer.synced(&ticket, result);
                if self.expect_unless(failed, synced) == Some(true) {
                    ledger.acknowledge(&ticket.tails, self.disk.operations());
                }
            }
        }
    }

    fn rewrite_some(&mut self, ledger: &mut Ledger) {
        match self.next.take() {
            Some((file, None)) => {
                let result = file.sync();
                self.next = Some((file, Some(result)));
            }
            Some((_, Some(result))) => {
                let failed = result.is_err();
                let synced = self.writer.next_synced(result);
                self.expect_unless(failed, synced);
            }
            None if self.writer.is_next_ready() => {
                let installed = self.writer.install_next();
                if self.expect(installed).is_some() {
                    ledger.acknowledge(&self.tails(), self.disk.operations());
                }
            }
            None => match self.writer.next_file() {
                Some(file) => self.next = Some((file, None)),
                None => {
                    let copied = self.writer.copy_some();
                    self.expect(copied);
                }
            },
        }
    }
}

fn some_key(random: &mut Random) -> Vec<u8> {
    if random.one_in(6) {
        return format!("counter {}", random.below(3)).into_bytes();
    }
    let number = random.below(30);
    let mut key = format!("key {number}").into_bytes();
    if number.is_multiple_of(10) {
        key.resize(600, b'x');
    }
    key
}

/// What was done to each key, and since when it is acknowledged.
#[derive(Default)]
pub(super) struct Ledger {
    keys: BTreeMap<Vec<u8>, Vec<Change>>,
    /// What is not acknowledged yet: worker, position in its ring, key, and which change of it.
    waiting: Vec<((u64, u64), Vec<u8>, usize)>,
    values: u64,
}

struct Change {
    value: Option<Arc<[u8]>>,
    /// How many operations on the disk had been done when it was made, and when it was acknowledged.
    made: usize,
    acknowledged: Option<usize>,
}

impl Ledger {
    /// Of a store that was loaded, and holds `contents`.
    pub(super) fn after(&self, contents: &BTreeMap<Vec<u8>, Vec<u8>>) -> Self {
        let change =
            |value: &Vec<u8>| Change { value: Some(value[..].into()), made: 0, acknowledged: Some(0) };
        let keys = contents.iter().map(|(key, value)| (key.clone(), vec![change(value)])).collect();
        Self { keys, waiting: Vec::new(), values: self.values }
    }

    fn note(&mut self, key: &[u8], value: Option<Arc<[u8]>>, place: (u64, u64), made: usize) {
        let changes = self.keys.entry(key.to_vec()).or_default();
        changes.push(Change { value, made, acknowledged: None });
        self.waiting.push((place, key.to_vec(), changes.len() - 1));
    }

    /// What is below the tails was acknowledged when so many operations on the disk had been done.
    fn acknowledge(&mut self, tails: &[u64], operations: usize) {
        let keys = &mut self.keys;
        self.waiting.retain(|((worker, head), key, index)| {
            let safe = *head <= tails[*worker as usize];
            if safe {
                keys.get_mut(key).expect("noted")[*index].acknowledged = Some(operations);
            }
            !safe
        });
    }

    /// Holds what was loaded after a power cut, after so many operations, against what may be there.
    pub(super) fn verify(
        &self,
        contents: &BTreeMap<Vec<u8>, Vec<u8>>,
        operations: usize,
    ) -> Result<(), String> {
        if let Some(key) = contents.keys().find(|key| !self.keys.contains_key(*key)) {
            return Err(format!("{} was never there", key.escape_ascii()));
        }
        self.keys.iter().try_for_each(|(key, changes)| {
            let found = contents.get(key).map(|value| &value[..]);
            let made = changes.iter().take_while(|change| change.made <= operations).count();
            let acknowledged = |change: &Change| change.acknowledged.is_some_and(|at| at <= operations);
            let safe = changes[..made].iter().rposition(acknowledged);
            // Before its first change, a key is not there.
            let possible = safe.is_none() && found.is_none()
                || changes[safe.unwrap_or(0)..made].iter().any(|change| change.value.as_deref() == found);
            if possible {
                return Ok(());
            }
            let which = changes.iter().position(|change| change.value.as_deref() == found);
            Err(format!(
                "{}: change {which:?} of {made} is there, {safe:?} was acknowledged; found {} bytes",
                key.escape_ascii(),
                found.map_or(-1, |value| value.len() as i64)
            ))
        })
    }

    /// A value that no other change has.
    fn some_value(&mut self, random: &mut Random) -> Vec<u8> {
        self.values += 1;
        let mut value = format!("value {} ", self.values).into_bytes();
        let length = match random.below(24) {
            0 => random.below(30_000),
            1..4 => random.below(3_000),
            4 => return made_up(value, random),
            _ => random.below(100),
        };
        let filling = random.number().to_le_bytes();
        value.extend(filling.iter().cycle().take(length as usize));
        value
    }
}

/// A value of a client that knows the format, and guesses what it can't know.
fn made_up(mut value: Vec<u8>, random: &mut Random) -> Vec<u8> {
    value.resize(value.len() + random.below(8) as usize, 0);
    let header = FileHeader { id: [0, 0], generation: 1 + random.below(3), created_ns: 0 };
    for _ in 0..1 + random.below(20) {
        let (start, sequence) = (value.len(), random.below(1_000));
        let (kind, key) =
            if random.one_in(2) { (Kind::Set, &b"invented"[..]) } else { (Kind::Synced, &b""[..]) };
        record::begin(&mut value, (sequence, 0), kind, 1 << 40, (key.len(), 0));
        value.extend_from_slice(key);
        record::finish(&mut value, start, header.checksum_seed());
    }
    value
}
