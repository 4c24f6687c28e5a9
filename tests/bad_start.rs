//! The promise: a store that cannot start says what, why and what to do, ends with a status above 0, and harms nothing that
//! is there already.
//!
//! Method: real starts of the real front server in every situation that should be refused, and what it said on standard error.

use std::fs::{self, File};
use std::mem::offset_of;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};

use kvs_core::segment::layout::Header;
use kvs_harness::binaries;
use kvs_harness::connection::{Answer, get, set};
use kvs_harness::store::{Launch, Place, Refused, Store};
use rustix::process::Signal;

fn refused(launch: &Launch, place: Place) -> Refused {
    match launch.try_start_at(place) {
        Err(refused) => refused,
        Ok(store) => panic!("the store started: {:?}", store.ready()),
    }
}

/// A place with the segment of a store that ended in order.
fn place_with_segment() -> Place {
    let store = Store::start();
    assert_eq!(store.connect().ask(&set(b"kept", b"value")).expect("stored"), Answer::Stored);
    let (place, _, status) = store.end(Signal::TERM);
    assert!(status.success(), "{status}");
    place
}

/// Starts where the segment must be refused, and checks that it is left as it was.
fn assert_segment_refused(place: Place, words: &[&str]) {
    let segment = place.segment();
    let before = fs::read(&segment).expect("a segment");
    let refused = refused(&Launch::new(), place);
    refused.assert_says(words);
    assert!(fs::read(&segment).expect("still there") == before, "a refused segment is left as it was");
}

#[test]
fn data_server_program_missing_is_said() {
    let place = Place::new();
    let lonely = place.directory().join("kvs-front");
    fs::copy(binaries::program("kvs-front"), &lonely).expect("copied");
    let empty = place.directory().display().to_string();
    refused(&Launch::new().front(lonely).environment("PATH", &empty), place).assert_says(&["kvs-data"]);
}

#[test]
fn name_that_is_no_file_name_is_refused() {
    for name in ["a/b", "../up", "", ".hidden", "-dash", "with space", &"n".repeat(65)] {
        let launch = Launch::new().option("--name", name);
        refused(&launch, Place::new()).assert_says(&["name"]);
    }
}

#[test]
fn impossible_sizes_and_durations_are_refused() {
    for (option, value) in [
        ("--capacity", "0"),
        ("--capacity", "-1"),
        ("--capacity", "lots"),
        ("--capacity", "1KiB"),
        ("--capacity", "99999999TiB"),
        ("--max-value", "1TiB"),
        ("--workers", "0"),
        ("--workers", "1000000"),
        ("--max-connections", "0"),
        ("--max-connections", "99999999"),
        ("--durability", "sometimes"),
        ("--durability", "interval=never"),
        ("--listen", "nowhere"),
        ("--console", "perhaps"),
    ] {
        refused(&Launch::new().option(option, value), Place::new()).assert_says(&[option]);
    }
}

#[test]
fn capacity_larger_than_the_machine_is_refused() {
    refused(&Launch::new().capacity("900GiB"), Place::new()).assert_says(&["capacity"]);
}

#[test]
fn address_in_use_is_refused_when_it_was_asked_for() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("its address").to_string();
    refused(&Launch::new().option("--listen", &address), Place::new()).assert_says(&[&address]);
}

#[test]
fn second_front_server_of_a_name_is_refused_and_the_first_serves_on() {
    let store = Store::start();
    let mut client = store.connect();
    assert_eq!(client.ask(&set(b"first", b"1")).expect("stored"), Answer::Stored);
    // A place of its own for everything but the name.
    let other = Place::new();
    let unix = other.unix().display().to_string();
    let launch = Launch::new().option("--name", store.place().name()).option("--unix", &unix);
    let refusal = refused(&launch, other);
    let pids = [store.ready().front, store.ready().data].map(|pid| pid.to_string());
    refusal.assert_says(&[store.place().name()]);
    assert!(pids.iter().any(|pid| refusal.message.contains(pid)), "whose it is: {}", refusal.message);
    assert_eq!(client.ask(&get(b"first")).expect("read"), Answer::Value(b"1".to_vec()));
    assert!(store.ready().unix.exists(), "the first one's socket is still there");
    assert_eq!(store.connect_unix().ask(&get(b"first")).expect("read"), Answer::Value(b"1".to_vec()));
}

#[test]
fn second_front_server_on_the_same_unix_socket_is_refused() {
    let store = Store::start();
    let other = Place::new();
    let launch = Launch::new().option("--unix", &store.ready().unix.display().to_string());
    refused(&launch, other).assert_says(&["sock"]);
    assert_eq!(store.connect_unix().ask(&get(b"x")).expect("read"), Answer::Missing);
}

#[test]
fn unix_socket_left_by_a_killed_store_is_no_obstacle() {
    let store = Store::start();
    assert_eq!(store.connect().ask(&set(b"kept", b"value")).expect("stored"), Answer::Stored);
    kvs_harness::processes::kill_store(store.place().name());
    let (place, launch, _) = store.end(Signal::TERM);
    assert!(place.unix().exists(), "nobody could remove it");
    let store = launch.start_at(place);
    assert_eq!(store.ready().start, "attached");
    assert_eq!(store.connect_unix().ask(&get(b"kept")).expect("read"), Answer::Value(b"value".to_vec()));
}

#[test]
fn segment_of_another_layout_is_refused_and_kept() {
    for word in 1..3 {
        let place = place_with_segment();
        let mut bytes = fs::read(place.segment()).expect("a segment");
        bytes[word * 8] ^= 0x55;
        fs::write(place.segment(), bytes).expect("changed");
        assert_segment_refused(place, &["kvs-", "layout"]);
    }
}

#[test]
fn file_that_is_no_segment_is_refused_and_kept() {
    let place = Place::new();
    fs::write(place.segment(), vec![0x5a; 1 << 20]).expect("written");
    fs::set_permissions(place.segment(), fs::Permissions::from_mode(0o600)).expect("mode");
    assert_segment_refused(place, &["kvs-"]);
}

#[test]
fn segment_cut_short_is_refused_and_kept() {
    let place = place_with_segment();
    let file = fs::File::options().write(true).open(place.segment()).expect("a segment");
    let length = file.metadata().expect("its length").len();
    file.set_len(length / 2).expect("cut");
    assert_segment_refused(place, &["kvs-"]);
}

#[test]
fn segment_with_more_slots_than_there_can_be_is_refused_and_kept() {
    let counts = [
        (offset_of!(Header, worker_slots_reserved), "worker slots"),
        (offset_of!(Header, connection_slots_reserved), "connection slots"),
        (offset_of!(Header, sessions_reserved), "sessions"),
        (offset_of!(Header, extents_reserved), "extents"),
    ];
    for (offset, what) in counts {
        let place = place_with_segment();
        let segment = File::options().write(true).open(place.segment()).expect("a segment");
        segment.write_all_at(&70_000u64.to_le_bytes(), offset as u64).expect("written");
        assert_segment_refused(place, &["70000", what]);
    }
}

#[test]
fn segment_with_another_mode_is_refused() {
    let place = place_with_segment();
    fs::set_permissions(place.segment(), fs::Permissions::from_mode(0o666)).expect("mode");
    assert_segment_refused(place, &["mode"]);
}

#[test]
fn segment_with_a_second_link_is_refused() {
    let place = place_with_segment();
    let second = place.segment().with_extension("link");
    fs::hard_link(place.segment(), &second).expect("linked");
    let refused = refused(&Launch::new(), place);
    fs::remove_file(&second).expect("removed");
    refused.assert_says(&["2 hard links"]);
}

#[test]
fn segment_that_is_a_symbolic_link_is_refused() {
    let place = place_with_segment();
    let real = place.directory().join("elsewhere");
    fs::copy(place.segment(), &real).expect("copied");
    fs::remove_file(place.segment()).expect("removed");
    symlink(&real, place.segment()).expect("linked");
    refused(&Launch::new(), place).assert_says(&["kvs-"]);
}

#[test]
fn segment_of_another_user_is_refused() {
    let place = place_with_segment();
    if fs::metadata(place.segment()).expect("a segment").uid() != 0 {
        println!("skipped: only root can give a file away");
        return;
    }
    std::os::unix::fs::chown(place.segment(), Some(12_345), None).expect("given away");
    assert_segment_refused(place, &["kvs-", "user"]);
}

#[test]
fn segment_of_no_length_left_by_a_crash_is_made_anew() {
    let place = Place::new();
    fs::write(place.segment(), b"").expect("written");
    fs::set_permissions(place.segment(), fs::Permissions::from_mode(0o600)).expect("mode");
    let store = Launch::new().start_at(place);
    assert_eq!(store.ready().start, "new");
    assert_eq!(store.connect().ask(&set(b"key", b"value")).expect("stored"), Answer::Stored);
}

#[test]
fn segment_never_finished_by_a_crash_is_made_anew() {
    let place = Place::new();
    let file = fs::File::create(place.segment()).expect("made");
    file.set_permissions(fs::Permissions::from_mode(0o600)).expect("mode");
    file.set_len(64 << 20).expect("sized");
    drop(file);
    let store = Launch::new().start_at(place);
    assert_eq!(store.ready().start, "new");
}

#[test]
fn orderly_end_keeps_the_data_and_every_signal_that_asks_for_it_gives_status_0() {
    for signal in [Signal::TERM, Signal::INT] {
        let store = Store::start();
        assert_eq!(store.connect().ask(&set(b"kept", b"value")).expect("stored"), Answer::Stored);
        assert_eq!(store.further_output(), Vec::<String>::new(), "one line and no more");
        let (place, launch, status) = store.end(signal);
        assert_eq!(status.code(), Some(0), "{}", place.log());
        assert!(!place.unix().exists(), "the unix socket is removed");
        let store = launch.start_at(place);
        assert_eq!((store.ready().start.as_str(), store.ready().entries), ("attached", 1));
        assert_eq!(store.connect().ask(&get(b"kept")).expect("read"), Answer::Value(b"value".to_vec()));
    }
}
