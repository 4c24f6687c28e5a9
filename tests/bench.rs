//! The promise of `kvs-tools bench`: it measures what it says, keeps what it was told to, and leaves nothing behind, whatever way it
//! ends.
//!
//! Method: runs of fractions of a second, in a temporary directory of their own; then what they wrote is read, and what they started
//! is looked for by its mark, its name and its directory. Figures are not judged: a test machine is busy.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use kvs_harness::processes::{of_store, send};
use kvs_harness::store::{Place, Store};
use kvs_harness::wait::{SOON, eventually};
use rustix::process::{Pid, Signal};
use serde_json::Value;

/// The shortest run that measures something.
const TINY: [&str; 10] =
    ["--duration", "100ms", "--warm-up", "20ms", "--rounds", "2", "--keys", "300", "--connections", "4"];

/// `bench` in a directory of its own for all that is temporary.
fn bench(place: &Place, arguments: &[&str]) -> Command {
    let temporary = temporary(place);
    fs::create_dir_all(&temporary).expect("a directory");
    let mut command = place_tools(place);
    command.arg("bench").args(arguments).env("TMPDIR", temporary).current_dir(place.directory());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// `kvs-tools` that names no store.
fn place_tools(place: &Place) -> Command {
    let mut command = Command::new(kvs_harness::binaries::program("kvs-tools"));
    command.env(kvs_harness::processes::MARK, place.name()).arg("--json").stdin(Stdio::null());
    command
}

fn temporary(place: &Place) -> PathBuf {
    place.directory().join("tmp")
}

fn run(place: &Place, arguments: &[&str]) -> Output {
    bench(place, arguments).output().expect("kvs-tools can be started")
}

fn document(output: &Output) -> Value {
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {message}", output.status);
    serde_json::from_slice(&output.stdout).expect("one JSON document")
}

fn targets(case: &Value) -> Vec<&str> {
    let targets = case["targets"].as_array().expect("a list").iter();
    targets.map(|target| target["target"].as_str().expect("a name")).collect()
}

/// The segments that a run with this process id may have made.
fn segments(pid: u32) -> Vec<PathBuf> {
    let all = fs::read_dir("/dev/shm").expect("it can be read").flatten();
    let start = format!("kvs-bench-{pid}-");
    let own =
        |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&start));
    all.map(|entry| entry.path()).filter(own).collect()
}

fn assert_nothing_left(place: &Place, pid: u32) {
    assert_eq!(of_store(place.name()), [], "processes are left");
    assert_eq!(segments(pid), Vec::<PathBuf>::new());
    let left: Vec<_> = fs::read_dir(temporary(place)).expect("it can be read").flatten().collect();
    assert!(left.is_empty(), "{left:?}");
}

/// The cases of these scenarios, measured for so long, in a run that leaves nothing behind.
fn measured_once(place: &Place, scenarios: &str, duration: &str) -> Vec<Value> {
    let what = ["--scenario", scenarios, "--duration", duration];
    let tiny = ["--warm-up", "5ms", "--rounds", "1", "--keys", "300"];
    let child = bench(place, &[&what[..], &tiny].concat()).spawn().expect("started");
    let pid = child.id();
    let mut found = document(&child.wait_with_output().expect("its output"));
    assert_nothing_left(place, pid);
    let Value::Array(cases) = found["cases"].take() else { panic!("no list: {found}") };
    cases
}

/// Waits until a run has made a segment, so that all it does is under way.
fn await_store(bench: &Child) {
    eventually("the run has a store", SOON, || !segments(bench.id()).is_empty());
}

fn signal(bench: &Child, signal: Signal) {
    send(Pid::from_raw(bench.id() as i32).expect("a process id"), signal);
}

#[test]
fn bench_run_is_kept_as_a_folder_and_leaves_nothing() {
    let place = Place::new();
    let arguments =
        ["--scenario", "tcp,single", "--targets", "kvs-tcp,null-tcp,kvs-unix,null-unix", "--output", "run"];
    let child = bench(&place, &[&arguments[..], &TINY].concat()).spawn().expect("started");
    let pid = child.id();
    let found = document(&child.wait_with_output().expect("its output"));
    let cases = found["cases"].as_array().expect("a list");
    assert_eq!(cases.len(), 2);
    assert_eq!(targets(&cases[0]), ["kvs-tcp", "null-tcp"]);
    assert_eq!(targets(&cases[1]), ["kvs-unix", "null-unix"]);
    for target in cases.iter().flat_map(|case| case["targets"].as_array().expect("a list")) {
        assert_eq!(target["values"].as_array().map(Vec::len), Some(2), "{target}");
        assert!(target["median"].as_f64().is_some_and(|rate| rate > 0.0), "{target}");
        assert!(target["latency_ns"]["p99.9"].as_u64().is_some_and(|latency| latency > 0), "{target}");
    }
    assert!(
        cases[0]["claims"][0]["claim"].as_str().is_some_and(|claim| claim.contains("null-tcp")),
        "{found}"
    );
    assert_folder(&place.directory().join("run"), &found);
    assert_nothing_left(&place, pid);
}

fn assert_folder(folder: &Path, found: &Value) {
    let read =
        |name: &str| fs::read_to_string(folder.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert_eq!(serde_json::from_str::<Value>(&read("results.json")).expect("JSON"), *found);
    assert!(read("command.txt").starts_with("kvs-tools --json bench --scenario tcp,single "));
    assert!(read("machine.txt").contains("kernel: "));
    assert!(read("versions.txt").contains("kvs-data: kvs-data "));
    // Two targets in two cases, two rounds, and the names of the columns.
    assert_eq!(read("rounds.csv").lines().count(), 9);
    assert!(read("latency.csv").contains("\ntcp,null-tcp,"));
    assert!(read("latency.svg").contains(">kvs-unix</text>"));
    assert!(read("README.md").contains("| null-unix |"));
}

#[test]
fn bench_peers_are_measured_or_said_to_be_missing() {
    let place = Place::new();
    let arguments =
        ["--targets", "kvs-tcp,redis-tcp,memcached", "--pipeline", "4", "--distribution", "zipfian"];
    let found = document(&run(&place, &[&arguments[..], &TINY].concat()));
    let case = &found["cases"][0];
    let missing = case["missing"].to_string();
    for (target, program) in [("redis-tcp", "redis-server"), ("memcached", "memcached")] {
        assert!(
            targets(case).contains(&target) || missing.contains(&format!("{program} is not here")),
            "{case}"
        );
    }
    // Without a PATH there are none.
    let mut alone = bench(&place, &[&arguments[..], &TINY].concat());
    let found = document(&alone.env("PATH", "").output().expect("started"));
    assert_eq!(targets(&found["cases"][0]), ["kvs-tcp"]);
    assert_eq!(found["cases"][0]["missing"].as_array().map(Vec::len), Some(2));
}

#[test]
fn bench_of_a_running_store_asks_that_one() {
    let store = Store::start();
    let mut command = place_tools(store.place());
    command.arg("--server").arg(store.ready().tcp.to_string()).args([
        "bench",
        "--targets",
        "kvs-tcp",
        "--rate",
        "2000",
    ]);
    let output = command.args(TINY).output().expect("started");
    let found = document(&output);
    assert_eq!(found["cases"][0]["rate"].as_f64(), Some(2000.0));
    let value = store.place().tools(&["get", "0000000000000042"]);
    assert_eq!(value.stdout.len(), 32, "{value:?}");
}

#[test]
fn bench_interrupted_ends_its_servers() {
    let place = Place::new();
    let arguments = ["--targets", "kvs-tcp,null-tcp", "--duration", "30s"];
    let child = bench(&place, &arguments).spawn().expect("started");
    let pid = child.id();
    await_store(&child);
    signal(&child, Signal::INT);
    let output = child.wait_with_output().expect("its output");
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("interrupted"), "{message}");
    assert_nothing_left(&place, pid);
}

#[test]
fn bench_killed_takes_its_servers_along() {
    let place = Place::new();
    let arguments = ["--targets", "kvs-tcp,null-tcp", "--duration", "30s"];
    let mut child = bench(&place, &arguments).spawn().expect("started");
    await_store(&child);
    signal(&child, Signal::KILL);
    child.wait().expect("ended");
    eventually("its servers are gone", SOON, || of_store(place.name()).is_empty());
    // Nobody was left to remove it.
    segments(child.id()).iter().for_each(|segment| fs::remove_file(segment).expect("removed"));
}

#[test]
fn bench_that_cannot_be_is_refused_before_anything_is_started() {
    let place = Place::new();
    for (arguments, status, why) in [
        (&["--scenario", "nonsense"][..], 64, "no scenario `nonsense`"),
        (&["--targets", "kvs-tcp,nonsense"], 64, "no target `nonsense`"),
        (&["--distribution", "nonsense"], 64, "zipfian"),
        (&["--output", "."], 1, "new folder"),
        (&["--connections", "50000000"], 64, "50000000"),
    ] {
        let output = run(&place, arguments);
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{arguments:?}: {message}");
        assert!(message.contains(why), "{arguments:?}: {message}");
    }
}

#[test]
fn bench_lists_its_scenarios() {
    let place = Place::new();
    let found = document(&run(&place, &["--list-scenarios"]));
    let names: Vec<&str> =
        found.as_array().expect("a list").iter().filter_map(|one| one["name"].as_str()).collect();
    for name in ["tcp", "unix", "tcp-pipeline-16", "tcp-pipeline-64", "values", "single", "writes-always"] {
        assert!(names.contains(&name), "{names:?}");
    }
}

#[test]
fn bench_local_readers_are_measured_beside_lmdb_and_memory_alone() {
    let place = Place::new();
    let cases = measured_once(&place, "local,local-many,local-zipfian", "20ms");
    assert_eq!(targets(&cases[0]), ["local", "lmdb", "chase", "chase-overlapped", "baseline"]);
    for target in cases.iter().flat_map(|case| case["targets"].as_array().expect("a list")) {
        assert!(target["median"].as_f64().is_some_and(|rate| rate > 0.0), "{target}");
    }
}

#[test]
fn bench_writer_beside_readers_memory_and_connections_are_measured() {
    let place = Place::new();
    for case in &measured_once(&place, "local-writer,memory,setup", "50ms") {
        // The peers may not be here.
        let own =
            targets(case).into_iter().filter(|name| name.starts_with("local") || name.starts_with("kvs"));
        assert!(own.count() > 0, "{case}");
        for target in case["targets"].as_array().expect("a list") {
            assert!(target["median"].as_f64().is_some_and(|figure| figure > 0.0), "{target}");
        }
    }
}
