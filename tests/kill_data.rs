//! The promise: the data server is killed with SIGKILL at any moment, again and again, under load, and every acknowledged write
//! is there, nothing runs twice, and the segment is sound.
//!
//! Method: writers over TCP and unix sockets send batches and keep a journal of their own of what was acknowledged and what is in
//! doubt: sent when the connection was lost. Each key has one writer, so its values come in order. After a number of kills the
//! writers pause, the journals are held against the store, and `kvs-tools check` verifies the segment. `KVS_KILLS` sets how many
//! kills (100 in a normal run), `KVS_SEED` repeats one. The time from each kill to the first answer on a new connection is printed.

mod journal;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use journal::{Journal, Writer};
use kvs_harness::connection::{Connection, get};
use kvs_harness::random::{Random, seed};
use kvs_harness::store::{Launch, Store};
use kvs_harness::wait::{SetOnDrop, eventually};
use rustix::process::Signal;

const WRITERS: u64 = 6;
const KILLS_A_PHASE: usize = 25;

#[test]
fn data_server_killed_under_load_keeps_every_acknowledged_write() {
    let kills = kills(100);
    let mut random = Random::new(seed());
    let store = Launch::new().capacity("512MiB").start();
    let mut journals: Vec<Journal> = (0..WRITERS).map(|which| Journal::new(which, &mut random)).collect();
    let mut recoveries = Vec::new();
    while recoveries.len() < kills {
        let phase = KILLS_A_PHASE.min(kills - recoveries.len());
        recoveries.extend(kill_under_load(&store, &mut journals, phase, &mut random));
        verify(&store, &journals);
        check_segment(&store);
    }
    report("kill to first answer on a new connection", &mut recoveries);
    let acknowledged: u64 = journals.iter().map(Journal::acknowledged).sum();
    let in_doubt: u64 = journals.iter().map(Journal::in_doubt).sum();
    println!("{kills} kills, {acknowledged} writes acknowledged, {in_doubt} in doubt");
    let store = store.restart();
    assert_eq!(store.ready().start, "attached");
    verify(&store, &journals);
    check_segment(&store);
}

fn kills(default: usize) -> usize {
    std::env::var("KVS_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Kills the data server `kills` times while all writers write, and returns how long it took each time until a new
/// connection had an answer.
fn kill_under_load(
    store: &Store,
    journals: &mut [Journal],
    kills: usize,
    random: &mut Random,
) -> Vec<Duration> {
    let stop = AtomicBool::new(false);
    let written = AtomicU64::new(0);
    thread::scope(|scope| {
        for journal in journals.iter_mut() {
            let writer = Writer::new(store.ready(), journal, &stop, &written);
            scope.spawn(move || writer.run());
        }
        let stop_at_end = SetOnDrop(&stop);
        let recoveries = (0..kills)
            .map(|_| {
                let before = written.load(Ordering::Relaxed);
                eventually("the writers get on", Duration::from_secs(30), || {
                    written.load(Ordering::Relaxed) > before
                });
                thread::sleep(Duration::from_micros(random.below(30_000)));
                kill_and_time(store)
            })
            .collect();
        drop(stop_at_end);
        recoveries
    })
}

fn kill_and_time(store: &Store) -> Duration {
    let dead = store.kill_data();
    let start = Instant::now();
    let end = start + Duration::from_secs(30);
    loop {
        // The connection may still reach the dying server's queue; then it is lost and the next one counts.
        let answered = Connection::welcomed_tcp(store.ready().tcp).and_then(|mut new| new.ask(&get(b"any")));
        if answered.is_ok() {
            let took = start.elapsed();
            assert_ne!(store.data_pid(), dead, "another data server answers");
            return took;
        }
        assert!(Instant::now() < end, "no answer after a kill: {answered:?}\n{}", store.place().log());
    }
}

fn verify(store: &Store, journals: &[Journal]) {
    let mut connection = store.connect_unix();
    let faults: Vec<String> =
        journals.iter().flat_map(|journal| journal.faults(&mut connection)).take(20).collect();
    assert!(faults.is_empty(), "after the kills:\n{}", faults.join("\n"));
}

fn check_segment(store: &Store) {
    let check = store.place().tools_by_name(&["check"]);
    assert!(
        check.status.success(),
        "kvs-tools check: {}\n{}{}",
        check.status,
        String::from_utf8_lossy(&check.stdout),
        String::from_utf8_lossy(&check.stderr)
    );
}

fn report(what: &str, times: &mut [Duration]) {
    times.sort();
    let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize];
    println!(
        "{what}: median {:?}, p90 {:?}, p99 {:?}, longest {:?}, {} times",
        at(0.5),
        at(0.9),
        at(0.99),
        at(1.0),
        times.len()
    );
}

#[test]
fn data_server_that_dies_before_it_serves_anybody_is_replaced() {
    let store = Store::start();
    for _ in 0..10 {
        store.kill_data();
    }
    eventually("a client is served", Duration::from_secs(30), || {
        Connection::welcomed_tcp(store.ready().tcp).and_then(|mut new| new.ask(&get(b"any"))).is_ok()
    });
}

#[test]
fn whole_store_killed_and_started_again_keeps_every_acknowledged_write() {
    let mut random = Random::new(seed());
    let mut journals: Vec<Journal> = (0..WRITERS).map(|which| Journal::new(which, &mut random)).collect();
    let mut store = Launch::new().capacity("512MiB").start();
    for _ in 0..5 {
        let stop = AtomicBool::new(false);
        let written = AtomicU64::new(0);
        thread::scope(|scope| {
            for journal in &mut journals {
                let writer = Writer::new(store.ready(), journal, &stop, &written);
                scope.spawn(move || writer.run());
            }
            let stop_at_end = SetOnDrop(&stop);
            eventually("the writers get on", Duration::from_secs(30), || {
                written.load(Ordering::Relaxed) > 1_000
            });
            kvs_harness::processes::kill_store(store.place().name());
            drop(stop_at_end);
        });
        let (place, launch, _) = store.end(Signal::TERM);
        store = launch.start_at(place);
        assert_eq!(store.ready().start, "attached");
        verify(&store, &journals);
        check_segment(&store);
    }
}

/// Figures for the report: run with `cargo test --release -p kvs-harness --test kill_data -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement: needs 2 GiB of memory and a quiet machine"]
fn recovery_time_with_few_and_many_entries_is_measured() {
    let sizes = [10_000, 10_000_000];
    let stores = sizes.map(|entries| {
        let store = Launch::new().capacity("1GiB").start();
        journal::fill(&mut store.connect_unix(), entries);
        store
    });
    // In turn, so that whatever else the machine does meets both.
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..kills(200) {
        for (store, times) in stores.iter().zip(&mut times) {
            thread::sleep(Duration::from_millis(20));
            times.push(kill_and_time(store));
        }
    }
    for (entries, times) in sizes.iter().zip(&mut times) {
        report(&format!("{entries} entries, kill to first answer"), times);
    }
}
