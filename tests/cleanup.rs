//! The promise of the harness: whatever way a test ends, no process, segment or file of it is left.
//!
//! Method: this test program starts itself again to play a test that ends badly, by a panic or by SIGKILL, while its store
//! runs; then what carries the store's name is looked for.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use kvs_harness::processes::of_store;
use kvs_harness::store::Store;
use kvs_harness::wait::{SOON, eventually};

/// The part played, when this program was started by [`play`].
const PART: &str = "CLEANUP_TEST_PART";

/// Starts this program again for one part; returns it and the name of the store that it runs.
fn play(part: &str) -> (Child, String) {
    let mut child = Command::new(std::env::current_exe().expect("own path"))
        .args(["--exact", "part_to_be_played", "--nocapture"])
        .env(PART, part)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("started");
    let lines = BufReader::new(child.stdout.take().expect("a pipe")).lines().map_while(Result::ok);
    let name = lines.filter_map(|line| Some(line.split_once("store=")?.1.to_owned())).next();
    (child, name.expect("the store's name"))
}

#[test]
fn part_to_be_played() {
    let Ok(part) = std::env::var(PART) else { return };
    let store = Store::start();
    println!("store={}", store.place().name());
    match part.as_str() {
        "panic" => panic!("as asked"),
        _ => std::thread::sleep(SOON),
    }
}

fn assert_nothing_left(name: &str) {
    let segment = format!("/dev/shm/kvs-{name}");
    let run = name.rsplit_once('-').expect("a run and a count").0;
    let directory = std::env::temp_dir().join(format!("kvs-{run}"));
    eventually("nothing is left of the store", SOON, || {
        of_store(name).is_empty() && !Path::new(&segment).exists() && !directory.exists()
    });
}

#[test]
fn test_that_panics_leaves_nothing_behind() {
    let (mut child, name) = play("panic");
    assert!(!child.wait().expect("ended").success());
    assert_nothing_left(&name);
}

#[test]
fn test_killed_leaves_nothing_behind() {
    let (mut child, name) = play("wait");
    assert!(!of_store(&name).is_empty(), "the store runs");
    child.kill().expect("killed");
    child.wait().expect("ended");
    assert_nothing_left(&name);
}
