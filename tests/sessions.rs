//! The promise: when all processes of the store die at once and it is started again, programs with the client libraries, Rust and C,
//! notice nothing but time: they connect again by themselves, repeat what was not answered, and each request is executed exactly
//! once and answered as if nothing had happened.
//!
//! Method: clients that know what each answer must be, because nobody else changes their keys, work while the store is killed and
//! started again on the same address, again and again. One wrong or failed answer ends the test. `KVS_KILLS` sets how many
//! kills, `KVS_SEED` repeats a run. Beside that, what a session does with two connections at once is asked on plain connections.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use kvs_client::{Answer, Client, ConnectOptions, Error};
use kvs_core::wire::{ErrorCode, RequestBody, SessionToken, SetCondition};
use kvs_harness::c_programs::{self, Library};
use kvs_harness::connection::{self as plain, Connection, increment};
use kvs_harness::processes::{self, kill_store, send};
use kvs_harness::random::{Random, seed};
use kvs_harness::store::{Launch, Place, Store};
use kvs_harness::wait::eventually;
use rustix::process::{Pid, Signal};

const SOON: Duration = Duration::from_secs(60);
const SHARED_COUNTER: &str = "counted by all";

/// An address for a store that is to be found there again. Not one of the ports that the kernel gives to clients: one of them might
/// have it when the store comes back.
fn lasting_address(random: &mut Random) -> SocketAddr {
    loop {
        let address = SocketAddr::from(([127, 0, 0, 1], random.between(12_000, 30_000) as u16));
        if TcpListener::bind(address).is_ok() {
            return address;
        }
    }
}

/// A store that is killed whole and started again in the same place and on the same address.
struct Phoenix {
    store: Option<Store>,
    launch: Launch,
}

impl Phoenix {
    fn start(launch: Launch, random: &mut Random) -> Self {
        let launch = launch.option("--listen", &lasting_address(random).to_string());
        Self { store: Some(launch.start()), launch }
    }

    fn store(&self) -> &Store {
        self.store.as_ref().expect("it runs")
    }

    /// Kills every process of it at once.
    fn kill(&mut self) -> Place {
        let store = self.store.take().expect("it runs");
        kill_store(store.place().name());
        store.end(Signal::TERM).0
    }

    fn start_again(&mut self, place: Place) {
        let store = self.launch.start_at(place);
        assert_eq!(store.ready().start, "attached");
        self.store = Some(store);
    }

    fn assert_sound(&self) {
        let check = self.store().place().tools_by_name(&["check"]);
        let said = [check.stdout, check.stderr].concat();
        assert!(check.status.success(), "kvs-tools check: {}", String::from_utf8_lossy(&said));
    }
}

/// What all clients of a storm share.
struct Storm {
    stop: AtomicBool,
    /// Requests answered.
    answered: AtomicU64,
    /// Of them increments of the shared counter.
    counted: AtomicU64,
}

impl Storm {
    const fn new() -> Self {
        Self { stop: AtomicBool::new(false), answered: AtomicU64::new(0), counted: AtomicU64::new(0) }
    }

    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    fn answered(&self, count: u64) {
        self.answered.fetch_add(count, Ordering::Relaxed);
    }
}

/// Ends the storm in a panic too: the scope would wait for its clients for ever.
struct EndOnDrop<'a>(&'a AtomicBool);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// One call after the other.
fn single_calls(client: &mut Client, name: &str, storm: &Storm) {
    let counter = format!("{name}: counter");
    let mut count = 0;
    while storm.goes_on() {
        let key = format!("{name}: {}", count % 50);
        let value = vec![b'v'; if count % 20 == 19 { 70_000 } else { count as usize % 300 }];
        assert!(client.set_if_absent(&key, &value).expect("answered"), "{name}: stored twice");
        assert!(!client.set_if_absent(&key, "other").expect("answered"), "{name}: not stored");
        assert_eq!(client.get(&key).expect("answered").as_ref(), Some(&value), "{name}");
        count += 1;
        assert_eq!(client.increment(&counter, 1).expect("answered"), count, "{name}");
        assert!(client.delete(&key).expect("answered"), "{name}: deleted twice");
        assert!(!client.delete(&key).expect("answered"), "{name}: not deleted");
        storm.answered(6);
    }
    let stored = client.get(&counter).expect("answered").expect("there");
    assert_eq!(stored, count.to_string().into_bytes(), "{name}");
}

/// Pipelines of every length, longer than what a session remembers too.
fn pipelines(client: &mut Client, name: &str, random: &mut Random, storm: &Storm) {
    let counter = format!("{name}: counter");
    let (mut count, mut round) = (0i64, 0u64);
    while storm.goes_on() {
        round += 1;
        let length = if random.once_in(5) { 2_000 } else { random.between(1, 100) };
        let mut pipeline = client.pipeline();
        for index in 0..length {
            let key = format!("{name}: {round} {index}");
            pipeline.increment(&counter, 1).set_if_absent(&key, "value").get(&key);
            pipeline.delete(&key).increment(SHARED_COUNTER, 1);
            if index % 400 == 399 {
                pipeline.set(&key, vec![b'l'; 50_000]).delete(&key);
            }
        }
        let mut answers = pipeline.run().expect("answered").into_iter();
        storm.answered(answers.len() as u64);
        storm.counted.fetch_add(length, Ordering::Relaxed);
        for index in 0..length {
            count += 1;
            let five: Vec<Answer> = answers.by_ref().take(5).collect();
            // A read that is repeated may see what came behind it in the pipeline.
            let as_it_must = matches!(&five[..], [
                Answer::Number(number), Answer::Stored, Answer::Value(_), Answer::Deleted(true), Answer::Number(_),
            ] if *number == count);
            assert!(as_it_must, "{name}: counted to {count} and got {five:?}");
            if index % 400 == 399 {
                let two: Vec<Answer> = answers.by_ref().take(2).collect();
                assert!(matches!(&two[..], [Answer::Stored, Answer::Deleted(true)]), "{name}: {two:?}");
            }
        }
    }
}

/// A program of `tests/c`, compiled. It is not one of the store's processes, which are killed.
fn c_program(store: &Store, name: &str, library: Library) -> Command {
    let program = c_programs::compile(&c_programs::source(name), store.place().directory(), library);
    let address = store.ready().tcp;
    let mut command = Command::new(program);
    command.args([address.ip().to_string(), address.port().to_string()]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// A C program that works until it is told to end.
fn start_c_program(store: &Store, first_key: u32, library: Library) -> Child {
    c_program(store, "once.c", library).arg(first_key.to_string()).spawn().expect("it runs")
}

/// Kills the programs that are left, in a panic too.
struct Programs(Vec<Child>);

impl Programs {
    /// Lets them end, and returns how many rounds they did together.
    fn end(mut self) -> u64 {
        let mut rounds = 0;
        for program in std::mem::take(&mut self.0) {
            send(Pid::from_child(&program), Signal::TERM);
            let output = program.wait_with_output().expect("it ends");
            assert!(
                output.status.success(),
                "{}\n{}",
                output.status,
                String::from_utf8_lossy(&output.stderr)
            );
            let said = String::from_utf8_lossy(&output.stdout);
            rounds += said.trim().parse::<u64>().expect("how many rounds");
        }
        rounds
    }
}

impl Drop for Programs {
    fn drop(&mut self) {
        for program in &mut self.0 {
            let _ = program.kill();
            let _ = program.wait();
        }
    }
}

fn storm(launch: Launch, kills: u64) {
    let mut random = Random::new(seed());
    let mut phoenix = Phoenix::start(launch, &mut random);
    let storm = Storm::new();
    let libraries = [Library::Shared, Library::Static];
    let programs = (1u32..)
        .zip(libraries)
        .map(|(program, library)| start_c_program(phoenix.store(), program * 1_000_000, library));
    let programs = Programs(programs.collect());
    let (tcp, unix) = (phoenix.store().address(), phoenix.store().unix_address());
    thread::scope(|scope| {
        let _end = EndOnDrop(&storm.stop);
        for (index, address) in [&tcp, &unix, &tcp, &unix].into_iter().enumerate() {
            let (storm, mut random) = (&storm, Random::new(random.number()));
            let mut client = Client::connect(address).expect("the store is there");
            let name = format!("client {index}");
            scope.spawn(move || {
                let _end = EndOnDrop(&storm.stop);
                if index < 2 {
                    single_calls(&mut client, &name, storm);
                } else {
                    pipelines(&mut client, &name, &mut random, storm);
                }
            });
        }
        for _ in 0..kills {
            let before = storm.answered.load(Ordering::Relaxed);
            eventually("the clients get on", SOON, || {
                storm.answered.load(Ordering::Relaxed) > before + 200 || !storm.goes_on()
            });
            assert!(storm.goes_on(), "a client has failed");
            thread::sleep(Duration::from_micros(random.below(20_000)));
            let place = phoenix.kill();
            phoenix.start_again(place);
        }
    });
    let rounds = programs.end();
    println!(
        "{kills} kills, {} answers to Rust, {rounds} rounds in C",
        storm.answered.load(Ordering::Relaxed)
    );
    assert!(rounds > 0, "the C programs did nothing");
    let counted = phoenix.store().connect().ask(&plain::get(SHARED_COUNTER.as_bytes())).expect("answered");
    let expected = storm.counted.load(Ordering::Relaxed).to_string().into_bytes();
    assert_eq!(counted, plain::Answer::Value(expected), "the counter of all");
    phoenix.assert_sound();
}

fn kills(default: u64) -> u64 {
    std::env::var("KVS_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[test]
fn sessions_whole_store_killed_again_and_again_is_exactly_once_for_every_client() {
    storm(Launch::new().capacity("512MiB"), kills(30));
}

#[test]
fn sessions_whole_store_killed_with_every_write_synced_is_exactly_once_too() {
    storm(Launch::new().capacity("512MiB").option("--durability", "always"), kills(10).min(100));
}

#[test]
fn sessions_data_server_killed_without_a_standby_is_exactly_once() {
    let mut random = Random::new(seed());
    let store = Launch::new().start();
    let storm = Storm::new();
    let mut client = Client::connect(store.address()).expect("the store is there");
    thread::scope(|scope| {
        let _end = EndOnDrop(&storm.stop);
        scope.spawn(|| {
            let _end = EndOnDrop(&storm.stop);
            single_calls(&mut client, "client", &storm);
        });
        for _ in 0..20 {
            let before = storm.answered.load(Ordering::Relaxed);
            eventually("the client gets on", SOON, || {
                storm.answered.load(Ordering::Relaxed) > before + 20 || !storm.goes_on()
            });
            thread::sleep(Duration::from_micros(random.below(5_000)));
            store.kill_data();
        }
    });
}

#[test]
fn sessions_patience_that_runs_out_is_an_error_and_the_client_works_again_later() {
    let mut random = Random::new(seed());
    let mut phoenix = Phoenix::start(Launch::new(), &mut random);
    let patience = Duration::from_millis(400);
    let mut program = c_program(phoenix.store(), "patience.c", Library::Shared);
    program.env("KVS_RETRY_MS", patience.as_millis().to_string());
    let mut running = program.spawn().expect("it runs");
    let mut input = running.stdin.take().expect("a pipe");
    let mut lines = BufReader::new(running.stdout.take().expect("a pipe")).lines().map_while(Result::ok);
    assert_eq!(lines.next().as_deref(), Some("up"));
    let mut client =
        ConnectOptions::new().retry_for(patience).connect(phoenix.store().address()).expect("there");
    assert_eq!(client.increment("counter", 1).expect("answered"), 1);

    let place = phoenix.kill();
    writeln!(input, "try").expect("it listens");
    let begun = Instant::now();
    let refused = client.increment("counter", 1);
    let took = begun.elapsed();
    assert!(matches!(refused, Err(Error::Disconnected { .. })), "{refused:?}");
    assert!(took > patience / 2 && took < patience + SOON / 10, "gave up after {took:?}");
    let c_took: u64 = lines.next().and_then(|line| line.parse().ok()).expect("milliseconds");
    assert!(c_took > 200 && c_took < 6_400, "the C program gave up after {c_took} ms");
    assert_eq!(lines.next().as_deref(), Some("gave up"));

    phoenix.start_again(place);
    writeln!(input, "go on").expect("it listens");
    drop(input);
    let output = running.wait_with_output().expect("it ends");
    assert!(output.status.success(), "{}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    assert_eq!(client.increment("counter", 1).expect("answered"), 2);
}

#[test]
fn sessions_tools_ride_out_a_restart() {
    const PAIRS: usize = 60_000;
    let mut random = Random::new(seed());
    let mut phoenix = Phoenix::start(Launch::new(), &mut random);
    let file = phoenix.store().place().directory().join("pairs.jsonl");
    let pairs: String = (0..PAIRS)
        .map(|index| format!("{{\"key\":\"key {index}\",\"value\":\"value {index}\"}}\n"))
        .collect();
    std::fs::write(&file, pairs).expect("room on the disk");
    let mut import = phoenix.store().place().tools_command();
    import.env_remove(processes::MARK).args(["import", &file.to_string_lossy()]);
    let mut import = import.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("it runs");
    let mut restarts = 0;
    while import.try_wait().expect("a child").is_none() && restarts < 3 {
        thread::sleep(Duration::from_micros(random.below(30_000)));
        let place = phoenix.kill();
        phoenix.start_again(place);
        restarts += 1;
    }
    let output = import.wait_with_output().expect("it ends");
    assert!(output.status.success(), "{restarts}: {}", String::from_utf8_lossy(&output.stderr));
    assert!(restarts > 0, "the import was over before the first kill");
    let mut client = Client::connect(phoenix.store().address()).expect("there");
    for index in 0..PAIRS {
        let value = client.get(format!("key {index}")).expect("answered");
        assert_eq!(value, Some(format!("value {index}").into_bytes()));
    }
}

const TOKEN: SessionToken = SessionToken::new(*b"sixteen of bytes");

fn join(connection: &mut Connection, attempt: u64) -> plain::Answer {
    connection.ask(&RequestBody::Session { token: TOKEN, attempt }).expect("answered")
}

/// Asks for a change with a number of its own.
fn change(connection: &mut Connection, number: u32, body: &RequestBody<'_>) -> plain::Answer {
    connection.set_number(number.wrapping_sub(1));
    connection.ask(body).expect("answered")
}

#[test]
fn sessions_newer_connection_has_the_session_and_the_older_changes_nothing() {
    let store = Store::start();
    let (mut old, mut new) = (store.connect(), store.connect_unix());
    assert_eq!(join(&mut old, 1), plain::Answer::Session(false, 256));
    assert_eq!(change(&mut old, u32::MAX, &increment(b"n", 1)), plain::Answer::Number(1));
    assert_eq!(change(&mut old, 0, &increment(b"n", 10)), plain::Answer::Number(11));
    assert_eq!(join(&mut new, 2), plain::Answer::Session(true, 256));
    assert_eq!(change(&mut new, u32::MAX, &increment(b"n", 1)), plain::Answer::Number(1));
    assert_eq!(change(&mut new, 0, &increment(b"n", 10)), plain::Answer::Number(11));
    // What only reads is done over either.
    let eleven = plain::Answer::Value(b"11".to_vec());
    assert_eq!(old.ask(&plain::get(b"n")).expect("answered"), eleven);
    let refused = change(&mut old, 1, &increment(b"n", 1));
    assert_eq!(refused.code(), Some(ErrorCode::Session), "{refused:?}");
    old.read_to_end().expect("it ends");
    let mut older = store.connect();
    assert_eq!(join(&mut older, 1).code(), Some(ErrorCode::Session));
    assert_eq!(change(&mut new, 1, &plain::delete(b"n")), plain::Answer::Deleted);
    assert_eq!(change(&mut new, 1, &plain::delete(b"n")), plain::Answer::Deleted);
    let too_old = change(&mut new, 1u32.wrapping_sub(400), &increment(b"n", 1));
    assert_eq!(too_old.code(), Some(ErrorCode::Session), "{too_old:?}");
}

#[test]
fn sessions_requests_in_flight_on_the_older_connection_happen_once() {
    const REQUESTS: u32 = 200;
    let store = Launch::new().option("--workers", "3").start();
    let mut expected = 0u64;
    for round in 0..150u32 {
        let first = round.wrapping_mul(REQUESTS).wrapping_sub(3 * REQUESTS);
        let mut old = if round % 2 == 0 { store.connect() } else { store.connect_unix() };
        let attempt = u64::from(round) * 2;
        let joined = join(&mut old, attempt + 1);
        assert_eq!(joined, plain::Answer::Session(round > 0, 256));
        let mut new = store.connect();
        old.set_number(first.wrapping_sub(1));
        for _ in 0..REQUESTS {
            old.queue(&increment(b"in flight", 1));
        }
        old.flush().expect("sent");
        // While the worker of the older one is at it, the newer one takes the session and repeats everything.
        assert_eq!(join(&mut new, attempt + 2), plain::Answer::Session(true, 256));
        new.set_number(first.wrapping_sub(1));
        for _ in 0..REQUESTS {
            new.queue(&increment(b"in flight", 1));
        }
        new.flush().expect("sent");
        for index in 0..REQUESTS {
            expected += 1;
            let answer = new.receive().expect("answered");
            assert_eq!(answer, (first.wrapping_add(index), plain::Answer::Number(expected as i64)));
        }
    }
    assert_eq!(
        store.connect().ask(&plain::get(b"in flight")).expect("answered"),
        plain::Answer::Value(expected.to_string().into_bytes())
    );
}

#[test]
fn sessions_that_end_in_order_leave_no_memory_taken() {
    let store = Store::start();
    let taken = |round: &str| {
        let mut client = Client::connect(store.address()).expect("there");
        client.set("key", round).expect("answered");
    };
    taken("first");
    let before = store.segment_memory();
    for _ in 0..300 {
        taken("another");
    }
    // The end of one may still be on its way when the next comes.
    let more = store.segment_memory() - before;
    assert!(more < 40 * 4096, "300 clients, one after the other, left {more} bytes");
}

#[test]
fn sessions_conditional_set_in_a_session_says_what_it_said_first() {
    let store = Store::start();
    let mut connection = store.connect();
    assert_eq!(join(&mut connection, 1), plain::Answer::Session(false, 256));
    let large = vec![b'l'; 200_000];
    for (number, value) in [(7, &b"small"[..]), (9, &large)] {
        let key = format!("key {number}");
        let set = RequestBody::Set { condition: SetCondition::IfAbsent, key: key.as_bytes(), value };
        for _ in 0..3 {
            assert_eq!(change(&mut connection, number, &set), plain::Answer::Stored);
        }
        assert_eq!(change(&mut connection, number + 1, &set), plain::Answer::Exists);
        assert_eq!(change(&mut connection, number + 1, &set), plain::Answer::Exists);
    }
}
