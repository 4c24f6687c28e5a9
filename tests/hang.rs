//! The promise: a server that stands still is killed and replaced within the hang time-out, and one that works never is.
//!
//! Method: real SIGSTOPs with a short time-out; a worker's turn is made to look like one that stands still. Waits longer than the
//! time-out are what is tried here, not hoped for.

#[allow(dead_code, reason = "shared with the tests of death, which hold the journals against the store")]
mod journal;

use std::fs::File;
use std::mem::offset_of;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use journal::{Journal, Writer};
use kvs_core::segment::layout::{Regions, WorkerSlot};
use kvs_harness::connection::{Answer, Connection, get, set};
use kvs_harness::processes::{Paused, of_store, send};
use kvs_harness::random::{Random, seed};
use kvs_harness::store::{Launch, Place, Store};
use kvs_harness::wait::{SOON, eventually, eventually_some};
use rustix::process::Signal;

#[test]
fn front_stopped_is_killed_and_replaced_within_the_timeout() {
    let store = Launch::new().option("--hang-timeout", "500ms").start();
    let mut before = store.connect();
    let hung = store.front_pid();
    send(hung, Signal::STOP);
    eventually("the one that hangs is dead", SOON, || !of_store(store.place().name()).contains(&hung));
    store.new_client();
    assert_eq!(before.ask(&set(b"served", b"on")).expect("served"), Answer::Stored);
    assert!(store.place().log().contains("the front server has stood still for 500ms"));
    assert_eq!(store.place().statistics()["front_restarts"], 1);
}

#[test]
fn data_stopped_is_killed_and_replaced_within_the_timeout() {
    let store = Launch::new().option("--hang-timeout", "500ms").start();
    assert_eq!(store.connect().ask(&set(b"kept", b"yes")).expect("stored"), Answer::Stored);
    for _ in 0..2 {
        let hung = store.data_pid();
        send(hung, Signal::STOP);
        let mut next = store.new_client();
        assert_eq!(next.ask(&get(b"kept")).expect("read"), Answer::Value(b"yes".to_vec()));
        assert_ne!(store.data_pid(), hung);
        // The next one is stopped under a front server that did not launch it.
        store.kill_front();
        store.new_client();
    }
    assert!(store.place().log().contains("has stood still for 500ms"));
}

#[test]
fn servers_that_work_are_not_taken_for_hung() {
    let store = Launch::new().option("--hang-timeout", "1s").start();
    let servers = [store.front_pid(), store.data_pid()];
    let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut journal = Journal::new(0, &mut Random::new(seed()));
    thread::scope(|scope| {
        let writer = Writer::new(store.ready(), &mut journal, &stop, &written);
        scope.spawn(|| writer.run());
        // Much longer than the time-out: it is what is tried here.
        thread::sleep(Duration::from_millis(3_500));
        stop.store(true, Ordering::Relaxed);
    });
    assert!(written.load(Ordering::Relaxed) > 0);
    assert_eq!([store.present_front_pid(), store.data_pid()], servers, "{}", store.place().log());
}

#[test]
fn worker_that_does_not_get_on_is_a_hang_of_the_data_server() {
    let store = Launch::new().option("--hang-timeout", "500ms").option("--workers", "1").start();
    assert_eq!(store.connect().ask(&set(b"kept", b"yes")).expect("stored"), Answer::Stored);
    let hung = store.data_pid();
    // What a worker that stands still in its turn leaves there; an idle one does not touch it.
    let segment = File::options().read(true).write(true).open(store.place().segment()).expect("a segment");
    let capacity = 256 << 20;
    let turn = Regions::new(capacity).worker(0).bytes() + offset_of!(WorkerSlot, turn) as u64;
    let mut word = [0; 8];
    eventually("the worker is idle", SOON, || {
        segment.read_exact_at(&mut word, turn).expect("read");
        u64::from_le_bytes(word).is_multiple_of(2)
    });
    segment.write_all_at(&(u64::from_le_bytes(word) + 1).to_le_bytes(), turn).expect("written");
    eventually("the one that hangs is dead", SOON, || !of_store(store.place().name()).contains(&hung));
    assert_eq!(store.new_client().ask(&get(b"kept")).expect("read"), Answer::Value(b"yes".to_vec()));
    assert!(store.place().log().contains("worker 0 has not got on for 500ms"), "{}", store.place().log());
}

#[test]
fn both_stopped_and_continued_are_not_taken_for_hung() {
    let store = Launch::new().option("--hang-timeout", "2s").start();
    let servers = [store.front_pid(), store.data_pid()];
    let paused = servers.map(Paused::new);
    // Longer than the time-out: it is what is tried here.
    thread::sleep(Duration::from_millis(2_500));
    drop(paused);
    thread::sleep(Duration::from_millis(500));
    store.new_client();
    assert_eq!([store.present_front_pid(), store.data_pid()], servers, "{}", store.place().log());
}

#[test]
fn front_that_hangs_while_a_signal_asks_for_the_end_is_killed_and_the_store_ends() {
    let store = Launch::new().option("--hang-timeout", "500ms").start();
    send(store.front_pid(), Signal::STOP);
    send(store.data_pid(), Signal::TERM);
    store.await_end().0.assert_ended_in_order();
}

#[test]
fn one_that_hangs_while_the_other_dies_is_continued_by_the_kernel_and_goes_on() {
    // Whoever was launched by the one that dies is continued; SIGHUP may come too, and is no reason to end.
    let store = Store::start();
    send(store.data_pid(), Signal::STOP);
    store.kill_front();
    store.new_client();
    assert_eq!(store.data_pid(), store.ready().data);
    send(store.present_front_pid(), Signal::STOP);
    store.kill_data();
    store.new_client();
    assert_eq!(store.place().statistics()["front_restarts"], 1);
}

#[test]
fn front_that_hangs_at_its_start_is_killed_and_launched_again() {
    let place = Place::new();
    let store = place.launch_of_copies().option("--hang-timeout", "500ms").start_at(place);
    let mut before = store.connect();
    store.place().replace_by_script("kvs-front", "#!/bin/sh\nexec sleep 600\n");
    store.kill_front();
    eventually("it is noticed", SOON, || store.place().log().contains("has stood still at its start"));
    assert_eq!(before.ask(&set(b"served", b"on")).expect("served"), Answer::Stored);
    store.place().put_back("kvs-front");
    store.new_client();
}

#[test]
fn hang_timeout_of_zero_takes_nobody_for_hung() {
    let store = Launch::new().option("--hang-timeout", "0s").start();
    let mut before = store.connect();
    let paused = Paused::new(store.front_pid());
    assert_eq!(before.ask(&set(b"served", b"on")).expect("served"), Answer::Stored);
    thread::sleep(Duration::from_millis(500));
    drop(paused);
    store.kill_front();
    store.new_client();
    store.kill_data();
    store.new_client();
}

#[test]
fn front_is_not_stopped_by_the_terminal() {
    let store = Store::start();
    for _ in 0..2 {
        send(store.present_front_pid(), Signal::TSTP);
        eventually("it says so", SOON, || store.place().log().contains("Ctrl-Z is ignored"));
        store.new_client();
        store.kill_front();
        store.new_client();
    }
    assert_eq!(store.place().statistics()["front_restarts"], 2);
}

/// Figures for the report: run with `cargo test --release -p kvs-harness --test hang -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement: needs a quiet machine and takes minutes"]
fn times_from_a_kill_or_a_stop_to_serving_again_are_measured() {
    for clients in [0, 1_000, 9_000] {
        let store = Store::start();
        let _held: Vec<Connection> = (0..clients).map(|_| store.connect()).collect();
        let times = (0..100).map(|_| time_to_new_client(&store, "kvs-front", Signal::KILL));
        report(&format!("front killed, {clients} clients: new one served"), times);
        let mut served = store.connect();
        for (what, kill) in [("front killed", true), ("nobody killed", false)] {
            let times = (0..100).map(|_| longest_answer(&store, &mut served, kill));
            report(&format!("{what}, {clients} clients: longest answer of one served in 30 ms"), times);
        }
    }
    let store = Launch::new().option("--hang-timeout", "1s").start();
    for program in ["kvs-front", "kvs-data"] {
        let times = (0..30).map(|_| time_to_new_client(&store, program, Signal::STOP));
        report(&format!("{program} stopped, --hang-timeout 1s: new one served"), times);
    }
}

fn time_to_new_client(store: &Store, program: &str, signal: Signal) -> Duration {
    thread::sleep(Duration::from_millis(100));
    let pid = eventually_some("the server runs", SOON, || store.find(program));
    send(pid, signal);
    let start = Instant::now();
    store.new_client();
    start.elapsed()
}

/// The longest of the answers in a short time, around the front server's death if it is to be killed.
fn longest_answer(store: &Store, served: &mut Connection, kill: bool) -> Duration {
    thread::sleep(Duration::from_millis(50));
    let front = store.present_front_pid();
    if kill {
        send(front, Signal::KILL);
    }
    let start = Instant::now();
    let mut longest = Duration::ZERO;
    while start.elapsed() < Duration::from_millis(30) {
        let asked = Instant::now();
        served.ask(&get(b"any")).expect("served on");
        longest = longest.max(asked.elapsed());
    }
    longest
}

fn report(what: &str, times: impl Iterator<Item = Duration>) {
    let mut times: Vec<Duration> = times.collect();
    times.sort();
    let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize];
    println!(
        "{what}: median {:?}, p99 {:?}, longest {:?}, {} times",
        at(0.5),
        at(0.99),
        at(1.0),
        times.len()
    );
}
