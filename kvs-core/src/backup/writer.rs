//! Draining the rings into the file, syncing it, and writing a new one when it got too long: what the backup thread does, without
//! the thread.
//!
//! ```text
//! rings ─ drain ─┬─► file        position and tails move in one transaction, after the write
//!                └─► next file   while one is written: a copy of the table goes there too
//! ```
//!
//! Invariants
//! - The tails of the rings and the mark of the file move together, when the file has what was taken out.
//! - A file that a sync failed on is never written to again: its mark says position 0, and a new one is written from memory.
//! - The next file takes the place of the file when it has all that the file has, synced.
//!
//! Killed
//! 1. while it writes: the mark says how far the file is whole; the rest is cut off and comes out of the rings again.
//! 2. between write and transaction: the same.
//! 3. while a next file is written: it is thrown away; the file has everything.
//! 4. after `backup_next` is stored and before the rename: the file has the old generation; `backup_next` is forgotten.
//! 5. after the rename and before the mark follows: the file has the generation of `backup_next`, which becomes the mark.
//!    Nothing was drained in between. Whoever goes on with a file syncs its directory first: a power cut could undo the rename.
//! 6. after a failed sync: position 0 in the mark; the next data server writes a new file before it trusts any.
//!
//! Lock: none; one thread has the writer. Large values are pinned by their workers and let go here.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::disk::{Disk, DiskFile};
use super::log::{Found, Log, Mark};
use super::record::{FileHeader, Kind};
use super::ring::Ring;
use super::{BackupError, next_path};
use crate::segment::Segment;
use crate::segment::layout::{Header, WorkerSlot};
use crate::sys::memory::Damaged;
use crate::table::{HomeEntries, Table};
use crate::transaction::Transaction;

/// Bytes gathered before they are written; few in tests, so that batches end everywhere.
const BATCH_BYTES: usize = if cfg!(test) { 4 << 10 } else { 4 << 20 };
/// Bytes of a copy of the table that are written at once.
const COPY_BYTES: usize = if cfg!(test) { 2 << 10 } else { 1 << 20 };
/// A file this long, in bytes, is never too long.
const REWRITE_BYTES_MIN: u64 = 16 << 20;
/// Bytes of a record beyond key and value, filling up included, as a file is reckoned.
const RECORD_BYTES: u64 = 44;

/// A position in each ring, in the order of the workers.
pub type Tails = Vec<u64>;

/// What syncing the file at this moment makes safe.
pub struct SyncTicket {
    file: Arc<dyn DiskFile>,
    mark: Mark,
    /// How much of each ring.
    pub tails: Tails,
}

impl SyncTicket {
    /// Syncs it. Any thread may.
    ///
    /// # Errors
    /// What the system says.
    pub fn sync(&self) -> std::io::Result<()> {
        self.file.sync()
    }
}

/// What goes into the backup file, and how.
pub struct Writer<'s> {
    disk: &'s dyn Disk,
    path: PathBuf,
    table: &'s Table,
    slot: &'s WorkerSlot,
    log: Option<Log>,
    next: Option<Rewrite>,
    /// Highest generation seen.
    generation: u64,
    /// How far the file is known to be synced, and how far it says so itself.
    synced: u64,
    marked: u64,
    home: HomeEntries,
}

/// A next file being written.
struct Rewrite {
    log: Log,
    cursor: Option<u64>,
    synced: bool,
    /// Where the rings' heads were before the copy began. A value below is in the copy, unless the key was deleted or has a later
    /// one; it stays out of the file, because the delete may have been drained from another ring before this file was begun.
    heads: Tails,
}

/// What a file at the place of the backup file means for the segment.
enum Fitting {
    /// It goes on.
    Resume(Found, Mark),
    /// There is none to go on with.
    Rewrite,
}

impl<'s> Writer<'s> {
    /// Takes up the backup file at `path` for a segment that has been served before or was just loaded; without a file to go on
    /// with, one is to be [written](Writer::begin_rewrite).
    ///
    /// # Errors
    /// Why the file there can't be this segment's.
    pub fn open(
        disk: &'s dyn Disk,
        path: &Path,
        found: Option<Found>,
        table: &'s Table,
        slot: &'s WorkerSlot,
    ) -> Result<Self, BackupError> {
        let header = table.segment().header()?;
        let known = [Mark::load(&header.backup), Mark::load(&header.backup_next)];
        let generations = known
            .iter()
            .map(|mark| mark.generation)
            .chain(found.as_ref().map(|found| found.header.generation));
        let generation = generations.max().unwrap_or(0);
        let mut writer = Self {
            disk,
            path: path.to_path_buf(),
            table,
            slot,
            log: None,
            next: None,
            generation,
            synced: 0,
            marked: 0,
            home: HomeEntries::default(),
        };
        if let Fitting::Resume(found, mark) = fit(path, header, found)? {
            // The predecessor may have died between the rename and this.
            disk.sync_directory(path).map_err(|error| BackupError::io(path, "sync its directory", error))?;
            writer.log = Some(Log::resume(path, found, mark)?);
            writer.move_mark(header, mark)?;
        }
        // Whatever was being written beside the file is void.
        disk.remove(&next_path(path))
            .map_err(|error| BackupError::io(&next_path(path), "remove it", error))?;
        Ok(writer)
    }

    /// Whether there is a file that has everything that was drained.
    pub fn has_file(&self) -> bool {
        self.log.is_some()
    }

    /// Whether a next file is being written.
    pub fn is_rewriting(&self) -> bool {
        self.next.is_some()
    }

    /// How far the file is written.
    pub fn mark(&self) -> Mark {
        self.log.as_ref().map(Log::mark).unwrap_or_default()
    }

    fn header(&self) -> Result<&'s Header, Damaged> {
        self.table.segment().header()
    }

    fn move_mark(&self, header: &Header, mark: Mark) -> Result<(), BackupError> {
        let mut transaction = Transaction::begin(self.table.segment(), self.slot);
        mark.store(&mut transaction, &header.backup);
        Mark::default().store(&mut transaction, &header.backup_next);
        Ok(transaction.commit()?)
    }

    /// Takes what is in the rings, a batch at most, into the file, and into the next one. Returns how many bytes of rings that
    /// were; 0 when there was nothing, or nowhere to write it.
    ///
    /// # Errors
    /// What the disk says; nothing was taken out then.
    pub fn drain(&mut self) -> Result<u64, BackupError> {
        if self.log.is_none() && self.next.is_none() {
            return Ok(0);
        }
        let gathered = self.gather();
        if gathered.is_err() {
            self.discard();
        }
        let (tails, pinned) = gathered?;
        let taken = tails.iter().map(|(slot, tail)| tail - slot.ring_tail.load()).sum();
        if taken == 0 {
            return Ok(0);
        }
        self.flush()?;
        let mut transaction = Transaction::begin(self.table.segment(), self.slot);
        for (slot, tail) in tails {
            transaction.store(&slot.ring_tail, tail);
        }
        if let Some(log) = &self.log {
            log.mark().store(&mut transaction, &self.header()?.backup);
        }
        transaction.commit()?;
        pinned.into_iter().try_for_each(|entry| self.table.unpin_entry(entry))?;
        Ok(taken)
    }

    /// Gathers records from all rings; returns how far each was read, and the entries that are pinned for it.
    #[allow(clippy::type_complexity, reason = "two lists, named by their use")]
    fn gather(&mut self) -> Result<(Vec<(&'s WorkerSlot, u64)>, Vec<u64>), BackupError> {
        let synced = Some(self.synced).filter(|synced| *synced > self.marked);
        let (mut tails, mut pinned) = (Vec::new(), Vec::new());
        for (index, slot) in rings(self.table.segment())?.enumerate() {
            let slot = slot?;
            let ring = Ring::of(self.table.segment(), slot)?;
            let (mut at, head) = (slot.ring_tail.load(), slot.ring_head.load());
            while at < head && self.pending() < BATCH_BYTES {
                let record = ring.record(at, head)?;
                self.append(&ring, &record, (index, at))?;
                pinned.extend(Some(record.entry).filter(|entry| *entry != 0));
                at += record.bytes;
            }
            tails.push((slot, at));
        }
        // After the records: a file in which nothing changes gets no marks.
        if let (Some(log), Some(synced)) = (&mut self.log, synced)
            && log.pending() > 0
        {
            log.append_synced(synced, self.table.totals().entries);
            self.marked = synced;
        }
        Ok((tails, pinned))
    }

    /// Appends a record of ring `index`, at position `at` there.
    fn append(
        &mut self,
        ring: &Ring<'_>,
        record: &super::ring::Record,
        (index, at): (usize, u64),
    ) -> Result<(), BackupError> {
        let next = self.next.as_mut().filter(|next| {
            record.kind == Kind::Delete || next.heads.get(index).is_none_or(|head| at >= *head)
        });
        let logs = self.log.iter_mut().chain(next.map(|next| &mut next.log));
        for log in logs {
            if record.entry == 0 {
                let lengths = (record.key_length, record.value_length);
                log.append(record.kind, record.version, lengths, |target| ring.copy(record, target))?;
            } else {
                append_entry(log, self.table, record.entry, record.version)?;
            }
        }
        Ok(())
    }

    fn pending(&self) -> usize {
        let logs = self.log.iter().chain(self.next.as_ref().map(|next| &next.log));
        logs.map(Log::pending).max().unwrap_or(0)
    }

    fn discard(&mut self) {
        let logs = self.log.iter_mut().chain(self.next.as_mut().map(|next| &mut next.log));
        logs.for_each(Log::discard);
    }

    /// Writes what was gathered. A next file that can't be written is given up, unless it is the only one.
    fn flush(&mut self) -> Result<(), BackupError> {
        if let Some(log) = &mut self.log
            && let Err(error) = log.flush()
        {
            self.discard();
            return Err(error);
        }
        let Some(next) = &mut self.next else { return Ok(()) };
        match next.log.flush() {
            Err(error) if self.log.is_some() => {
                self.give_up_rewrite(&error);
                Ok(())
            }
            flushed => flushed,
        }
    }

    /// Whether the file has something that is not synced yet.
    pub fn has_unsynced(&self) -> bool {
        self.log.as_ref().is_some_and(|log| log.mark().position > self.synced)
    }

    /// What a sync at this moment makes safe; None when there is nothing new.
    pub fn sync_ticket(&self) -> Result<Option<SyncTicket>, BackupError> {
        let Some(log) = self.log.as_ref().filter(|_| self.has_unsynced()) else { return Ok(None) };
        let tails = self.rings_at(|slot| slot.ring_tail.load())?;
        Ok(Some(SyncTicket { file: Arc::clone(log.file()), mark: log.mark(), tails }))
    }

    fn rings_at(&self, position: impl Fn(&WorkerSlot) -> u64) -> Result<Tails, Damaged> {
        rings(self.table.segment())?.map(|slot| slot.map(&position)).collect()
    }

    /// The sync of `ticket` has ended so: whether what it has of the rings is safe now.
    ///
    /// # Errors
    /// When it failed: from now on there is no file, and a new one is to be written.
    pub fn synced(&mut self, ticket: &SyncTicket, result: std::io::Result<()>) -> Result<bool, BackupError> {
        let current = self.log.as_ref().is_some_and(|log| Arc::ptr_eq(log.file(), &ticket.file));
        match result {
            // The file has been replaced meanwhile by one that has all of it, synced; or it was removed, and nothing is safe
            // before there is a new one.
            _ if !current => Ok(self.log.is_some()),
            Ok(()) => {
                self.synced = self.synced.max(ticket.mark.position);
                Ok(true)
            }
            Err(error) => {
                self.distrust()?;
                Err(BackupError::io(
                    &self.path,
                    "sync it, so what was written may be lost; writing a new one",
                    error,
                ))
            }
        }
    }

    /// From now on there is no file to go on with.
    fn distrust(&mut self) -> Result<(), BackupError> {
        self.log = None;
        let mark = Mark { generation: self.generation, ..Mark::default() };
        self.move_mark(self.header()?, mark)
    }

    /// Whether the file at the backup file's place is still the one that is written: false when it was removed.
    ///
    /// # Errors
    /// [`BackupError::Replaced`] when another one is there, or what the system says.
    pub fn is_in_place(&mut self) -> Result<bool, BackupError> {
        let Some(log) = &self.log else { return Ok(true) };
        let error = |error| BackupError::io(&self.path, "look at it", error);
        let own = log.file().identity().map_err(error)?;
        match self.disk.identity(&self.path).map_err(error)? {
            Some(there) if there == own => Ok(true),
            Some(_) => Err(BackupError::Replaced { path: self.path.clone() }),
            None => {
                self.distrust()?;
                Ok(false)
            }
        }
    }

    /// Whether the file is so long that a new one is worth its while.
    pub fn is_too_long(&self) -> bool {
        let totals = self.table.totals();
        let live = totals.content_bytes + totals.entries * RECORD_BYTES;
        self.mark().position > REWRITE_BYTES_MIN.max(live / 8 * 13)
    }

    /// Begins a next file. What is drained from now on goes there, too.
    ///
    /// # Errors
    /// What the disk says.
    pub fn begin_rewrite(&mut self) -> Result<(), BackupError> {
        let header = self.header()?;
        let id = [header.backup_id[0].load(), header.backup_id[1].load()];
        let file_header = FileHeader {
            id,
            generation: self.generation + 1,
            created_ns: crate::segment::nanoseconds_since_epoch(),
        };
        let path = next_path(&self.path);
        let log = Log::create(self.disk, &path, &file_header).inspect_err(|_| {
            // What there is of it is removed with the next try at the latest.
            let _ = self.disk.remove(&path);
        })?;
        let heads = self.rings_at(|slot| slot.ring_head.load())?;
        self.next = Some(Rewrite { log, cursor: Some(0), synced: false, heads });
        Ok(())
    }

    /// Copies a little of the table into the next file; true when all of it is there.
    ///
    /// # Errors
    /// What the disk says; the next file is given up then.
    pub fn copy_some(&mut self) -> Result<bool, BackupError> {
        let copied = self.try_copy_some();
        if let Err(error) = &copied {
            self.table.release_home(&mut self.home);
            self.give_up_rewrite(error);
        }
        copied
    }

    fn try_copy_some(&mut self) -> Result<bool, BackupError> {
        let Some(next) = &mut self.next else { return Ok(true) };
        while let Some(cursor) = next.cursor {
            if next.log.pending() >= COPY_BYTES {
                break;
            }
            next.cursor = self.table.snapshot_home(cursor, &mut self.home)?;
            for entry in self.home.iter() {
                match entry.content {
                    Ok(content) => {
                        let lengths = (entry.key_length, entry.value_length);
                        next.log.append(Kind::Set, entry.version, lengths, |target| {
                            target.extend_from_slice(content);
                            Ok::<(), Damaged>(())
                        })?;
                    }
                    Err(pinned) => append_entry(&mut next.log, self.table, pinned, entry.version)?,
                }
            }
            self.table.release_home(&mut self.home);
        }
        next.log.flush()?;
        Ok(next.cursor.is_none())
    }

    /// What syncing the next file makes safe, so that little is left to sync when it takes its place.
    pub fn next_file(&self) -> Option<Arc<dyn DiskFile>> {
        self.next
            .as_ref()
            .filter(|next| next.cursor.is_none() && !next.synced)
            .map(|next| Arc::clone(next.log.file()))
    }

    /// The next file was synced, as it was then.
    ///
    /// # Errors
    /// When that failed; the next file is given up.
    pub fn next_synced(&mut self, result: std::io::Result<()>) -> Result<(), BackupError> {
        let Err(error) = result else {
            self.next.iter_mut().for_each(|next| next.synced = true);
            return Ok(());
        };
        let error = BackupError::io(&next_path(&self.path), "sync it", error);
        self.give_up_rewrite(&error);
        Err(error)
    }

    /// Whether the next file can take its place.
    pub fn is_next_ready(&self) -> bool {
        self.next.as_ref().is_some_and(|next| next.cursor.is_none() && next.synced)
    }

    /// Puts the next file into the place of the file; all that was drained is safe then. Returns the file it replaces, to be
    /// closed at leisure.
    ///
    /// # Errors
    /// What the disk says; the next file is given up, unless it is in place already: then it is not trusted.
    pub fn install_next(&mut self) -> Result<Option<Arc<dyn DiskFile>>, BackupError> {
        self.drain_to_copy()?;
        let Some(mut next) = self.next.take() else { return Ok(None) };
        let path = next_path(&self.path);
        let position = next.log.mark().position;
        next.log.append_synced(position, self.table.totals().entries);
        let ready = next
            .log
            .flush()
            .and_then(|()| next.log.file().sync().map_err(|error| BackupError::io(&path, "sync it", error)));
        let renamed = ready.and_then(|()| self.rename(&next.log));
        if let Err(error) = renamed {
            self.next = Some(next);
            self.give_up_rewrite(&error);
            return Err(error);
        }
        next.log.renamed(&self.path);
        self.generation = next.log.mark().generation;
        (self.synced, self.marked) = (next.log.mark().position, position);
        let mark = next.log.mark();
        let old = self.log.replace(next.log);
        self.move_mark(self.header()?, mark)?;
        if let Err(error) = self.disk.sync_directory(&self.path) {
            self.distrust()?;
            return Err(BackupError::io(&self.path, "sync its directory; writing a new file", error));
        }
        Ok(old.map(|old| Arc::clone(old.file())))
    }

    /// Takes out of the rings what was there before the copy began, so that nobody puts it into the next file later.
    fn drain_to_copy(&mut self) -> Result<(), BackupError> {
        while let Some(next) = &self.next {
            let tails = self.rings_at(|slot| slot.ring_tail.load())?;
            if tails.iter().zip(&next.heads).all(|(tail, head)| tail >= head) {
                break;
            }
            self.drain()?;
        }
        Ok(())
    }

    fn rename(&mut self, next: &Log) -> Result<(), BackupError> {
        // Whoever put another file there may have no second copy of it.
        self.is_in_place()?;
        let mut transaction = Transaction::begin(self.table.segment(), self.slot);
        next.mark().store(&mut transaction, &self.header()?.backup_next);
        transaction.commit()?;
        let renamed = self.disk.rename(&next_path(&self.path), &self.path);
        renamed.map_err(|error| BackupError::io(&self.path, "put the new one in its place", error))
    }

    /// Throws the next file away.
    fn give_up_rewrite(&mut self, why: &BackupError) {
        if self.next.take().is_some() {
            ::log::warn!("the new backup file is given up: {why}");
            // It is thrown away at the next start at the latest.
            let _ = self.disk.remove(&next_path(&self.path));
        }
    }

    /// Writes a new file without a pause, or the rest of the one that is begun, and puts it in place.
    ///
    /// # Errors
    /// What the disk says.
    pub fn rewrite_now(&mut self) -> Result<(), BackupError> {
        if self.next.is_none() {
            self.begin_rewrite()?;
        }
        while !self.copy_some()? {}
        self.install_next()?;
        Ok(())
    }

    /// Everything that was changed is on disk when this returns, and the file says so.
    ///
    /// # Errors
    /// What the disk says.
    pub fn end(&mut self) -> Result<(), BackupError> {
        if self.log.is_none() {
            self.rewrite_now()?;
        }
        while self.drain()? > 0 {}
        for _ in 0..2 {
            let Some(ticket) = self.sync_ticket()? else { break };
            let result = ticket.sync();
            self.synced(&ticket, result)?;
            if let Some(log) = &mut self.log
                && self.marked < self.synced
            {
                self.marked = self.synced;
                log.append_synced(self.synced, self.table.totals().entries);
                log.flush()?;
                let mark = log.mark();
                self.move_mark(self.header()?, mark)?;
            }
        }
        Ok(())
    }
}

/// The slots of all workers that have a ring.
fn rings(segment: &Segment) -> Result<impl Iterator<Item = Result<&WorkerSlot, Damaged>>, Damaged> {
    let count = segment.header()?.backup_rings_reserved.load();
    Ok((0..count).map(|index| segment.memory().object(segment.regions().worker(index))))
}

/// Appends the entry at `offset`, which is pinned.
fn append_entry(log: &mut Log, table: &Table, offset: u64, version: u64) -> Result<(), BackupError> {
    let entry = table.pinned_entry(offset)?;
    let lengths = (entry.key_length() as usize, entry.value_length() as usize);
    Ok(log.append(Kind::Set, version, lengths, |target| entry.append_content(target))?)
}

/// Holds the file that was found against what the segment knows.
fn fit(path: &Path, header: &Header, found: Option<Found>) -> Result<Fitting, BackupError> {
    let Some(found) = found else { return Ok(Fitting::Rewrite) };
    if found.header.id != [header.backup_id[0].load(), header.backup_id[1].load()] {
        return Err(BackupError::OtherInstance { path: path.to_path_buf() });
    }
    let older = |what: String| Err(BackupError::Older { path: path.to_path_buf(), what });
    let (mark, next) = (Mark::load(&header.backup), Mark::load(&header.backup_next));
    let generation = found.header.generation;
    let mark = if next.position != 0 && next.generation == generation { next } else { mark };
    if generation != mark.generation {
        return older(format!(
            "it is file {generation} of its line, the segment has written file {}",
            mark.generation
        ));
    }
    if mark.position == 0 {
        return Ok(Fitting::Rewrite);
    }
    if found.length < mark.position {
        return older(format!("it has {} bytes, the segment has written {}", found.length, mark.position));
    }
    Ok(Fitting::Resume(found, mark))
}
