//! The promise: the backup file is a complete copy, whatever is killed; it is loaded when the segment is gone; a file that does
//! not fit is refused with a reason; and a disk that refuses costs nothing that was acknowledged.
//!
//! Method: whole stores. A restart of the machine is both servers killed and the segment removed; a full disk is a limit on the size
//! of files, set and lifted while the store runs.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::mem::offset_of;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use kvs_core::backup::record::{self, FileHeader, Kind, RecordHeader};
use kvs_core::segment::layout::Header;
use kvs_core::wire::ErrorCode;
use kvs_harness::connection::{Answer, Connection, delete, get, increment, set};
use kvs_harness::processes;
use kvs_harness::store::{Launch, Place, Store};
use kvs_harness::wait::{SOON, eventually, eventually_some};
use rustix::process::{Resource, Rlimit, Signal};

type Model = BTreeMap<Vec<u8>, Vec<u8>>;

/// Numbers that look random and are the same every time.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// Changes this and that, small and large, and notes what was acknowledged.
fn change_some(client: &mut Connection, model: &mut Model, numbers: &mut Numbers, count: usize) {
    for _ in 0..count {
        let key = format!("key {}", numbers.below(500)).into_bytes();
        match numbers.below(10) {
            0 => {
                client.ask(&delete(&key)).expect("served");
                model.remove(&key);
            }
            1 => {
                let counter = format!("count {}", numbers.below(20)).into_bytes();
                let Answer::Number(sum) = client.ask(&increment(&counter, 3)).expect("served") else {
                    panic!("not counted")
                };
                model.insert(counter, sum.to_string().into_bytes());
            }
            _ => {
                let length = if numbers.below(20) == 0 { numbers.below(200_000) } else { numbers.below(300) };
                let value = vec![numbers.below(256) as u8; length as usize];
                assert_eq!(client.ask(&set(&key, &value)).expect("served"), Answer::Stored);
                model.insert(key, value);
            }
        }
    }
}

fn assert_has(store: &Store, model: &Model) {
    assert_eq!(store.ready().entries, model.len() as u64);
    let mut client = store.connect();
    for (key, value) in model {
        let answer = client.ask(&get(key)).expect("served");
        assert!(answer == Answer::Value(value.clone()), "{}", String::from_utf8_lossy(key));
    }
    assert!(store.place().tools_by_name(&["check"]).status.success());
}

/// A counter of the store.
fn statistic(store: &Store, name: &str) -> serde_json::Value {
    // A data server that was just killed answers nothing.
    let all = eventually_some("statistics", SOON, || {
        let output = store.place().tools(&["--json", "stats"]);
        serde_json::from_slice::<serde_json::Value>(&output.stdout).ok()
    });
    all[name].clone()
}

fn await_drained(store: &Store) {
    eventually("the rings are drained", SOON, || statistic(store, "backup_waiting_bytes") == 0);
}

/// Kills both servers at once.
fn kill_both(store: Store) -> (Place, Launch) {
    processes::kill_store(store.place().name());
    let (place, launch, _) = store.end(Signal::KILL);
    (place, launch)
}

fn restart_of_the_machine(store: Store) -> Store {
    let (place, launch) = kill_both(store);
    fs::remove_file(place.segment()).expect("a segment");
    launch.start_at(place)
}

#[test]
fn backup_is_loaded_when_the_segment_is_gone() {
    for durability in ["interval=50ms", "os", "always"] {
        let mut store = Launch::new().option("--durability", durability).start();
        assert_eq!(store.ready().start, "new");
        let (mut model, mut numbers) = (Model::new(), Numbers(1));
        for _ in 0..3 {
            change_some(&mut store.connect(), &mut model, &mut numbers, 400);
            await_drained(&store);
            store = restart_of_the_machine(store);
            assert_eq!(store.ready().start, "loaded");
            assert_has(&store, &model);
        }
        change_some(&mut store.connect(), &mut model, &mut numbers, 100);
        let (place, launch, status) = store.end(Signal::TERM);
        assert!(status.success());
        assert!(place.tools_by_name(&["purge"]).status.success());
        let store = launch.start_at(place);
        assert_has(&store, &model);
    }
}

#[test]
fn backup_is_loaded_when_the_segment_is_from_before_the_machine_was_started() {
    let (place, launch, _) = ended();
    let segment = place.segment();
    // The boot id, and the checksum over it and its neighbours.
    let file = File::options().read(true).write(true).open(&segment).expect("a segment");
    let mut identity = [0; 80];
    file.read_exact_at(&mut identity, 8).expect("a header");
    identity[offset_of!(Header, boot_id) - 8] ^= 1;
    file.write_all_at(&identity, 8).expect("ours");
    let checksum = u64::from(crc32c::crc32c(&identity)).to_le_bytes();
    file.write_all_at(&checksum, offset_of!(Header, identity_checksum) as u64).expect("ours");
    drop(file);
    let store = launch.start_at(place);
    assert_eq!((store.ready().start.as_str(), store.ready().entries), ("loaded", 100));
    let kept = Path::new("/dev/shm").join(format!("kvs-{}~", store.place().name()));
    assert!(store.place().log().contains(&kept.display().to_string()));
    fs::remove_file(kept).expect("kept aside");
}

#[test]
fn backup_copy_is_restored_by_pointing_at_it() {
    let store = Store::start();
    let (mut model, mut numbers) = (Model::new(), Numbers(2));
    change_some(&mut store.connect(), &mut model, &mut numbers, 300);
    await_drained(&store);
    let other = Place::new();
    fs::copy(store.place().backup(), other.backup()).expect("copied while it is written");
    let copy = Launch::new().start_at(other);
    assert_eq!(copy.ready().start, "loaded");
    assert_has(&copy, &model);
}

/// Limits how long files may get that the data server writes; None lifts the limit.
fn limit_files(store: &Store, bytes: Option<u64>) {
    let limit = Rlimit { current: bytes, maximum: None };
    rustix::process::prlimit(Some(store.data_pid()), Resource::Fsize, limit).expect("ours to limit");
}

fn file_length(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |meta| meta.len())
}

/// Writes until the store says that the backup file can't be written; returns how many were acknowledged.
fn write_until_refused(client: &mut Connection) -> u64 {
    let until = Instant::now() + SOON;
    let mut count = 0u64;
    loop {
        assert!(Instant::now() < until, "still not refused after {count} writes");
        let answer = client.ask(&set(format!("key {count}").as_bytes(), &[7; 1000])).expect("served");
        match answer {
            Answer::Stored => count += 1,
            Answer::Error(ErrorCode::BackupFailed, message) => {
                assert!(message.contains("can't write to it") && message.contains("ulimit"), "{message}");
                return count;
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn backup_disk_that_is_full_stops_writes_and_heals_without_a_restart() {
    for durability in ["interval=50ms", "os"] {
        let store = Launch::new().option("--durability", durability).option("--workers", "1").start();
        let mut client = store.connect();
        assert_eq!(client.ask(&set(b"before", b"it")).expect("served"), Answer::Stored);
        await_drained(&store);
        limit_files(&store, Some(file_length(&store.place().backup()) + 10_000));
        let count = write_until_refused(&mut client);
        assert_eq!(client.ask(&get(b"before")).expect("served"), Answer::Value(b"it".to_vec()));
        assert!(
            statistic(&store, "backup_error").as_str().is_some_and(|error| error.contains("can't write"))
        );
        limit_files(&store, None);
        eventually("writes are taken again", SOON, || {
            client.ask(&set(b"after", b"it")).expect("served") == Answer::Stored
        });
        await_drained(&store);
        assert!(statistic(&store, "backup_error").is_null());
        let store = restart_of_the_machine(store);
        assert_eq!(store.ready().entries, count + 2, "{durability}");
    }
}

#[test]
fn backup_killed_with_a_full_ring_loses_nothing() {
    let store = Launch::new().option("--durability", "os").option("--workers", "1").start();
    limit_files(&store, Some(file_length(&store.place().backup()) + 50_000));
    let count = write_until_refused(&mut store.connect());
    assert!(count > 200, "the ring has room for more than {count}");
    // The next data server has no limit.
    store.kill_data();
    await_drained(&store);
    limit_files(&store, Some(file_length(&store.place().backup())));
    let more = write_until_refused(&mut store.connect());
    assert!(more > 200);
    let (place, launch) = kill_both(store);
    let store = launch.start_at(place);
    assert_eq!((store.ready().start.as_str(), store.ready().entries), ("attached", count.max(more)));
    await_drained(&store);
    let store = restart_of_the_machine(store);
    assert_eq!((store.ready().start.as_str(), store.ready().entries), ("loaded", count.max(more)));
}

#[test]
fn backup_with_always_acknowledges_nothing_that_is_not_on_disk() {
    let store = Launch::new().option("--durability", "always").start();
    let mut client = store.connect();
    assert_eq!(client.ask(&set(b"key", b"1")).expect("served"), Answer::Stored);
    limit_files(&store, Some(file_length(&store.place().backup())));
    client.queue(&set(b"key", b"2"));
    client.flush().expect("sent");
    client.socket().set_patience(Duration::from_millis(300)).expect("set");
    // Either it is refused, or, begun before the disk was found full, it waits.
    match client.receive() {
        Ok((_, Answer::Error(ErrorCode::BackupFailed, _))) | Err(_) => {}
        other => panic!("acknowledged: {other:?}"),
    }
    let mut reader = store.connect();
    assert!(matches!(reader.ask(&get(b"key")).expect("served"), Answer::Value(_)), "reading goes on");
    limit_files(&store, None);
    let mut writer = store.connect();
    eventually("writes are taken again", SOON, || {
        writer.ask(&set(b"key", b"3")).expect("served") == Answer::Stored
    });
    let store = restart_of_the_machine(store);
    assert_eq!(store.connect().ask(&get(b"key")).expect("served"), Answer::Value(b"3".to_vec()));
}

#[test]
fn backup_pipelines_with_always_are_answered_in_order() {
    let store = Launch::new().option("--durability", "always").start();
    let mut clients: Vec<Connection> = (0..8).map(|_| store.connect()).collect();
    for round in 0..5 {
        for client in &mut clients {
            for _ in 0..500 {
                client.queue(&increment(b"counter", 1));
                client.queue(&get(b"counter"));
            }
            client.flush().expect("sent");
        }
        for client in &mut clients {
            let mut last = 0;
            for _ in 0..500 {
                let (_, Answer::Number(sum)) = client.receive().expect("served") else { panic!("no sum") };
                assert!(sum > last, "round {round}");
                last = sum;
                assert!(matches!(client.receive().expect("served").1, Answer::Value(_)));
            }
        }
    }
    let answer = store.connect().ask(&get(b"counter")).expect("served");
    assert_eq!(answer, Answer::Value(b"20000".to_vec()));
}

#[test]
fn backup_file_stays_short_and_complete_while_keys_are_overwritten() {
    let mut store = Launch::new().option("--durability", "os").start();
    let value = vec![9; 10_000];
    let mut rounds = 0;
    for kills in 0..3 {
        let mut client = store.connect();
        let generation = statistic(&store, "backup_generation").as_u64().expect("a number");
        let until = Instant::now() + SOON;
        while statistic(&store, "backup_generation").as_u64() == Some(generation) {
            assert!(Instant::now() < until, "the file is never rewritten");
            rounds += 1;
            for key in 0..200 {
                let key = format!("{rounds} {key}");
                let key = if key.ends_with('7') { key } else { format!("key {}", key.len()) };
                assert_eq!(client.ask(&set(key.as_bytes(), &value)).expect("served"), Answer::Stored);
            }
        }
        let entries = statistic(&store, "entries").as_u64().expect("a number");
        await_drained(&store);
        store = if kills == 1 { restart_of_the_machine(store) } else { store.restart() };
        assert_eq!(store.ready().entries, entries);
    }
    let live = statistic(&store, "content_bytes").as_u64().expect("a number");
    await_drained(&store);
    let length = file_length(&store.place().backup());
    assert!(length < (16 << 20) + 3 * live, "{length} bytes for {live}");
    eventually("a rewriting that was under way has ended", SOON, || {
        !store.place().directory().join("backup.new").exists()
    });
}

#[test]
fn backup_removed_while_running_is_written_anew_and_a_strangers_is_not_touched() {
    let store = Store::start();
    let mut client = store.connect();
    assert_eq!(client.ask(&set(b"key", b"value")).expect("served"), Answer::Stored);
    await_drained(&store);
    let backup = store.place().backup();
    fs::remove_file(&backup).expect("there");
    eventually("a new one is there", SOON, || file_length(&backup) > 64);
    assert!(store.place().log().contains("was removed"));
    fs::remove_file(&backup).expect("there");
    fs::write(&backup, "precious").expect("written");
    eventually("writes are refused", SOON, || {
        matches!(client.ask(&set(b"key", b"2")).expect("served"), Answer::Error(ErrorCode::BackupFailed, _))
    });
    assert_eq!(fs::read(&backup).expect("still there"), b"precious");
    fs::remove_file(&backup).expect("there");
    eventually("writes are taken again", SOON, || {
        client.ask(&set(b"key", b"3")).expect("served") == Answer::Stored
    });
    await_drained(&store);
    eventually("a new one is there", SOON, || file_length(&backup) > 64);
    let store = restart_of_the_machine(store);
    assert_eq!(store.connect().ask(&get(b"key")).expect("served"), Answer::Value(b"3".to_vec()));
}

/// A store that was ended, with a few entries, and its backup file's bytes.
fn ended() -> (Place, Launch, Vec<u8>) {
    let store = Store::start();
    let mut client = store.connect();
    for number in 0..100 {
        let key = format!("key {number}");
        assert_eq!(client.ask(&set(key.as_bytes(), &[5; 100])).expect("served"), Answer::Stored);
    }
    drop(client);
    let (place, launch, _) = store.end(Signal::TERM);
    let bytes = fs::read(place.backup()).expect("a backup file");
    (place, launch, bytes)
}

fn refused(place: Place, launch: &Launch, words: &[&str]) -> Place {
    match launch.try_start_at(place) {
        Ok(_) => panic!("started although {words:?}"),
        Err(refused) => {
            refused.assert_says(words);
            refused.place
        }
    }
}

#[test]
fn backup_that_does_not_fit_the_segment_is_refused_and_left_alone() {
    let (place, launch, bytes) = ended();
    let header = FileHeader::decode(&bytes).expect("a header");
    let other = FileHeader { id: [1, 2], ..header };
    let later = FileHeader { generation: header.generation + 1, ..header };
    let with = |header: FileHeader| [&header.encode()[..], &bytes[64..]].concat();
    let cases: [(Vec<u8>, &[&str]); 5] = [
        (with(other), &["different instances", "purge", "move the file away"]),
        (with(later), &["older copy", "purge"]),
        (bytes[..bytes.len() - 200].to_vec(), &["older copy", "bytes", "purge"]),
        (b"#!/bin/sh\n".to_vec(), &["no backup file", "--backup"]),
        ([&bytes[..8], &[99, 0, 0, 0], &bytes[12..]].concat(), &["format 99", "release"]),
    ];
    let mut place = place;
    for (changed, words) in cases {
        fs::write(place.backup(), &changed).expect("written");
        place = refused(place, &launch, words);
        assert!(fs::read(place.backup()).expect("there") == changed, "{words:?}");
    }
    fs::write(place.backup(), &bytes).expect("written");
    let store = launch.start_at(place);
    assert_eq!((store.ready().start.as_str(), store.ready().entries), ("attached", 100));
}

#[test]
fn backup_that_is_gone_or_empty_is_written_from_the_segment() {
    let (mut place, launch, _) = ended();
    for empty in [false, true] {
        fs::remove_file(place.backup()).expect("there");
        if empty {
            fs::write(place.backup(), "").expect("written");
        }
        let store = launch.start_at(place);
        assert_eq!((store.ready().start.as_str(), store.ready().entries), ("attached", 100));
        let store = restart_of_the_machine(store);
        assert_eq!((store.ready().start.as_str(), store.ready().entries), ("loaded", 100));
        place = store.end(Signal::TERM).0;
    }
}

#[test]
fn backup_that_is_damaged_is_reported_with_its_offset_and_torn_is_cut() {
    let (mut place, launch, bytes) = ended();
    let reload = |place: &Place, bytes: &[u8]| {
        let _ = fs::remove_file(place.segment());
        fs::write(place.backup(), bytes).expect("written");
    };
    let mut damaged = bytes.clone();
    let at = 64 + 10 * 152 + 60;
    damaged[at] ^= 1;
    reload(&place, &damaged);
    let offset =
        (64..at).rev().find(|from| (from - 64) % 8 == 0 && bytes[*from + 4] == 152).expect("a record");
    place = refused(place, &launch, &["damaged at byte", &offset.to_string(), "check --backup", "--salvage"]);
    assert!(!place.segment().exists());

    let mut torn = bytes.clone();
    torn.extend_from_slice(&bytes[64..264]);
    reload(&place, &torn);
    let store = launch.start_at(place);
    assert_eq!((store.ready().start.as_str(), store.ready().entries), ("loaded", 100));
    let log = store.place().log();
    let kept = store.place().directory().join(format!("backup.torn-{}", bytes.len()));
    assert!(log.contains("cut off and kept") && log.contains(&kept.display().to_string()), "{log}");
    assert_eq!(fs::read(kept).expect("kept"), bytes[64..264]);
}

/// `bytes` with one more record, which follows the last in every way but has a byte changed, as in a sector that was not written.
fn with_a_torn_record(bytes: &[u8]) -> Vec<u8> {
    let mut at = 64;
    let mut last = RecordHeader::decode(&bytes[at..]).expect("a record");
    while at + last.length < bytes.len() {
        at += last.length;
        last = RecordHeader::decode(&bytes[at..]).expect("a record");
    }
    let mut torn = bytes.to_vec();
    record::begin(&mut torn, (last.sequence + 1, last.checksum), Kind::Set, 1000, (3, 100));
    torn.extend_from_slice(&[b'k'; 103]);
    record::finish(&mut torn, bytes.len(), FileHeader::decode(bytes).expect("a header").checksum_seed());
    torn[bytes.len() + 60] ^= 1;
    torn
}

#[test]
fn backup_that_is_torn_within_a_record_is_loaded_up_to_there() {
    let (place, launch, bytes) = ended();
    fs::remove_file(place.segment()).expect("there");
    fs::write(place.backup(), with_a_torn_record(&bytes)).expect("written");
    let store = launch.start_at(place);
    assert_eq!((store.ready().start.as_str(), store.ready().entries), ("loaded", 100));
    assert!(store.place().log().contains("cut off and kept"));
    assert!(store.place().directory().join(format!("backup.torn-{}", bytes.len())).exists());
}

#[test]
fn backup_somewhere_impossible_is_refused_with_advice() {
    let directory = tempfile::tempdir().expect("a directory");
    let shown = directory.path().display().to_string();
    let missing = format!("{shown}/missing/backup");
    for (path, words) in [
        (missing.as_str(), &["missing/backup", "make its directory"][..]),
        (shown.as_str(), &["backup file", "directory"]),
        ("/proc/backup", &["/proc/backup", "--backup"]),
        ("/dev/null", &["/dev/null", "plain file"]),
    ] {
        drop(refused(Place::new(), &Launch::new().option("--backup", path), words));
    }
}

#[test]
fn backup_of_a_running_instance_is_locked() {
    let store = Store::start();
    let backup = store.place().backup();
    let launch = Launch::new().option("--backup", &backup.display().to_string());
    drop(refused(Place::new(), &launch, &["in use by another instance"]));
    assert_eq!(store.connect().ask(&set(b"a", b"b")).expect("served"), Answer::Stored);
}

#[test]
fn backup_larger_than_the_capacity_is_refused() {
    let store = Launch::new().capacity("64MiB").start();
    let mut client = store.connect();
    for number in 0..40 {
        let key = format!("key {number}");
        assert_eq!(client.ask(&set(key.as_bytes(), &vec![5; 1 << 20])).expect("served"), Answer::Stored);
    }
    let (place, launch, _) = store.end(Signal::TERM);
    fs::remove_file(place.segment()).expect("there");
    let place = refused(place, &launch.clone().capacity("16MiB"), &["more than --capacity", "larger"]);
    let store = launch.start_at(place);
    assert_eq!((store.ready().start.as_str(), store.ready().entries), ("loaded", 40));
}
