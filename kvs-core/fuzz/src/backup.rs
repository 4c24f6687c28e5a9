//! A backup file of any bytes.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use kvs_core::backup::disk::{Disk, DiskFile, FileIdentity};
use kvs_core::backup::load::{Loaded, load_alone};
use kvs_core::backup::record::{FILE_HEADER_BYTES, FileHeader, RecordHeader, finish};
use kvs_core::backup::survey::{identify, survey};
use kvs_core::backup::writer::Writer;
use kvs_core::backup::{BackupError, log};
use kvs_core::limits::CAPACITY_BYTES_MIN;
use kvs_core::segment::Segment;
use kvs_core::table::Table;

use super::{key_of, put, worker};

/// Bits of the first byte of the input: the file gets a sound header, and its records sound numbers and checksums.
const HEADER: u8 = 1;
const RECORDS: u8 = 2;

/// Bytes that are copied at once.
const COPIED_BYTES: usize = 1 << 20;

const PATH: &str = "/backup";

/// Bytes as a backup file; the second byte says which record stays as it is when the others are repaired. It is loaded, cut or
/// refused, and surveyed. What is loaded goes on, and is loaded again.
pub fn backup(input: &[u8]) {
    let [how, broken, bytes @ ..] = input else { return };
    let disk = MemoryDisk::default();
    let bytes = repaired(bytes, *how, usize::from(*broken));
    disk.files().insert(PATH.into(), Arc::new(Mutex::new(bytes.clone())));
    look(&disk, bytes.len() as u64);
    let Ok(Some((segment, _))) = load(&disk) else { return };
    let entries = go_on(&disk, &segment);
    let again = load(&disk).expect("what was written is sound").expect("there is a file");
    assert_eq!(Table::new(&again.0).expect("sound").totals().entries, entries);
    assert!(!again.1, "an end in order is not torn");
}

fn repaired(bytes: &[u8], how: u8, broken: usize) -> Vec<u8> {
    let header = FileHeader { id: [0, 0], generation: 1, created_ns: 5 };
    let mut file = bytes.to_vec();
    if how & HEADER != 0 {
        file = [&header.encode()[..], bytes].concat();
    }
    if how & RECORDS == 0 {
        return file;
    }
    let (mut at, mut number, mut previous) = (FILE_HEADER_BYTES, 0, 0u32);
    while let Some(record) = file.get(at..).and_then(RecordHeader::decode) {
        let end = at + record.length;
        let Some(bytes) = file.get(at..end) else { break };
        number += 1;
        let mut bytes = bytes.to_vec();
        if number != broken {
            bytes[8..16].copy_from_slice(&(number as u64).to_le_bytes());
            bytes[16..20].copy_from_slice(&previous.to_le_bytes());
        }
        previous = finish(&mut bytes, 0, header.checksum_seed());
        if number != broken {
            file[at..end].copy_from_slice(&bytes);
        }
        at = end;
    }
    file
}

/// What tools do.
fn look(disk: &MemoryDisk, length: u64) {
    let file = disk.open(Path::new(PATH)).expect("no error").expect("there");
    if let Ok((header, _)) = identify(&*file).expect("no error") {
        let found = survey(&*file, &header, length, &mut |_, _| {}).expect("no error");
        assert!(found.gaps.iter().all(|gap| gap.from <= gap.to && gap.to <= length));
    }
}

/// A segment with everything that is in the file, and whether something was cut off; None when there is no file.
fn load(disk: &MemoryDisk) -> Result<Option<(Segment, bool)>, BackupError> {
    let path = Path::new(PATH);
    let mut torn = false;
    for _ in 0..2 {
        let segment = Segment::on_heap(CAPACITY_BYTES_MIN).expect("heap memory");
        segment.claim_worker(1).expect("memory");
        segment.claim_ring(0).expect("memory");
        let table = Table::new(&segment)?;
        let Some(found) = log::open(disk, path)? else { return Ok(None) };
        match load_alone(disk, path, &found, &table, worker(&segment), found.length) {
            Ok(Loaded::Whole { torn: cut }) => return Ok(Some((segment, torn || cut.is_some()))),
            Ok(Loaded::Again { torn: cut }) => {
                assert!(cut.position < found.length);
                torn = true;
            }
            Err(error) => {
                if let BackupError::Damage { offset, later, .. } = &error {
                    assert!(offset < later && *later < found.length);
                }
                return Err(error);
            }
        }
    }
    panic!("what is left after the torn end was cut off is whole");
}

/// Changes some keys, and ends in order; returns how many entries there are.
fn go_on(disk: &MemoryDisk, segment: &Segment) -> u64 {
    let plain = Table::new(segment).expect("sound");
    let table = plain.backed_up();
    let slot = segment.memory().object(segment.regions().worker(1)).expect("a slot");
    let found = log::open(disk, Path::new(PATH)).expect("it was loaded");
    let mut writer = Writer::open(disk, Path::new(PATH), found, &plain, slot).expect("it was loaded");
    for number in 0..9 {
        put(&table, &key_of(number), b"value");
    }
    writer.end().expect("there is room");
    plain.totals().entries
}

type Bytes = Arc<Mutex<Vec<u8>>>;

/// A disk on which all is well.
#[derive(Default)]
struct MemoryDisk(Mutex<BTreeMap<PathBuf, Bytes>>);

impl MemoryDisk {
    fn files(&self) -> MutexGuard<'_, BTreeMap<PathBuf, Bytes>> {
        self.0.lock().expect("unpoisoned")
    }
}

impl Disk for MemoryDisk {
    fn open(&self, path: &Path) -> io::Result<Option<Box<dyn DiskFile>>> {
        Ok(self.files().get(path).map(|bytes| Box::new(MemoryFile(Arc::clone(bytes))) as Box<dyn DiskFile>))
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let bytes = Bytes::default();
        self.files().insert(path.to_path_buf(), Arc::clone(&bytes));
        Ok(Box::new(MemoryFile(bytes)))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let bytes = self.files().remove(from).ok_or(io::ErrorKind::NotFound)?;
        self.files().insert(to.to_path_buf(), bytes);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.files().remove(path);
        Ok(())
    }

    fn sync_directory(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn identity(&self, path: &Path) -> io::Result<Option<FileIdentity>> {
        Ok(self.files().get(path).map(|bytes| (0, Arc::as_ptr(bytes) as u64)))
    }
}

struct MemoryFile(Bytes);

impl MemoryFile {
    fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0.lock().expect("unpoisoned")
    }
}

impl DiskFile for MemoryFile {
    fn lock(&self) -> io::Result<bool> {
        Ok(true)
    }

    fn identity(&self) -> io::Result<FileIdentity> {
        Ok((0, Arc::as_ptr(&self.0) as u64))
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.bytes().len() as u64)
    }

    fn read_at(&self, target: &mut [u8], position: u64) -> io::Result<usize> {
        let bytes = self.bytes();
        assert!(target.len() <= bytes.len().max(COPIED_BYTES), "no memory for what can't be there");
        let rest = bytes.get(position as usize..).unwrap_or(&[]);
        let count = rest.len().min(target.len());
        target[..count].copy_from_slice(&rest[..count]);
        Ok(count)
    }

    fn write_at(&self, source: &[u8], position: u64) -> io::Result<()> {
        let (mut bytes, end) = (self.bytes(), position as usize + source.len());
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[position as usize..end].copy_from_slice(source);
        Ok(())
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.bytes().resize(length as usize, 0);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}
