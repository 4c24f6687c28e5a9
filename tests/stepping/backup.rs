//! The backup thread's part: draining the rings into the file, and a new file taking the place of the old one.
//!
//! The file is no part of the segment, but of what a killed process leaves. So it is looked at with each image: taken up and
//! drained into as the next data server would, it must hold exactly what the table holds.

use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use kvs_core::backup::disk::SystemDisk;
use kvs_core::backup::load::{Loaded, load_alone};
use kvs_core::backup::writer::Writer;
use kvs_core::backup::{BackupError, log, next_path, ring};
use kvs_core::check;
use kvs_core::segment::layout::WorkerSlot;
use kvs_core::segment::{Segment, SegmentView};
use kvs_core::table::Table;
use tempfile::TempDir;

use crate::store::{Model, look_up};
use crate::violation::{demand, must};

/// Slot of the backup thread; the worker has the first.
const BACKUP_SLOT: u64 = 1;
const NAME: &str = "backup";

/// What the backup thread does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backup {
    /// Takes what is in the rings into the file.
    Drain,
    /// Writes a new file and puts it into the place of the file; then drains.
    HandOver,
}

impl Backup {
    /// Does it.
    ///
    /// # Errors
    /// What the disk says.
    pub fn perform(self, writer: &mut Writer<'_>) -> Result<(), BackupError> {
        if self == Self::HandOver {
            writer.rewrite_now()?;
        }
        while writer.drain()? > 0 {}
        Ok(())
    }
}

fn slot(segment: &Segment, index: u64) -> anyhow::Result<&WorkerSlot> {
    Ok(segment.memory().object(segment.regions().worker(index))?)
}

/// Takes up the file in `directory`, or makes one.
///
/// # Errors
/// Why it can't be this segment's.
pub fn open<'s>(table: &'s Table, directory: &Path) -> anyhow::Result<Writer<'s>> {
    let path = directory.join(NAME);
    let found = log::open(&SystemDisk, &path)?;
    let mut writer = Writer::open(&SystemDisk, &path, found, table, slot(table.segment(), BACKUP_SLOT)?)?;
    if !writer.has_file() {
        writer.rewrite_now()?;
    }
    Ok(writer)
}

/// As [`open`], in a process of its own, which pins what waits in the ring.
///
/// # Errors
/// As [`open`].
pub fn take_up<'s>(table: &'s Table, directory: &Path) -> anyhow::Result<Writer<'s>> {
    ring::pin_all(table, slot(table.segment(), 0)?)?;
    open(table, directory)
}

/// Inode, length and time of change of the backup file and of the next one.
pub type State = [Option<(u64, u64, i64, i64)>; 2];

/// A directory with a backup file, brought back to what it was before each run.
pub struct Files {
    directory: TempDir,
    saved: Vec<(PathBuf, Vec<u8>)>,
    /// Where a copy is judged.
    judged: TempDir,
}

impl Files {
    /// A file of all that is in `table`; what is changed later waits in the rings.
    ///
    /// # Errors
    /// What the disk says.
    pub fn make(table: &Table) -> anyhow::Result<Self> {
        let directory = || tempfile::Builder::new().prefix("kvs-stepping-").tempdir();
        let (directory, judged) = (directory()?, directory()?);
        open(table, directory.path())?;
        let saved = read(directory.path())?;
        Ok(Self { directory, saved, judged })
    }

    /// Where the file is.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// What tells the files as they are now from any others.
    ///
    /// # Errors
    /// What the disk says.
    pub fn state(&self) -> anyhow::Result<State> {
        let path = self.directory.path().join(NAME);
        let mut state = [None; 2];
        for (state, path) in state.iter_mut().zip([&path, &next_path(&path)]) {
            *state = match std::fs::metadata(path) {
                Ok(file) => Some((file.ino(), file.len(), file.mtime(), file.mtime_nsec())),
                Err(error) if error.kind() == ErrorKind::NotFound => None,
                Err(error) => return Err(error.into()),
            };
        }
        Ok(state)
    }

    /// Everything as it was.
    ///
    /// # Errors
    /// What the disk says.
    pub fn restore(&self) -> anyhow::Result<()> {
        write(self.directory.path(), &self.saved)
    }

    /// Demands that the files, as they are now, and the recovered segment of `table` make a file of `model`.
    ///
    /// # Errors
    /// A violation.
    pub fn judge(&self, table: &Table, model: &Model) -> anyhow::Result<()> {
        let judged = self.judged.path();
        write(judged, &read(self.directory.path())?)?;
        let mut writer = must("taking up the backup file", open(table, judged))?;
        while must("draining after recovery", writer.drain())? > 0 {}
        drop(writer);
        let worker = slot(table.segment(), 0)?;
        demand!(ring::used(worker) == 0, "something stays in the backup ring");
        let loaded = load(judged, table.segment().regions().capacity_bytes)?;
        for (key, value) in model {
            let found = must("what was loaded", look_up(&loaded, key))?;
            let key = String::from_utf8_lossy(key);
            demand!(found.as_ref() == Some(value), "{key:?} is not in the backup file as it is in the table");
        }
        let (found, wanted) = (loaded.totals().entries, model.len() as u64);
        demand!(found == wanted, "the backup file makes {found} entries instead of {wanted}");
        Ok(())
    }
}

/// The table that the file in `directory` makes.
fn load(directory: &Path, capacity_bytes: u64) -> anyhow::Result<Table> {
    let path = directory.join(NAME);
    let segment = Segment::on_heap(capacity_bytes)?;
    segment.claim_worker(1)?;
    let table = Table::new(&segment)?;
    let found = must("the backup file", log::open(&SystemDisk, &path))?.context("there is no backup file")?;
    let end = found.length;
    let loaded = must("loading", load_alone(&SystemDisk, &path, &found, &table, slot(&segment, 0)?, end))?;
    demand!(matches!(loaded, Loaded::Whole { torn: None }), "the backup file is not whole: {loaded:?}");
    let report = check::check_view(&SegmentView::of(&segment))?;
    demand!(report.fault_count == 0, "what was loaded: {}", report.faults.join("; "));
    Ok(table)
}

fn read(directory: &Path) -> anyhow::Result<Vec<(PathBuf, Vec<u8>)>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        files.push((entry.file_name().into(), std::fs::read(entry.path())?));
    }
    Ok(files)
}

/// Makes `directory` hold these files, and no others.
fn write(directory: &Path, files: &[(PathBuf, Vec<u8>)]) -> anyhow::Result<()> {
    for (name, _) in read(directory)? {
        std::fs::remove_file(directory.join(name))?;
    }
    for (name, bytes) in files {
        std::fs::write(directory.join(name), bytes)?;
    }
    Ok(())
}
