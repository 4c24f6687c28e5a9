//! Goal: whatever the disk refuses, nothing is lost, it is said in a way that an operator can act on, and when the disk works again the
//! backup goes on without a restart. Method: one fault of each kind, at each operation where it can happen.

use std::io;
use std::path::{Path, PathBuf};

use super::super::disk::Disk;
use super::super::record::FileHeader;
use super::super::simulate::{Fate, Operation, Random, SimulatedDisk};
use super::super::writer::Writer;
use super::super::{BackupError, log, next_path};
use super::{PATH, change, contents, load, load_or_empty, open, rewrite, segment, slot};
use crate::segment::Segment;
use crate::table::Table;
use crate::table::tests::Step;

fn path() -> &'static Path {
    Path::new(PATH)
}

fn entries_in(disk: &SimulatedDisk) -> u64 {
    Table::new(&load(disk).expect("sound")).expect("sound").totals().entries
}

/// What a power cut leaves that loses all that may be lost.
fn after_cut(disk: &SimulatedDisk) -> SimulatedDisk {
    let mut replay = disk.replay();
    while replay.step() {}
    let mut random = Random::new(0);
    let cuts = (0..64).map(|_| replay.cut(&mut random));
    let fewest = cuts.min_by_key(|left| left.content(path()).map_or(0, |bytes| bytes.len()));
    fewest.expect("one of them")
}

fn sync(writer: &mut Writer<'_>) -> Result<bool, BackupError> {
    let ticket = writer.sync_ticket()?.expect("something new");
    let result = ticket.sync();
    writer.synced(&ticket, result)
}

/// What is tried with a fault.
struct Case {
    segment: Segment,
    disk: SimulatedDisk,
    plain: Table,
    backed_up: Table,
}

impl Case {
    fn new() -> Self {
        let segment = segment();
        let plain = Table::new(&segment).expect("sound");
        let backed_up = plain.backed_up();
        Self { segment, disk: SimulatedDisk::default(), plain, backed_up }
    }

    fn open(&self) -> Writer<'_> {
        open(&self.disk, &self.plain)
    }

    fn set(&self, key: u16) {
        let step = Step::Set { key, length: 100, if_absent: false };
        change(&self.backed_up, slot(&self.segment, 0), &step).expect("room in the ring");
    }

    /// Fails the first operation that `hits`.
    fn fail_once(&self, fate: Fate, hits: fn(&Operation) -> bool) {
        let mut done = false;
        self.disk.plan(move |operation| {
            if done || !hits(operation) {
                return Fate::Done;
            }
            done = true;
            fate
        });
    }

    /// What is left by a power cut, the worst that may come.
    fn entries_after_cut(&self) -> u64 {
        entries_in(&after_cut(&self.disk))
    }
}

fn is_sync(operation: &Operation) -> bool {
    matches!(operation, Operation::Sync { .. })
}

#[test]
fn faults_full_disk_refuses_and_heals_with_nothing_lost() {
    for fate in [Fate::Fails(io::ErrorKind::StorageFull), Fate::Half(io::ErrorKind::StorageFull)] {
        let case = Case::new();
        let mut writer = case.open();
        case.set(1);
        assert!(writer.drain().expect("room") > 0);
        case.set(2);
        case.disk.plan(
            move |operation| if matches!(operation, Operation::Write { .. }) { fate } else { Fate::Done },
        );
        for _ in 0..3 {
            let error = writer.drain().expect_err("the disk is full");
            let text = error.to_string();
            assert!(text.starts_with("backup file /backup: can't write to it: "), "{text}");
            assert!(text.ends_with("; free some room on its disk"), "{text}");
        }
        assert!(writer.has_file(), "a full disk is no reason to distrust the file");
        let content = case.disk.content(path()).expect("there");
        assert_eq!(entries_in(&SimulatedDisk::with([(path().into(), content)].into())), 1);
        case.disk.heal();
        assert!(writer.drain().expect("room") > 0);
        assert!(sync(&mut writer).expect("synced"));
        drop(writer);
        assert_eq!(case.entries_after_cut(), 2);
    }
}

#[test]
fn faults_full_disk_at_any_write_of_a_rewrite_leaves_the_old_file() {
    for failing in 0.. {
        let case = Case::new();
        let mut writer = case.open();
        (0..200).for_each(|key| {
            case.set(key);
            writer.drain().expect("room");
        });
        let mut writes = 0;
        case.disk.plan(move |operation| {
            let hit = matches!(operation, Operation::Write { .. }) && {
                writes += 1;
                writes > failing
            };
            if hit { Fate::Half(io::ErrorKind::StorageFull) } else { Fate::Done }
        });
        let rewritten = writer.begin_rewrite().and_then(|()| writer.copy_some()).and_then(|mut whole| {
            while !whole {
                whole = writer.copy_some()?;
            }
            writer.install_next()
        });
        case.disk.heal();
        if rewritten.is_ok() {
            assert!(failing > 5, "it takes several writes");
            break;
        }
        let text = rewritten.err().map(|error| error.to_string()).expect("the disk is full");
        assert!(text.starts_with("backup file /backup.new: can't write"), "{text}");
        assert!(text.ends_with("; free some room on its disk"), "{text}");
        assert!(writer.has_file() && !writer.is_rewriting());
        assert_eq!(case.disk.content(&next_path(path())), None, "the room is given back");
        case.set(1000);
        writer.end().expect("room");
        drop(writer);
        assert_eq!(case.entries_after_cut(), 201);
    }
}

#[test]
fn faults_failed_sync_means_a_new_file_and_until_then_the_last_good_one() {
    let case = Case::new();
    let mut writer = case.open();
    case.set(1);
    writer.drain().expect("room");
    assert!(sync(&mut writer).expect("synced"));
    case.set(2);
    writer.drain().expect("room");
    case.fail_once(Fate::Fails(io::ErrorKind::Other), is_sync);
    let text = sync(&mut writer).expect_err("it fails").to_string();
    let told = "backup file /backup: can't sync it, so what was written may be lost; writing a new one: ";
    assert!(text.starts_with(told), "{text}");
    assert!(!writer.has_file());
    assert!(writer.sync_ticket().expect("sound").is_none(), "it is never synced again");
    assert_eq!(writer.drain().expect("nothing to do"), 0);
    assert_eq!(case.entries_after_cut(), 1, "the last good one");
    case.set(3);
    rewrite(&mut writer);
    assert_eq!(case.entries_after_cut(), 3, "the new one");
}

#[test]
fn faults_failed_sync_is_remembered_by_the_successor() {
    let case = Case::new();
    let mut writer = case.open();
    case.set(1);
    writer.drain().expect("room");
    case.fail_once(Fate::Fails(io::ErrorKind::Other), is_sync);
    sync(&mut writer).expect_err("it fails");
    drop(writer);
    let found = log::open(&case.disk, path()).expect("sound");
    let writer =
        Writer::open(&case.disk, path(), found, &case.plain, slot(&case.segment, 1)).expect("its own");
    assert!(!writer.has_file());
}

#[test]
fn faults_of_renaming_making_and_syncing_a_new_file_are_told_and_survived() {
    type Hits = fn(&Operation) -> bool;
    let cases: [(Hits, &str); 4] = [
        (
            |operation| matches!(operation, Operation::Create { .. }),
            "backup file /backup.new: can't make it: ",
        ),
        (is_sync, "backup file /backup.new: can't sync it: "),
        (
            |operation| matches!(operation, Operation::Rename { .. }),
            "backup file /backup: can't put the new one in its place: ",
        ),
        (
            |operation| matches!(operation, Operation::SyncDirectory { .. }),
            "backup file /backup: can't sync its directory; writing a new file: ",
        ),
    ];
    for (hits, told) in cases {
        let case = Case::new();
        let mut writer = case.open();
        case.set(1);
        writer.drain().expect("room");
        assert!(sync(&mut writer).expect("synced"));
        case.fail_once(Fate::Fails(io::ErrorKind::PermissionDenied), hits);
        let failed =
            writer.begin_rewrite().and_then(|()| writer.copy_some()).and_then(|_| writer.install_next());
        let text = failed.err().map(|error| error.to_string()).expect("it fails");
        assert!(text.starts_with(told), "{text}");
        assert!(
            text.ends_with("make its directory writable for this user, or choose another --backup"),
            "{text}"
        );
        assert_eq!(case.entries_after_cut(), 1, "{told}");
        case.set(2);
        writer.end().expect("the disk is well");
        drop(writer);
        assert_eq!(case.entries_after_cut(), 2, "{told}");
    }
}

#[test]
fn faults_file_removed_while_it_is_written_is_written_anew() {
    let case = Case::new();
    let mut writer = case.open();
    case.set(1);
    writer.drain().expect("room");
    assert!(writer.is_in_place().expect("there"));
    let ticket = writer.sync_ticket().expect("sound").expect("something new");
    case.disk.remove(path()).expect("there");
    let result = ticket.sync();
    assert!(!writer.is_in_place().expect("it is gone"));
    assert!(!writer.synced(&ticket, result).expect("no error"), "a file without a name makes nothing safe");
    rewrite(&mut writer);
    assert_eq!(case.entries_after_cut(), 1);
}

#[test]
fn faults_file_ended_without_is_written_first() {
    let case = Case::new();
    let mut writer = case.open();
    case.set(1);
    case.disk.remove(path()).expect("there");
    assert!(!writer.is_in_place().expect("it is gone"));
    writer.end().expect("room");
    drop(writer);
    assert_eq!(case.entries_after_cut(), 1);
}

#[test]
fn faults_other_file_in_the_place_is_left_alone_and_told() {
    let case = Case::new();
    let mut writer = case.open();
    case.set(1);
    writer.drain().expect("room");
    let other = case.disk.create(path()).expect("room");
    other.write_at(b"something dear", 0).expect("room");
    let told = "another file was put in the place of backup file /backup, so nothing can be written there: move it away, and a new \
                one is written from memory; to go back to it, end the store and remove the segment with `kvs-tools purge`";
    assert_eq!(writer.is_in_place().expect_err("it is another").to_string(), told);
    writer.begin_rewrite().expect("room");
    while !writer.copy_some().expect("room") {}
    assert_eq!(writer.install_next().err().map(|error| error.to_string()).as_deref(), Some(told));
    assert_eq!(case.disk.content(path()).as_deref(), Some(&b"something dear"[..]));
    case.disk.rename(path(), Path::new("/dear")).expect("there");
    assert!(!writer.is_in_place().expect("it is gone"));
    rewrite(&mut writer);
    assert_eq!(case.entries_after_cut(), 1);
}

/// A file of one entry, and its segment.
fn small() -> (Case, Vec<u8>) {
    let case = Case::new();
    let mut writer = case.open();
    case.set(1);
    writer.end().expect("room");
    drop(writer);
    let bytes = case.disk.content(path()).expect("there");
    (case, bytes)
}

fn refused(bytes: Vec<u8>, segment: Option<&Segment>) -> String {
    let disk = SimulatedDisk::with([(PathBuf::from(PATH), bytes)].into());
    let error = match segment {
        None => load_or_empty(&disk, 1).err().expect("it is refused"),
        Some(segment) => {
            let plain = Table::new(segment).expect("sound");
            let found = log::open(&disk, path()).expect("a backup file");
            let opened = Writer::open(&disk, path(), found, &plain, slot(segment, 1));
            opened.err().expect("it is refused")
        }
    };
    assert_eq!(disk.operations(), 0, "the file is left as it is");
    error.to_string()
}

#[test]
fn faults_files_that_are_not_this_segments_are_refused_with_reason_and_advice() {
    let (case, bytes) = small();
    let mut newer = bytes.clone();
    newer[8] = 2;
    let text = refused(newer, None);
    assert_eq!(
        text,
        "/backup is no backup file that can be used: it has format 2, this release reads up to format 1; use the release that wrote \
         it, or a later one; choose another --backup, or move it away"
    );
    let text = refused(
        b"#!/bin/sh\necho something else entirely, and longer than a header of a backup file\n".to_vec(),
        None,
    );
    assert!(
        text.contains("it does not begin with the mark of a kvs backup file; choose another --backup"),
        "{text}"
    );
    assert!(refused(vec![0], None).contains("does not begin with the mark"));
    let text = refused(bytes[..40].to_vec(), None);
    assert!(text.contains("its first 64 bytes are damaged: the checksum does not fit"), "{text}");

    let header = FileHeader::decode(&bytes).expect("a header");
    let mut other = FileHeader { id: [9, 9], ..header }.encode().to_vec();
    other.extend_from_slice(&bytes[64..]);
    let text = refused(other, Some(&case.segment));
    assert!(
        text.starts_with("backup file /backup and the segment hold the data of different instances"),
        "{text}"
    );
    assert!(text.contains("move the file away or choose another --backup"), "{text}");
    assert!(text.contains("remove the segment with `kvs-tools purge`"), "{text}");

    let text = refused(bytes[..bytes.len() - 40].to_vec(), Some(&case.segment));
    let expected = format!("(it has {} bytes, the segment has written {})", bytes.len() - 40, bytes.len());
    assert!(
        text.starts_with("backup file /backup is an older copy than the segment") && text.contains(&expected),
        "{text}"
    );
    let older = FileHeader { generation: 0, ..header }.encode().to_vec();
    let text = refused(older, Some(&case.segment));
    assert!(text.contains("(it is file 0 of its line, the segment has written file 1)"), "{text}");
}

#[test]
fn faults_empty_file_is_taken_as_none() {
    let disk = SimulatedDisk::with([(PathBuf::from(PATH), Vec::new())].into());
    let loaded = load_or_empty(&disk, 1).expect("nothing is there");
    assert!(contents(&Table::new(&loaded.segment).expect("sound")).is_empty());
}

#[test]
fn faults_locked_file_is_told() {
    let (case, _) = small();
    let held = log::open(&case.disk, path()).expect("sound").expect("there");
    let text = log::open(&case.disk, path()).err().expect("it is locked").to_string();
    assert_eq!(
        text,
        "backup file /backup is in use by another instance; end that one first or choose another --backup"
    );
    drop(held);
    assert!(log::open(&case.disk, path()).expect("free").is_some());
}
