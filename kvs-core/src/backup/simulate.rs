//! A disk in memory that remembers everything that was done to it, fails or kills on demand, and can lose power at any moment of
//! its history.
//!
//! What a power cut leaves, of a file: each sector of 512 bytes as it was at some moment since the last sync that succeeded, its
//! length likewise; a sector that never reached the disk within the length is zeros, or what another file left there. Of a
//! directory: some of the changes since it was synced, the earlier ones first. After a sync that failed nothing more of the file is
//! ever sure: a later sync may succeed without having written what the first one dropped.
//!
//! Lock: one for everything, never held while a kill unwinds.

use std::any::Any;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use super::disk::{Disk, DiskFile, FileIdentity, directory_of};

/// What a disk writes whole or not at all, in bytes.
pub(super) const SECTOR_BYTES: usize = 512;

/// Something that was done to the disk. Files go by number.
#[derive(Debug, Clone)]
pub(super) enum Operation {
    Create { path: PathBuf, file: usize },
    Write { file: usize, position: u64, bytes: Arc<[u8]> },
    SetLength { file: usize, length: u64 },
    Sync { file: usize },
    SyncFailed { file: usize },
    Rename { from: PathBuf, to: PathBuf },
    Remove { path: PathBuf },
    SyncDirectory { directory: PathBuf },
}

/// What happens to an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// It is done.
    Done,
    /// It fails, and nothing is done.
    Fails(io::ErrorKind),
    /// A write fails half-way.
    Half(io::ErrorKind),
    /// The process dies before it.
    DiesBefore,
    /// The process dies when it is done.
    DiesAfter,
}

/// What a killed process unwinds with.
struct Killed;

/// Runs `process` until it ends or is killed; None then.
///
/// # Panics
/// As `process` does.
pub(super) fn until_killed<R>(process: impl FnOnce() -> R) -> Option<R> {
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(process)) {
        Ok(result) => Some(result),
        Err(payload) if payload.is::<Killed>() => None,
        Err(payload) => std::panic::resume_unwind(payload),
    }
}

type Plan = Box<dyn FnMut(&Operation) -> Fate + Send>;

#[derive(Default)]
struct State {
    files: Vec<Vec<u8>>,
    names: BTreeMap<PathBuf, usize>,
    /// What was there, safe, before the history began.
    files_before: Vec<Vec<u8>>,
    names_before: BTreeMap<PathBuf, usize>,
    history: Vec<Operation>,
    /// Files that are locked, and by which opening of them.
    locks: BTreeMap<usize, u64>,
    openings: u64,
    plan: Option<Plan>,
    failures: u64,
}

/// A disk in memory.
#[derive(Default, Clone)]
pub(super) struct SimulatedDisk(Arc<Mutex<State>>);

impl SimulatedDisk {
    /// A disk on which these files are safe.
    pub(super) fn with(files: BTreeMap<PathBuf, Vec<u8>>) -> Self {
        let names: BTreeMap<PathBuf, usize> = files.keys().cloned().zip(0..).collect();
        let contents: Vec<Vec<u8>> = files.into_values().collect();
        let state = State {
            files: contents.clone(),
            names: names.clone(),
            files_before: contents,
            names_before: names,
            ..State::default()
        };
        Self(Arc::new(Mutex::new(state)))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("unpoisoned")
    }

    /// From now on `plan` says what becomes of each operation.
    pub(super) fn plan(&self, plan: impl FnMut(&Operation) -> Fate + Send + 'static) {
        self.state().plan = Some(Box::new(plan));
    }

    /// From now on all is well.
    pub(super) fn heal(&self) {
        self.state().plan = None;
    }

    /// How many operations have failed.
    pub(super) fn failures(&self) -> u64 {
        self.state().failures
    }

    /// How many operations were done.
    pub(super) fn operations(&self) -> usize {
        self.state().history.len()
    }

    /// A replay of all that was done.
    pub(super) fn replay(&self) -> Replay {
        let state = self.state();
        Replay {
            history: state.history.clone(),
            next: 0,
            files: state.files_before.iter().cloned().map(Platter::new).collect(),
            names: state.names_before.clone(),
            renaming: Vec::new(),
        }
    }

    /// The bytes of the file at `path`, as a process sees them.
    pub(super) fn content(&self, path: &Path) -> Option<Vec<u8>> {
        let state = self.state();
        state.names.get(path).map(|file| state.files[*file].clone())
    }

    fn perform(&self, operation: Operation) -> io::Result<()> {
        let mut state = self.state();
        let fate = state.plan.as_mut().map_or(Fate::Done, |plan| plan(&operation));
        match fate {
            Fate::DiesBefore => {}
            Fate::Done | Fate::DiesAfter => state.apply(operation)?,
            Fate::Fails(kind) | Fate::Half(kind) => {
                state.failures += 1;
                state.apply_some(operation, fate)?;
                return Err(kind.into());
            }
        }
        drop(state);
        if matches!(fate, Fate::DiesBefore | Fate::DiesAfter) {
            let payload: Box<dyn Any + Send> = Box::new(Killed);
            std::panic::resume_unwind(payload);
        }
        Ok(())
    }

    fn opened(&self, file: usize) -> Box<dyn DiskFile> {
        let mut state = self.state();
        state.openings += 1;
        Box::new(SimulatedFile { disk: self.clone(), file, opening: state.openings })
    }
}

impl State {
    fn apply(&mut self, operation: Operation) -> io::Result<()> {
        match &operation {
            Operation::Create { path, file } => {
                debug_assert_eq!(*file, self.files.len());
                self.files.push(Vec::new());
                self.names.insert(path.clone(), *file);
            }
            Operation::Write { file, position, bytes } => write(&mut self.files[*file], *position, bytes),
            Operation::SetLength { file, length } => self.files[*file].resize(*length as usize, 0),
            Operation::Rename { from, to } => {
                let file = self.names.remove(from).ok_or(io::ErrorKind::NotFound)?;
                self.names.insert(to.clone(), file);
            }
            Operation::Remove { path } => drop(self.names.remove(path)),
            Operation::Sync { .. } | Operation::SyncFailed { .. } | Operation::SyncDirectory { .. } => {}
        }
        self.history.push(operation);
        Ok(())
    }

    /// What is done of an operation that fails.
    fn apply_some(&mut self, operation: Operation, fate: Fate) -> io::Result<()> {
        match operation {
            Operation::Sync { file } => self.apply(Operation::SyncFailed { file }),
            Operation::Write { file, position, bytes } if matches!(fate, Fate::Half(_)) => {
                let bytes = bytes[..bytes.len() / 2].into();
                self.apply(Operation::Write { file, position, bytes })
            }
            _ => Ok(()),
        }
    }
}

fn write(content: &mut Vec<u8>, position: u64, bytes: &[u8]) {
    let (start, end) = (position as usize, position as usize + bytes.len());
    if content.len() < end {
        content.resize(end, 0);
    }
    content[start..end].copy_from_slice(bytes);
}

impl Disk for SimulatedDisk {
    fn open(&self, path: &Path) -> io::Result<Option<Box<dyn DiskFile>>> {
        let file = self.state().names.get(path).copied();
        Ok(file.map(|file| self.opened(file)))
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        self.remove(path)?;
        let file = self.state().files.len();
        self.perform(Operation::Create { path: path.to_path_buf(), file })?;
        Ok(self.opened(file))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.perform(Operation::Rename { from: from.to_path_buf(), to: to.to_path_buf() })
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        if !self.state().names.contains_key(path) {
            return Ok(());
        }
        self.perform(Operation::Remove { path: path.to_path_buf() })
    }

    fn sync_directory(&self, path: &Path) -> io::Result<()> {
        self.perform(Operation::SyncDirectory { directory: directory_of(path).to_path_buf() })
    }

    fn identity(&self, path: &Path) -> io::Result<Option<FileIdentity>> {
        Ok(self.state().names.get(path).map(|file| (0, *file as u64)))
    }
}

struct SimulatedFile {
    disk: SimulatedDisk,
    file: usize,
    opening: u64,
}

impl DiskFile for SimulatedFile {
    fn lock(&self) -> io::Result<bool> {
        Ok(*self.disk.state().locks.entry(self.file).or_insert(self.opening) == self.opening)
    }

    fn identity(&self) -> io::Result<FileIdentity> {
        Ok((0, self.file as u64))
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.disk.state().files[self.file].len() as u64)
    }

    fn read_at(&self, target: &mut [u8], position: u64) -> io::Result<usize> {
        let state = self.disk.state();
        let rest = state.files[self.file].get(position as usize..).unwrap_or(&[]);
        let count = rest.len().min(target.len());
        target[..count].copy_from_slice(&rest[..count]);
        Ok(count)
    }

    fn write_at(&self, source: &[u8], position: u64) -> io::Result<()> {
        self.disk.perform(Operation::Write { file: self.file, position, bytes: source.into() })
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.disk.perform(Operation::SetLength { file: self.file, length })
    }

    fn sync(&self) -> io::Result<()> {
        self.disk.perform(Operation::Sync { file: self.file })
    }
}

impl Drop for SimulatedFile {
    fn drop(&mut self) {
        let mut state = self.disk.state();
        if state.locks.get(&self.file) == Some(&self.opening) {
            state.locks.remove(&self.file);
        }
    }
}

/// A history, up to some moment.
pub(super) struct Replay {
    history: Vec<Operation>,
    next: usize,
    files: Vec<Platter>,
    /// Names as the disk has them for sure, and what was done to them since.
    names: BTreeMap<PathBuf, usize>,
    renaming: Vec<Operation>,
}

impl Replay {
    /// How many operations were done by now.
    pub(super) fn at(&self) -> usize {
        self.next
    }

    /// Does the next operation; false when there is none.
    pub(super) fn step(&mut self) -> bool {
        let Some(operation) = self.history.get(self.next).cloned() else { return false };
        self.next += 1;
        match operation {
            Operation::Write { file, position, bytes } => self.files[file].write(position, &bytes),
            Operation::SetLength { file, length } => self.files[file].set_length(length),
            Operation::Sync { file } => self.files[file].sync(),
            Operation::SyncFailed { file } => self.files[file].distrusted = true,
            Operation::Create { .. } => {
                self.files.push(Platter::default());
                self.renaming.push(operation);
            }
            Operation::Rename { .. } | Operation::Remove { .. } => self.renaming.push(operation),
            Operation::SyncDirectory { directory } => {
                let (done, left) =
                    self.renaming.drain(..).partition(|operation| directory_in(operation) == directory);
                self.renaming = left;
                for operation in &done {
                    rename(&mut self.names, operation);
                }
            }
        }
        true
    }

    /// The disk after a power cut at this moment.
    pub(super) fn cut(&self, random: &mut Random) -> SimulatedDisk {
        let luck = Luck::of(random);
        let mut names = self.names.clone();
        let done = match luck {
            Luck::Nothing => 0,
            Luck::Everything => self.renaming.len(),
            _ => random.below(self.renaming.len() as u64 + 1) as usize,
        };
        self.renaming[..done].iter().for_each(|operation| rename(&mut names, operation));
        let any = random.below(3 * self.files.len().max(1) as u64) as usize;
        let stale = self.files.get(any).map_or(&[][..], |file| &file.current);
        let left = |file: usize, random: &mut Random| self.files[file].after_cut(luck, stale, random);
        SimulatedDisk::with(names.into_iter().map(|(path, file)| (path, left(file, random))).collect())
    }
}

fn directory_in(operation: &Operation) -> &Path {
    match operation {
        Operation::Create { path, .. } | Operation::Remove { path } => directory_of(path),
        Operation::Rename { to, .. } => directory_of(to),
        _ => Path::new(""),
    }
}

fn rename(names: &mut BTreeMap<PathBuf, usize>, operation: &Operation) {
    match operation {
        Operation::Create { path, file } => drop(names.insert(path.clone(), *file)),
        Operation::Remove { path } => drop(names.remove(path)),
        Operation::Rename { from, to } => {
            let file = names.remove(from).expect("it was there");
            names.insert(to.clone(), file);
        }
        _ => {}
    }
}

/// How much of what was not synced reaches the disk.
#[derive(Debug, Clone, Copy)]
enum Luck {
    Nothing,
    Everything,
    /// Sectors from the front, then none.
    InOrder,
    /// So many sixteenths of the sectors.
    Some(u64),
}

impl Luck {
    fn of(random: &mut Random) -> Self {
        match random.below(8) {
            0 => Self::Nothing,
            1 => Self::Everything,
            2 => Self::InOrder,
            3 => Self::Some(15),
            4 => Self::Some(1),
            _ => Self::Some(random.below(17)),
        }
    }
}

/// A file as the disk has it.
#[derive(Default)]
struct Platter {
    /// What is there for sure.
    safe: Vec<u8>,
    /// What a process sees.
    current: Vec<u8>,
    /// What each sector has been since, and each length.
    sectors: BTreeMap<usize, Vec<[u8; SECTOR_BYTES]>>,
    lengths: Vec<usize>,
    /// A sync has failed on it.
    distrusted: bool,
}

impl Platter {
    fn new(content: Vec<u8>) -> Self {
        Self { safe: content.clone(), current: content, ..Self::default() }
    }

    fn write(&mut self, position: u64, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        write(&mut self.current, position, bytes);
        self.lengths.push(self.current.len());
        let start = position as usize;
        self.note(start / SECTOR_BYTES..(start + bytes.len()).div_ceil(SECTOR_BYTES));
    }

    fn set_length(&mut self, length: u64) {
        let (before, length) = (self.current.len(), length as usize);
        self.current.resize(length, 0);
        self.lengths.push(length);
        self.note(length.min(before) / SECTOR_BYTES..length.max(before).div_ceil(SECTOR_BYTES));
    }

    fn note(&mut self, sectors: std::ops::Range<usize>) {
        for sector in sectors {
            let content = sector_of(&self.current, sector);
            self.sectors.entry(sector).or_default().push(content);
        }
    }

    fn sync(&mut self) {
        if !self.distrusted {
            self.safe.clone_from(&self.current);
            self.sectors.clear();
            self.lengths.clear();
        }
    }

    fn after_cut(&self, luck: Luck, stale: &[u8], random: &mut Random) -> Vec<u8> {
        let length = match (luck, self.lengths.last()) {
            (Luck::Nothing, _) | (_, None) => self.safe.len(),
            (Luck::Some(_), Some(_)) if random.one_in(2) => {
                self.lengths[random.below(self.lengths.len() as u64) as usize]
            }
            (_, Some(last)) => *last,
        };
        let mut content = self.safe.clone();
        content.resize(length, 0);
        let until = random.below(self.sectors.len() as u64 + 1) as usize;
        for (index, (&sector, versions)) in self.sectors.iter().enumerate() {
            let there = match luck {
                Luck::Nothing => false,
                Luck::Everything => true,
                Luck::InOrder => index < until,
                Luck::Some(sixteenths) => random.below(16) < sixteenths,
            };
            let start = sector * SECTOR_BYTES;
            if there {
                let last = versions.len() - 1;
                let version = if random.one_in(4) { random.below(last as u64 + 1) as usize } else { last };
                put(&mut content, start, &versions[version]);
            } else if start >= self.safe.len() && stale.len() > start {
                put(&mut content, start, &sector_of(stale, sector));
            }
        }
        content
    }
}

fn sector_of(content: &[u8], sector: usize) -> [u8; SECTOR_BYTES] {
    let mut bytes = [0; SECTOR_BYTES];
    let there = content.get(sector * SECTOR_BYTES..).unwrap_or(&[]);
    let count = there.len().min(SECTOR_BYTES);
    bytes[..count].copy_from_slice(&there[..count]);
    bytes
}

/// Puts as much of a sector into `content` as its length has room for.
fn put(content: &mut [u8], start: usize, sector: &[u8]) {
    if let Some(room) = content.get_mut(start..) {
        let count = room.len().min(sector.len());
        room[..count].copy_from_slice(&sector[..count]);
    }
}

/// Numbers that are the same for the same seed.
#[derive(Debug, Clone)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.number() % bound
    }

    pub(super) fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: &str = "/d/file";

    fn cuts(disk: &SimulatedDisk) -> Vec<Option<Vec<u8>>> {
        let mut replay = disk.replay();
        while replay.step() {}
        let mut random = Random::new(1);
        let mut seen: Vec<_> = (0..300).map(|_| replay.cut(&mut random).content(Path::new(PATH))).collect();
        seen.sort();
        seen.dedup();
        seen
    }

    #[test]
    fn simulate_cut_loses_nothing_that_was_synced_and_anything_else() {
        let disk = SimulatedDisk::default();
        let file = disk.create(Path::new(PATH)).expect("room");
        file.write_at(&[1; 2 * SECTOR_BYTES], 0).expect("room");
        file.sync().expect("synced");
        assert_eq!(cuts(&disk).len(), 2, "the name may be there or not");
        disk.sync_directory(Path::new(PATH)).expect("synced");
        assert_eq!(cuts(&disk), [Some(vec![1; 2 * SECTOR_BYTES])]);
        file.write_at(&[2; 2 * SECTOR_BYTES], 0).expect("room");
        assert_eq!(cuts(&disk).len(), 4, "each sector is the old one or the new one");
        file.set_length(SECTOR_BYTES as u64).expect("room");
        let lengths: Vec<_> =
            cuts(&disk).into_iter().map(|content| content.map_or(0, |content| content.len())).collect();
        assert!(lengths.contains(&SECTOR_BYTES) && lengths.contains(&(2 * SECTOR_BYTES)));
        file.sync().expect("synced");
        assert_eq!(cuts(&disk), [Some(vec![2; SECTOR_BYTES])]);
    }

    #[test]
    fn simulate_cut_does_renames_in_order_or_not() {
        let disk = SimulatedDisk::with([(PathBuf::from(PATH), vec![1])].into());
        let next = disk.create(Path::new("/d/next")).expect("room");
        next.write_at(&[2], 0).expect("room");
        next.sync().expect("synced");
        disk.rename(Path::new("/d/next"), Path::new(PATH)).expect("there");
        assert_eq!(cuts(&disk), [Some(vec![1]), Some(vec![2])]);
        disk.remove(Path::new(PATH)).expect("there");
        assert_eq!(cuts(&disk), [None, Some(vec![1]), Some(vec![2])]);
        disk.sync_directory(Path::new(PATH)).expect("synced");
        assert_eq!(cuts(&disk), [None]);
    }

    #[test]
    fn simulate_sync_after_one_that_failed_saves_nothing() {
        let disk = SimulatedDisk::with([(PathBuf::from(PATH), vec![1])].into());
        let file = disk.open(Path::new(PATH)).expect("sound").expect("there");
        file.write_at(&[2], 0).expect("room");
        disk.plan(|_| Fate::Fails(io::ErrorKind::Other));
        file.sync().expect_err("it fails");
        disk.heal();
        file.sync().expect("no error any more");
        assert_eq!(cuts(&disk), [Some(vec![1]), Some(vec![2])]);
    }
}
