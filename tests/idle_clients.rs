//! The promise: clients that are connected and silent cost the busy ones nothing, and little memory.
//!
//! Method: thousands of connections are opened and welcomed; then others are served, and in the end each of the silent ones. The
//! share of throughput that busy clients keep beside 10,000 idle ones is a measurement, run by hand:
//! `cargo test --release -p kvs-harness --test idle_clients -- --ignored --nocapture`.

use std::thread;
use std::time::{Duration, Instant};

use kvs_harness::connection::{Answer, Connection, get, increment, set};
use kvs_harness::store::{Launch, Store};

fn idle_clients(store: &Store, count: usize) -> Vec<Connection> {
    (0..count).map(|which| if which % 4 == 0 { store.connect_unix() } else { store.connect() }).collect()
}

#[test]
fn idle_clients_by_the_thousand_are_all_kept_and_served() {
    const IDLE: usize = 3_000;
    let store = Store::start();
    let before = store.segment_memory();
    let mut idle = idle_clients(&store, IDLE);
    let each = (store.segment_memory() - before) / IDLE as u64;
    assert!(each < 4_096, "an idle connection holds {each} bytes of the segment");
    let mut busy: Vec<Connection> = (0..20).map(|_| store.connect()).collect();
    for _ in 0..200 {
        for client in &mut busy {
            let answer = client.ask(&increment(b"busy", 1)).expect("counted");
            assert!(matches!(answer, Answer::Number(_)), "{answer:?}");
        }
    }
    for (which, client) in idle.iter_mut().enumerate() {
        assert_eq!(client.ask(&get(b"busy")).expect("read"), Answer::Value(b"4000".to_vec()), "idle {which}");
    }
}

#[test]
fn idle_clients_after_a_large_request_give_its_buffers_back() {
    let store = Launch::new().capacity("64MiB").start();
    let value = vec![3; 200_000];
    let mut clients = idle_clients(&store, 500);
    let before = store.segment_memory();
    for client in &mut clients {
        assert_eq!(client.ask(&set(b"large", &value)).expect("stored"), Answer::Stored);
        assert!(client.ask(&get(b"large")).expect("read") == Answer::Value(value.clone()));
    }
    let grown = store.segment_memory().saturating_sub(before);
    assert!(grown < 16 << 20, "500 idle clients left {} MiB reserved", grown >> 20);
}

/// What 100 busy clients do in five seconds, in batches of 16, as requests a second.
fn throughput(store: &Store) -> f64 {
    const BUSY: usize = 100;
    const THREADS: usize = 2;
    let end = Instant::now() + Duration::from_secs(5);
    let start = Instant::now();
    let requests: u64 = thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|_| {
                let clients: Vec<Connection> = (0..BUSY / THREADS).map(|_| store.connect()).collect();
                scope.spawn(move || keep_busy(clients, end))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("load")).sum()
    });
    requests as f64 / start.elapsed().as_secs_f64()
}

/// Sends a batch on every connection, then takes all answers, until `end`.
fn keep_busy(mut clients: Vec<Connection>, end: Instant) -> u64 {
    const BATCH: u64 = 16;
    let mut done = 0;
    while Instant::now() < end {
        for client in &mut clients {
            (0..BATCH).for_each(|number| {
                let key = [b'k', number as u8];
                _ = if number.is_multiple_of(2) {
                    client.queue(&set(&key, &[1; 32]))
                } else {
                    client.queue(&get(&key))
                }
            });
            client.flush().expect("sent");
        }
        for client in &mut clients {
            for _ in 0..BATCH {
                client.receive().expect("answered");
                done += 1;
            }
        }
    }
    done
}

#[test]
#[ignore = "a measurement: a minute on a quiet machine"]
fn busy_clients_beside_ten_thousand_idle_ones_are_measured() {
    let store = Launch::new().option("--max-connections", "12000").start();
    let mut ratios = Vec::new();
    for round in 1..=3 {
        let alone = throughput(&store);
        let idle = idle_clients(&store, 10_000);
        let beside = throughput(&store);
        drop(idle);
        println!(
            "round {round}: alone {alone:.0}/s, beside 10,000 idle {beside:.0}/s, {:.3}",
            beside / alone
        );
        ratios.push(beside / alone);
    }
    ratios.sort_by(f64::total_cmp);
    assert!(ratios[1] > 0.8, "the busy clients keep only {:.2} of what they get alone", ratios[1]);
}
