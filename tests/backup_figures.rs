//! What the backup file costs, measured; run by hand on a quiet machine:
//! `cargo test --release -p kvs-harness --test backup_figures -- --ignored --nocapture --test-threads 1`.
//!
//! Method: whole stores side by side in one run, in rounds, medians of the rounds. Where redis-server is installed, it does the
//! same beside.

use std::fs;
use std::io::{BufWriter, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use kvs_core::wire::RequestBody;
use kvs_harness::connection::{Answer, Connection, set};
use kvs_harness::store::{Launch, Store};
use kvs_harness::wait::eventually;
use rustix::process::Signal;

const ROUNDS: usize = 5;
const CONNECTIONS: usize = 8;
const PIPELINE: usize = 16;
const ROUND: Duration = Duration::from_secs(4);
const KEYS: u64 = 1_000_000;

fn key_of(number: u64) -> String {
    format!("key:{number:012}")
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Writes for a while over several connections; returns writes a second.
fn write_for(store: &Store, duration: Duration) -> f64 {
    let begun = Instant::now();
    let count: u64 = thread::scope(|scope| {
        let writers: Vec<_> = (0..CONNECTIONS)
            .map(|index| {
                let mut client = store.connect();
                scope.spawn(move || write(&mut client, index as u64, begun + duration))
            })
            .collect();
        writers.into_iter().map(|writer| writer.join().expect("a writer")).sum()
    });
    count as f64 / begun.elapsed().as_secs_f64()
}

fn write(client: &mut Connection, seed: u64, until: Instant) -> u64 {
    let (mut count, mut number) = (0, seed * 7_919);
    while Instant::now() < until {
        for _ in 0..PIPELINE {
            number = (number * 6_364_136_223 + 1) % KEYS;
            client.queue(&set(key_of(number).as_bytes(), &[7; 32]));
        }
        client.flush().expect("sent");
        for _ in 0..PIPELINE {
            assert_eq!(client.receive().expect("served").1, Answer::Stored);
        }
        count += PIPELINE as u64;
    }
    count
}

#[test]
#[ignore = "a measurement: two minutes on a quiet machine"]
fn backup_throughput_of_each_durability_is_measured() {
    let modes = ["os", "interval=1s", "always"];
    let stores: Vec<Store> = modes
        .iter()
        .map(|mode| Launch::new().capacity("1GiB").option("--durability", mode).start())
        .collect();
    let mut rates = vec![Vec::new(); modes.len()];
    for round in 0..ROUNDS {
        for turn in 0..stores.len() {
            // The first is not always the same one.
            let index = (turn + round) % stores.len();
            rates[index].push(write_for(&stores[index], ROUND));
        }
    }
    println!("writes of 16 + 32 bytes, {CONNECTIONS} connections, {PIPELINE} at once, {KEYS} keys");
    for (mode, rates) in modes.iter().zip(rates) {
        let all: Vec<String> = rates.iter().map(|rate| format!("{:.0}k", rate / 1e3)).collect();
        println!("{mode:12} {:8.0} writes/s    {}", median(rates), all.join(" "));
    }
}

fn fill(store: &Store, entries: u64) {
    let mut client = store.connect();
    for first in (0..entries).step_by(64) {
        for number in first..entries.min(first + 64) {
            client.queue(&set(key_of(number).as_bytes(), &[7; 32]));
        }
        client.flush().expect("sent");
        for _ in first..entries.min(first + 64) {
            assert_eq!(client.receive().expect("served").1, Answer::Stored);
        }
    }
}

/// An append-only file with the same entries.
fn write_append_only_file(directory: &Path, entries: u64) {
    let mut file = BufWriter::new(fs::File::create(directory.join("appendonly.aof")).expect("made"));
    let value = [b'7'; 32];
    for number in 0..entries {
        write!(file, "*3\r\n$3\r\nSET\r\n$16\r\n{}\r\n$32\r\n", key_of(number)).expect("room");
        file.write_all(&value).expect("room");
        file.write_all(b"\r\n").expect("room");
    }
    file.flush().expect("room");
}

struct Redis(Child);

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Time until redis-server answers with all data; None when there is none.
fn load_redis(directory: &Path) -> Option<Duration> {
    let port = TcpListener::bind("127.0.0.1:0").ok()?.local_addr().ok()?.port();
    let begun = Instant::now();
    let mut command = Command::new("redis-server");
    command.args(["--appendonly", "yes", "--save", "", "--port", &port.to_string(), "--dir"]).arg(directory);
    let _server = Redis(command.stdout(Stdio::null()).spawn().ok()?);
    eventually("redis has loaded", Duration::from_secs(300), || {
        let Ok(mut socket) = TcpStream::connect(("127.0.0.1", port)) else { return false };
        let mut answer = [0; 5];
        socket.write_all(b"PING\r\n").is_ok() && socket.read_exact(&mut answer).is_ok() && &answer == b"+PONG"
    });
    Some(begun.elapsed())
}

#[test]
#[ignore = "a measurement: ten minutes on a quiet machine, 4 GiB of disk"]
fn backup_loading_is_measured_beside_redis() {
    let entries = std::env::var("ENTRIES").ok().and_then(|text| text.parse().ok()).unwrap_or(10_000_000);
    let launch = Launch::new().capacity("2GiB").option("--durability", "os");
    let mut store = launch.start();
    fill(&store, entries);
    let redis = tempfile::tempdir().expect("a directory");
    write_append_only_file(redis.path(), entries);
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        let (place, launch, _) = store.end(Signal::TERM);
        fs::remove_file(place.segment()).expect("a segment");
        store = launch.start_at(place);
        assert_eq!((store.ready().start.as_str(), store.ready().entries), ("loaded", entries));
        ours.push(store.ready().took_us as f64 / 1e6);
        theirs.extend(load_redis(redis.path()).map(|took| took.as_secs_f64()));
    }
    let cores = thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let rate = |seconds: f64| entries as f64 / seconds / 1e6;
    let took = median(ours.clone());
    println!("{entries} entries of 16 + 32 bytes, {cores} cores, from start to ready");
    println!(
        "kvs    {took:6.2} s  {:.2} million/s, {:.2} a core   {ours:.2?}",
        rate(took),
        rate(took) / cores as f64
    );
    if !theirs.is_empty() {
        let took = median(theirs.clone());
        println!("redis  {took:6.2} s  {:.2} million/s   {theirs:.2?}", rate(took));
    }
}

/// What `count` clients take to write one value each and have it acknowledged, and then to be gone when they end while they wait
/// for that, in seconds.
fn crowd(store: &Store, count: usize) -> (f64, f64) {
    let mut observer = store.connect();
    let mut clients: Vec<Connection> = (0..count).map(|_| store.connect()).collect();
    let write_each = |clients: &mut [Connection]| {
        for (number, client) in clients.iter_mut().enumerate() {
            client.queue(&set(key_of(number as u64).as_bytes(), &[7; 32]));
            client.flush().expect("sent");
        }
    };
    let rounds = (0..ROUNDS).map(|_| {
        let begun = Instant::now();
        write_each(&mut clients);
        for client in &mut clients {
            assert_eq!(client.receive().expect("served").1, Answer::Stored);
        }
        begun.elapsed().as_secs_f64()
    });
    let round = median(rounds.collect());
    write_each(&mut clients);
    drop(clients);
    let begun = Instant::now();
    let are_gone = || connections(&mut observer) == 1;
    eventually("the clients are gone", Duration::from_secs(20), are_gone);
    (round, begun.elapsed().as_secs_f64())
}

/// How many are connected, the observer among them.
fn connections(observer: &mut Connection) -> u64 {
    let Answer::Stats(all) = observer.ask(&RequestBody::Stats).expect("served") else {
        panic!("no statistics")
    };
    all.into_iter().find_map(|(name, value)| value.filter(|_| name == "connections")).expect("counted")
}

/// Processor time of the data server so far, in milliseconds, in steps of ten.
fn processor_time(store: &Store) -> u64 {
    let stat =
        fs::read_to_string(format!("/proc/{}/stat", store.data_pid().as_raw_nonzero())).expect("it runs");
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    fields.skip(11).take(2).map(|ticks| ticks.parse::<u64>().expect("a number") * 10).sum()
}

#[test]
#[ignore = "a measurement"]
fn crowds_that_wait_for_the_disk_are_measured() {
    let launch = Launch::new().capacity("1GiB").option("--durability", "always").option("--workers", "1");
    let store = launch.start();
    for count in [500, 5_000] {
        let before = processor_time(&store);
        let (round, gone) = crowd(&store, count);
        println!(
            "{count} clients: {:.1} ms for one write of each, {:.1} ms until all are gone; {} ms of processor in all",
            round * 1e3,
            gone * 1e3,
            processor_time(&store) - before
        );
    }
}
