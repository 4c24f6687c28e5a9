//! The backup thread: drains the workers' rings into the file, has it synced, and has a new one written when it is time.
//!
//! ```text
//! workers ── call ──► backup ── tickets ──► sync thread
//!    ▲                  │  ▲                    │
//!    └──── wake ────────┘  └────── results ─────┘
//! ```
//!
//! A worker calls only when the thread rests, when its ring is half full, or when answers wait for the disk; a request costs no
//! call else. The sync has a thread of its own, so that rings are drained while the disk works.
//!
//! Whatever the disk says: reading is served on, the gate says why nothing may be changed, and it is tried again until it works.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, select};
use kvs_core::backup::disk::{DiskFile, SystemDisk};
use kvs_core::backup::gate::Acknowledge;
use kvs_core::backup::log::{self as log_file, Found};
use kvs_core::backup::writer::{SyncTicket, Writer};
use kvs_core::backup::{BackupError, ring};
use kvs_core::instance::ByteSize;
use kvs_core::liveness::FIRST_HELPER_SLOT;
use kvs_core::segment::layout::{BACKUP_RING_BYTES, WorkerSlot};
use kvs_front::options::Durability;

use crate::shared::Shared;

/// Pause between two batches, so that a batch is worth its call.
const PAUSE: Duration = Duration::from_millis(2);
/// Batches in which nothing came before the thread rests.
const EMPTY_MAX: u32 = 16;
/// Pause before what the disk refused is tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(200);
/// Pause before a new file is begun after one had to be given up.
const REWRITE_PAUSE: Duration = Duration::from_secs(5);
/// Pause between two looks whether the file is still where it belongs.
const PLACE_PAUSE: Duration = Duration::from_secs(1);
/// With `--durability os` the file is synced so often, as the kernel would: what is synced can be told from a torn end.
const OS_SYNC_PAUSE: Duration = Duration::from_secs(30);
/// How long a process that is just ending may keep the file locked.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// The disk.
pub static DISK: SystemDisk = SystemDisk;

/// When changes may be acknowledged in this mode.
pub fn acknowledge(durability: Durability) -> Acknowledge {
    match durability {
        Durability::Always => Acknowledge::Synced,
        Durability::Interval(_) => Acknowledge::WhileWriting,
        Durability::Os => Acknowledge::Always,
    }
}

/// Opens the backup file; waits a while for a process that is just ending to let it go.
///
/// # Errors
/// Why it can't be used.
pub fn open_file(path: &std::path::Path) -> Result<Option<Found>, BackupError> {
    let until = Instant::now() + LOCK_PATIENCE;
    loop {
        match log_file::open(&DISK, path) {
            Err(BackupError::Locked { .. }) if Instant::now() < until => std::thread::sleep(LOCK_PAUSE),
            found => return found,
        }
    }
}

/// The thread, from outside.
pub struct Backup {
    stop: Sender<()>,
    thread: JoinHandle<()>,
}

/// What the thread begins with.
pub enum Begin {
    /// The file as it was found, if there was one. Starting fails when it doesn't fit.
    With(Option<Found>),
    /// The segment has been served a moment ago: the file is looked for while it is served again.
    Later,
}

impl Backup {
    /// Starts it. With [`Begin::With`] the file is in its place, whole, when this returns.
    ///
    /// # Errors
    /// Why the file can't be used, or that no thread or memory is to be had.
    pub fn start(
        shared: &Arc<Shared>,
        path: PathBuf,
        durability: Durability,
        begin: Begin,
        calls: Receiver<()>,
    ) -> anyhow::Result<Self> {
        let (stop, stopped) = crossbeam_channel::bounded::<()>(0);
        let (opened, ready) = crossbeam_channel::bounded(1);
        let offset = shared.segment.claim_worker(shared.workers as u64 + 1)?;
        let synchronizer = Synchronizer::start(shared)?;
        let shared = Arc::clone(shared);
        let thread = std::thread::Builder::new().name("backup".into()).spawn(move || {
            let _alive = shared.enter(FIRST_HELPER_SLOT + 1);
            let Ok(slot) = shared.segment.memory().object(offset) else { std::process::abort() };
            let thread = BackupThread::new(&shared, slot, path, durability, synchronizer);
            if let Err(error) = thread.run(begin, &opened, &calls, &stopped) {
                log::error!("backup: {error}; ending, the next data server recovers");
                std::process::abort();
            }
        });
        let thread = thread.context("can't start the backup thread")?;
        // The thread says so in any case, or is gone with the process.
        ready.recv().context("the backup thread ended")??;
        Ok(Self { stop, thread })
    }

    /// Ends it, with everything on disk.
    pub fn stop(self) {
        drop(self.stop);
        // A panic in it has aborted the process.
        let _ = self.thread.join();
    }
}

/// What the sync thread is asked to do.
enum Job {
    Sync(SyncTicket),
    SyncNext(Arc<dyn DiskFile>),
    /// The last holder of a file closes it, which takes time for one that has no name any more.
    Close(Arc<dyn DiskFile>),
}

/// What came of it.
enum Done {
    Sync(SyncTicket, std::io::Result<()>),
    SyncNext(std::io::Result<()>),
}

/// The sync thread, from outside. It ends with this.
struct Synchronizer {
    jobs: Sender<Job>,
    results: Receiver<Done>,
}

impl Synchronizer {
    fn start(shared: &Arc<Shared>) -> anyhow::Result<Self> {
        let (jobs, inbox) = crossbeam_channel::unbounded::<Job>();
        let (outbox, results) = crossbeam_channel::unbounded();
        let shared = Arc::clone(shared);
        let thread = std::thread::Builder::new().name("backup-sync".into()).spawn(move || {
            shared.come_forward();
            for job in inbox {
                let done = match job {
                    Job::Sync(ticket) => {
                        let result = ticket.sync();
                        Done::Sync(ticket, result)
                    }
                    Job::SyncNext(file) => Done::SyncNext(file.sync()),
                    Job::Close(file) => {
                        drop(file);
                        continue;
                    }
                };
                if outbox.send(done).is_err() {
                    return;
                }
            }
        });
        thread.context("can't start the sync thread")?;
        Ok(Self { jobs, results })
    }

    fn ask(&self, job: Job) {
        // It runs for as long as this is there.
        let _ = self.jobs.send(job);
    }
}

struct BackupThread<'s> {
    shared: &'s Shared,
    slot: &'s WorkerSlot,
    path: PathBuf,
    durability: Durability,
    synchronizer: Synchronizer,
    writer: Option<Writer<'s>>,
    sync_asked: bool,
    next_sync_asked: bool,
    last_sync: Instant,
    next_place_look: Instant,
    next_rewrite: Instant,
    /// So long the predecessor may keep the file locked.
    locked_until: Instant,
    /// The disk refused something; when it is tried again.
    retry_at: Option<Instant>,
    empty: u32,
}

impl<'s> BackupThread<'s> {
    fn new(
        shared: &'s Shared,
        slot: &'s WorkerSlot,
        path: PathBuf,
        durability: Durability,
        synchronizer: Synchronizer,
    ) -> Self {
        let now = Instant::now();
        Self {
            shared,
            slot,
            path,
            durability,
            synchronizer,
            writer: None,
            sync_asked: false,
            next_sync_asked: false,
            last_sync: now,
            next_place_look: now + PLACE_PAUSE,
            next_rewrite: now,
            locked_until: now + LOCK_PATIENCE,
            retry_at: None,
            empty: 0,
        }
    }

    /// Runs until told to stop.
    ///
    /// # Errors
    /// Only what the segment makes impossible.
    fn run(
        mut self,
        begin: Begin,
        opened: &Sender<Result<(), BackupError>>,
        calls: &Receiver<()>,
        stopped: &Receiver<()>,
    ) -> Result<(), BackupError> {
        let begun = match begin {
            Begin::With(found) => self.open(found).and_then(|()| self.write_first()),
            Begin::Later => Ok(()),
        };
        let failed = begun.is_err();
        // Whoever started this thread waits for it.
        let _ = opened.send(begun);
        if failed {
            return Ok(());
        }
        loop {
            let tried = self.step();
            self.settle(tried)?;
            if self.is_told_to_stop(calls, stopped) {
                return self.end();
            }
        }
    }

    /// Waits for what comes next; true when it is the end.
    fn is_told_to_stop(&mut self, calls: &Receiver<()>, stopped: &Receiver<()>) -> bool {
        let pause = self.pause();
        if pause.is_zero() {
            return stopped.recv_timeout(Duration::ZERO) == Err(RecvTimeoutError::Disconnected);
        }
        let results = self.synchronizer.results.clone();
        let mut done = None;
        select! {
            recv(calls) -> _ => {}
            recv(results) -> result => done = result.ok(),
            recv(stopped) -> _ => return true,
            default(pause) => {}
        }
        self.shared.gate.wake();
        if let Some(done) = done {
            let result = self.take_result(done);
            // What the segment makes impossible comes again with the next step.
            if let Err(error) = result {
                self.trouble(&error);
            }
        }
        false
    }

    /// How long there is nothing to do unless something comes.
    fn pause(&mut self) -> Duration {
        let now = Instant::now();
        if let Some(at) = self.retry_at {
            return at.saturating_duration_since(now).max(Duration::from_millis(1));
        }
        let copying =
            self.writer.as_ref().is_some_and(|writer| writer.is_rewriting()) && !self.next_sync_asked;
        if copying {
            return Duration::ZERO;
        }
        if self.empty < EMPTY_MAX || self.writer.is_none() {
            return PAUSE;
        }
        self.shared.gate.rest();
        if self.shared.worker_slots().any(|slot| ring::used(slot) > 0) {
            self.shared.gate.wake();
            return PAUSE;
        }
        let sync = self.sync_due().map_or(PLACE_PAUSE, |due| due.saturating_duration_since(now));
        sync.min(PLACE_PAUSE).max(Duration::from_millis(1))
    }

    /// Takes up the file, or finds that there is none to go on with.
    fn open(&mut self, found: Option<Found>) -> Result<(), BackupError> {
        self.writer = Some(Writer::open(&DISK, &self.path, found, &self.shared.table, self.slot)?);
        Ok(())
    }

    /// Makes sure that there is a file with everything before anybody is served.
    fn write_first(&mut self) -> Result<(), BackupError> {
        let Some(writer) = &mut self.writer else { return Ok(()) };
        if writer.has_file() {
            return Ok(());
        }
        let entries = self.shared.table.totals().entries;
        if entries > 0 {
            log::warn!(
                "there is no backup file {} to go on with; writing one from memory",
                self.path.display()
            );
        }
        writer.rewrite_now()
    }

    /// One round: batches, syncs, a little of a new file. False while it is too early to try again what was refused.
    fn step(&mut self) -> Result<bool, BackupError> {
        if self.retry_at.is_some_and(|at| at > Instant::now()) {
            return Ok(false);
        }
        if self.writer.is_none() {
            match log_file::open(&DISK, &self.path) {
                // The predecessor's memory is still being taken apart, and its files are closed after that.
                Err(BackupError::Locked { .. }) if Instant::now() < self.locked_until => return Ok(false),
                found => self.open(found?)?,
            }
        }
        while let Ok(done) = self.synchronizer.results.try_recv() {
            self.take_result(done)?;
        }
        self.drain()?;
        self.look_for_file()?;
        self.ask_for_sync()?;
        match self.rewrite() {
            // The file that there is has everything: it only stays longer than it should.
            Err(error) if !error.is_fatal() && self.writer()?.has_file() => {
                log::warn!("no new backup file could be written, the old one goes on: {error}");
                self.next_rewrite = Instant::now() + REWRITE_PAUSE;
            }
            written => written?,
        }
        Ok(true)
    }

    fn writer(&mut self) -> Result<&mut Writer<'s>, BackupError> {
        // `step` opened it.
        self.writer.as_mut().ok_or_else(|| kvs_core::sys::memory::Damaged { offset: 0 }.into())
    }

    fn drain(&mut self) -> Result<(), BackupError> {
        let taken = self.writer()?.drain()?;
        self.empty = if taken == 0 { self.empty.saturating_add(1) } else { 0 };
        if taken > 0 {
            self.shared.call_waiting();
        }
        Ok(())
    }

    /// When the file is to be synced next; None while there is nothing to sync or a sync is under way.
    fn sync_due(&self) -> Option<Instant> {
        let writer = self.writer.as_ref()?;
        if self.sync_asked || !writer.has_unsynced() {
            return None;
        }
        Some(match self.durability {
            Durability::Always => self.last_sync,
            // Begun after half of it, a sync has the other half to end in.
            Durability::Interval(interval) => self.last_sync + interval / 2,
            Durability::Os => self.last_sync + OS_SYNC_PAUSE,
        })
    }

    fn ask_for_sync(&mut self) -> Result<(), BackupError> {
        let now = Instant::now();
        if self.sync_due().is_some_and(|due| due <= now)
            && let Some(ticket) = self.writer()?.sync_ticket()?
        {
            self.sync_asked = true;
            self.last_sync = now;
            self.synchronizer.ask(Job::Sync(ticket));
        }
        Ok(())
    }

    fn take_result(&mut self, done: Done) -> Result<(), BackupError> {
        match done {
            Done::Sync(ticket, result) => {
                self.sync_asked = false;
                if self.writer()?.synced(&ticket, result)? {
                    self.shared.set_synced(&ticket.tails);
                }
                Ok(())
            }
            Done::SyncNext(result) => {
                self.next_sync_asked = false;
                self.writer()?.next_synced(result)
            }
        }
    }

    /// The file may have been removed, or another put in its place.
    fn look_for_file(&mut self) -> Result<(), BackupError> {
        if self.next_place_look > Instant::now() {
            return Ok(());
        }
        self.next_place_look = Instant::now() + PLACE_PAUSE;
        if !self.writer()?.is_in_place()? {
            log::error!("backup file {} was removed; writing a new one from memory", self.path.display());
            self.next_rewrite = Instant::now();
        }
        Ok(())
    }

    fn rewrite(&mut self) -> Result<(), BackupError> {
        let now = Instant::now();
        let due = self.next_rewrite <= now;
        let writer = self.writer()?;
        if !writer.is_rewriting() {
            if due && (!writer.has_file() || writer.is_too_long()) {
                writer.begin_rewrite()?;
                self.next_rewrite = now + REWRITE_PAUSE;
            }
            return Ok(());
        }
        if writer.is_next_ready() {
            return self.install();
        }
        if !self.next_sync_asked
            && self.writer()?.copy_some()?
            && let Some(file) = self.writer()?.next_file()
        {
            self.next_sync_asked = true;
            self.synchronizer.ask(Job::SyncNext(file));
        }
        Ok(())
    }

    fn install(&mut self) -> Result<(), BackupError> {
        let before = self.writer()?.mark().position;
        let old = self.writer()?.install_next()?;
        let mark = self.writer()?.mark();
        let (from, to) = (ByteSize(before).rounded(), ByteSize(mark.position).rounded());
        log::info!("wrote backup file {} of its line: {from} became {to}", mark.generation);
        old.into_iter().for_each(|file| self.synchronizer.ask(Job::Close(file)));
        let tails = self.shared.worker_slots().map(|slot| slot.ring_tail.load()).collect();
        self.shared.set_synced(&tails);
        self.next_rewrite = Instant::now();
        Ok(())
    }

    /// Tells what went wrong, or that all is well again.
    fn settle(&mut self, tried: Result<bool, BackupError>) -> Result<(), BackupError> {
        match tried {
            Err(error) if error.is_fatal() => return Err(error),
            Err(error) => self.trouble(&error),
            Ok(true) if self.retry_at.is_some() && self.has_somewhere_to_write() => {
                self.retry_at = None;
                if self.shared.gate.recover() {
                    log::info!("the backup file {} can be written again", self.path.display());
                }
                self.shared.call_waiting();
            }
            Ok(_) => {}
        }
        Ok(())
    }

    fn has_somewhere_to_write(&self) -> bool {
        self.writer.as_ref().is_some_and(|writer| writer.has_file() || writer.is_rewriting())
    }

    fn trouble(&mut self, error: &BackupError) {
        if self.shared.gate.fail(&error.to_string()) {
            log::error!("{error}");
        }
        self.retry_at = Some(Instant::now() + RETRY_PAUSE);
        // Trying again begins with what may be the reason.
        self.next_place_look = Instant::now();
        // Who waits for room gets to know.
        self.shared.call_waiting();
    }

    fn end(mut self) -> Result<(), BackupError> {
        let ended = match &mut self.writer {
            Some(writer) => writer.end(),
            None => Ok(()),
        };
        match ended {
            Err(error) if error.is_fatal() => Err(error),
            Err(error) => {
                log::error!("{error}; the segment has everything, and the next start goes on with it");
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }
}

/// Whether a ring is so full that the backup thread should not wait any longer.
pub fn is_half_full(slot: &WorkerSlot) -> bool {
    ring::used(slot) > BACKUP_RING_BYTES / 2
}
