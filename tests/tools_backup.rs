//! The promise: `kvs-tools check --backup` tells what is in a backup file and every place where it is not what was written, also
//! while a store writes it; `--salvage` saves the rest to a file that a store loads.
//!
//! Method: files of whole stores, damaged in known places.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use kvs_core::backup::record::{FILE_HEADER_BYTES, Kind, RecordHeader};
use kvs_harness::connection::{Answer, get, set};
use kvs_harness::store::{Launch, Place, Store};
use kvs_harness::wait::{SOON, eventually};
use rustix::process::Signal;
use serde_json::Value;

const ENTRIES: usize = 300;

fn check(place: &Place, file: &Path, more: &[&str]) -> Output {
    let file = file.display().to_string();
    place.tools_by_name(&[&["check", "--backup", &file], more].concat())
}

fn document(place: &Place, file: &Path) -> Value {
    serde_json::from_slice(&check(place, file, &["--json"]).stdout).expect("JSON")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn fill(store: &Store, entries: usize) {
    let mut client = store.connect();
    for number in 0..entries {
        let key = format!("key {number}");
        assert_eq!(client.ask(&set(key.as_bytes(), &[7; 90])).expect("served"), Answer::Stored);
    }
}

/// A store that was ended in order, and where each of the records of its backup file begins.
fn ended() -> (Place, Launch, Vec<(usize, RecordHeader)>) {
    let store = Store::start();
    fill(&store, ENTRIES);
    let (place, launch, _) = store.end(Signal::TERM);
    let bytes = fs::read(place.backup()).expect("a backup file");
    let (mut records, mut at) = (Vec::new(), FILE_HEADER_BYTES);
    while let Some(record) = RecordHeader::decode(&bytes[at..]) {
        records.push((at, record));
        at += record.length;
    }
    assert_eq!(at, bytes.len());
    (place, launch, records)
}

fn changed(place: &Place, name: &str, change: impl FnOnce(&mut Vec<u8>)) -> PathBuf {
    let mut bytes = fs::read(place.backup()).expect("there");
    change(&mut bytes);
    let path = place.directory().join(name);
    fs::write(&path, bytes).expect("written");
    path
}

#[test]
fn tools_backup_that_a_store_writes_is_verified_without_disturbing_it() {
    let store = Store::start();
    fill(&store, ENTRIES);
    let backup = store.place().backup();
    eventually("the rings are drained", SOON, || document(store.place(), &backup)["entries"] == ENTRIES);
    for number in 0..20 {
        fill(&store, number * 10);
        let found = document(store.place(), &backup);
        assert_eq!((&found["sound"], &found["fault_count"]), (&true.into(), &0.into()), "{found}");
        assert_eq!(found["entries"], ENTRIES);
    }
    let said = check(store.place(), &backup, &[]);
    assert!(said.status.success());
    assert!(text(&said.stdout).contains(": sound; file 1 of its line, "), "{}", text(&said.stdout));
}

#[test]
fn tools_backup_damage_is_listed_and_the_rest_is_saved_and_loaded() {
    let (place, _, records) = ended();
    let entries: Vec<_> = records.iter().filter(|(_, record)| record.kind == Kind::Set).collect();
    let (first, second) = (entries[20].0, entries[200].0);
    let damaged = changed(&place, "damaged", |bytes| {
        bytes[first + 50] ^= 4;
        bytes[second + 5] ^= 1;
    });
    let said = check(&place, &damaged, &[]);
    assert_eq!(said.status.code(), Some(1));
    let (listed, error) = (text(&said.stdout), text(&said.stderr));
    for at in [first, second] {
        assert!(
            listed.contains(&format!("byte {at}: ")) && listed.contains("1 record is missing"),
            "{listed}"
        );
    }
    assert!(
        error.contains("2 faults, as listed; `kvs-tools check --backup") && error.contains("--salvage"),
        "{error}"
    );
    let found = document(&place, &damaged);
    assert_eq!((&found["entries"], &found["fault_count"]), (&(ENTRIES - 2).into(), &2.into()));
    assert_eq!(found["faults"][1]["offset"], second);

    let saved = place.directory().join("saved");
    let target = saved.display().to_string();
    let said = check(&place, &damaged, &["--salvage", &target]);
    assert!(said.status.success(), "{}", text(&said.stderr));
    assert!(text(&said.stdout).contains(&format!("byte {first}: ")), "{}", text(&said.stdout));
    let again = check(&place, &damaged, &["--salvage", &target]);
    assert_eq!(again.status.code(), Some(1));
    assert!(text(&again.stderr).contains("exists already and is left as it is"), "{}", text(&again.stderr));
    assert!(document(&place, &saved)["sound"] == true);

    let other = Launch::new().option("--backup", &target).start();
    assert_eq!((other.ready().start.as_str(), other.ready().entries), ("loaded", ENTRIES as u64 - 2));
    let mut client = other.connect();
    assert_eq!(client.ask(&get(b"key 199")).expect("served"), Answer::Value(vec![7; 90]));
}

#[test]
fn tools_backup_torn_end_is_told_and_is_no_fault() {
    let (place, _, records) = ended();
    let length = fs::metadata(place.backup()).expect("there").len();
    let from = records[10].0;
    let torn = changed(&place, "torn", |bytes| bytes.extend_from_within(from..from + 100));
    let said = check(&place, &torn, &[]);
    assert!(said.status.success(), "{}", text(&said.stderr));
    let told =
        format!("torn end: the last 100 bytes, from byte {length} on, with 0 whole records among them");
    assert!(text(&said.stdout).contains(&told), "{}", text(&said.stdout));
    let found = document(&place, &torn);
    assert_eq!((&found["torn_end"]["offset"], &found["entries"]), (&length.into(), &ENTRIES.into()));
}

#[test]
fn tools_backup_that_is_none_is_refused_with_reason() {
    let (place, _, _) = ended();
    let foreign = changed(&place, "foreign", |bytes| *bytes = b"#!/bin/sh\n".to_vec());
    let newer = changed(&place, "newer", |bytes| bytes[8] = 9);
    let empty = changed(&place, "empty", Vec::clear);
    let cases = [
        (foreign, "it does not begin with the mark of a kvs backup file"),
        (newer, "it has format 9, this release reads up to format 1"),
        (empty, "is empty: a store that is started with it begins with no entries"),
        (place.directory().join("missing"), "there is no file"),
        (place.directory().to_path_buf(), "it is not a plain file"),
    ];
    for (file, told) in cases {
        let said = check(&place, &file, &[]);
        assert_eq!(said.status.code(), Some(1));
        assert!(text(&said.stderr).contains(told), "{}", text(&said.stderr));
        let saved = place.directory().join("never");
        let said = check(&place, &file, &["--salvage", &saved.display().to_string()]);
        assert_eq!(said.status.code(), Some(1));
        assert!(!saved.exists());
    }
}

#[test]
fn tools_backup_with_a_damaged_header_is_saved_all_the_same() {
    let (place, _, _) = ended();
    let damaged = changed(&place, "header", |bytes| bytes[3] ^= 1);
    let said = check(&place, &damaged, &[]);
    assert_eq!(said.status.code(), Some(1));
    assert!(
        text(&said.stdout).starts_with("byte 0: it does not begin with the mark"),
        "{}",
        text(&said.stdout)
    );
    let saved = place.directory().join("saved");
    assert!(check(&place, &damaged, &["--salvage", &saved.display().to_string()]).status.success());
    assert_eq!(document(&place, &saved)["entries"], ENTRIES);
}
