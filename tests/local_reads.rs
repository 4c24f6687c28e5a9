//! The promise: a local program reads straight from the shared memory what is stored, also while no server runs: what is acknowledged is
//! seen at once, nothing torn is ever seen, no system call is made, and a segment that is replaced is noticed.
//!
//! Method: real stores, written through their servers, whose processes are killed meanwhile; readers in this process, which hold every
//! value against what had been sent and acknowledged when the read began and ended. System calls are counted by tracing a program
//! that reads.

use std::io::Write;
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use kvs_client::{Answer, Client, ConnectOptions, Error, LocalReader, Statistic};
use kvs_harness::binaries;
use kvs_harness::c_programs::{Library, compile, source};
use kvs_harness::processes::MARK;
use kvs_harness::random::{Random, seed};
use kvs_harness::store::{Launch, Place, Store};
use kvs_harness::wait::{SOON, SetOnDrop, eventually};
use nix::sys::ptrace;
use nix::sys::wait::{WaitStatus, waitpid};
use rustix::process::Signal;

const COUNTERS: u64 = 64;

fn reader(store: &Store) -> LocalReader {
    LocalReader::open(store.place().name()).expect("the store is there")
}

fn client(store: &Store) -> Client {
    Client::connect(store.address()).expect("the store is there")
}

/// Counters in a store that one writer counts up, and how far each has come.
struct Counters {
    /// By the last write that was sent.
    sent: Vec<AtomicU64>,
    /// By the last that was acknowledged.
    acknowledged: Vec<AtomicU64>,
    stop: AtomicBool,
    reads: AtomicU64,
}

impl Counters {
    fn new() -> Self {
        let zeros = || (0..COUNTERS).map(|_| AtomicU64::new(0)).collect();
        Self { sent: zeros(), acknowledged: zeros(), stop: AtomicBool::new(false), reads: AtomicU64::new(0) }
    }

    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    /// Counts them up in turn, some alone and some many at once.
    fn write(&self, client: &mut Client) {
        let _stop = SetOnDrop(&self.stop);
        for round in 1.. {
            let keys: Vec<usize> = (0..COUNTERS as usize).collect();
            for group in keys.chunks(if round % 2 == 0 { 1 } else { 16 }) {
                if !self.goes_on() {
                    return;
                }
                let mut pipeline = client.pipeline();
                for &key in group {
                    self.sent[key].store(round, Ordering::SeqCst);
                    pipeline.set(format!("counter {key}"), value_of(round));
                }
                pipeline.run().expect("the store goes on");
                group.iter().for_each(|&key| self.acknowledged[key].store(round, Ordering::SeqCst));
            }
        }
    }

    /// Reads them, and holds each value against what had been acknowledged before and was sent by then.
    fn read(&self, mut reader: LocalReader, mut random: Random) {
        let _stop = SetOnDrop(&self.stop);
        let keys: Vec<String> = (0..COUNTERS).map(|key| format!("counter {key}")).collect();
        let mut value = Vec::new();
        while self.goes_on() {
            let key = random.below(COUNTERS) as usize;
            let before = self.acknowledged[key].load(Ordering::SeqCst);
            let found = reader.get_into(&keys[key], &mut value).expect("readable");
            self.check(key, before, found.then_some(&value[..]));
            let before: Vec<u64> =
                self.acknowledged.iter().map(|count| count.load(Ordering::SeqCst)).collect();
            reader.get_many(&keys, |key, value| self.check(key, before[key], value)).expect("readable");
            self.reads.fetch_add(1 + COUNTERS, Ordering::Relaxed);
        }
    }

    fn check(&self, key: usize, before: u64, value: Option<&[u8]>) {
        let sent = self.sent[key].load(Ordering::SeqCst);
        let count = value.map_or(0, count_of);
        assert!(count >= before, "counter {key}: {count} was read, {before} had been acknowledged");
        assert!(count <= sent, "counter {key}: {count} was read, {sent} had been sent");
    }
}

/// A value of a length of its own that shows when it is torn.
fn value_of(count: u64) -> Vec<u8> {
    count.to_le_bytes().repeat(1 + (count % 13) as usize)
}

fn count_of(value: &[u8]) -> u64 {
    let (words, rest) = value.as_chunks::<8>();
    let count = words.first().map_or(0, |word| u64::from_le_bytes(*word));
    assert!(rest.is_empty() && value == value_of(count), "torn: {value:?}");
    count
}

#[test]
fn local_reads_are_never_stale_or_torn_while_the_data_server_is_killed_again_and_again() {
    let mut random = Random::new(seed());
    let store = Store::start();
    let counters = Counters::new();
    let mut client = client(&store);
    thread::scope(|scope| {
        let stop = SetOnDrop(&counters.stop);
        let counters = &counters;
        scope.spawn(move || counters.write(&mut client));
        let (reader, seed) = (reader(&store), random.below(u64::MAX));
        scope.spawn(move || counters.read(reader, Random::new(seed)));
        for _ in 0..30 {
            let before = (counters.reads.load(Ordering::Relaxed), written(counters));
            eventually("reader and writer get on", SOON, || {
                let now = (counters.reads.load(Ordering::Relaxed), written(counters));
                !counters.goes_on() || (now.0 > before.0 + 100 && now.1 > before.1)
            });
            thread::sleep(std::time::Duration::from_micros(random.below(10_000)));
            store.kill_data();
        }
        drop(stop);
    });
    println!("{} values read, {} rounds written", counters.reads.into_inner(), written(&Counters::new()));
}

fn written(counters: &Counters) -> u64 {
    counters.acknowledged.iter().map(|count| count.load(Ordering::SeqCst)).max().unwrap_or(0)
}

#[test]
fn local_reads_see_every_entry_while_the_table_grows_from_nothing() {
    const ENTRIES: u64 = 100_000;
    const BATCH: u64 = 500;
    let store = Store::start();
    let mut random = Random::new(seed());
    let stored = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let mut reader = reader(&store);
        let (stored, stop) = (&stored, &stop);
        let _stop_if_it_fails = SetOnDrop(stop);
        scope.spawn(move || {
            let _stop = SetOnDrop(stop);
            while stored.load(Ordering::SeqCst) < ENTRIES && !stop.load(Ordering::Relaxed) {
                let there = stored.load(Ordering::SeqCst);
                let keys: Vec<u64> = (0..40).map(|_| random.below(there + 100)).collect();
                let texts: Vec<String> = keys.iter().map(u64::to_string).collect();
                let check = |index: usize, value: Option<&[u8]>| {
                    assert!(value.is_some() || keys[index] >= there, "{} of {there} is gone", keys[index]);
                    assert!(value.is_none_or(|value| value == format!("value {}", keys[index]).as_bytes()));
                };
                reader.get_many(&texts, check).expect("readable");
                check(0, reader.get(&texts[0]).expect("readable").as_deref());
            }
        });
        let mut client = client(&store);
        for from in (0..ENTRIES).step_by(BATCH as usize) {
            assert!(!stop.load(Ordering::Relaxed), "the reader failed");
            let mut pipeline = client.pipeline();
            for key in from..from + BATCH {
                pipeline.set(key.to_string(), format!("value {key}"));
            }
            pipeline.run().expect("room");
            stored.store(from + BATCH, Ordering::SeqCst);
        }
    });
}

#[test]
fn local_reads_of_large_values_are_never_torn() {
    let store = Store::start();
    let mut client = client(&store);
    let large = |count: u64| count.to_le_bytes().repeat(20_000 + (count % 7) as usize * 11_111);
    client.set("large", large(0)).expect("room");
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let mut reader = reader(&store);
        let stop = &stop;
        let writer = scope.spawn(move || {
            let _stop = SetOnDrop(stop);
            for count in 1..400 {
                client.set("large", large(count)).expect("room");
            }
        });
        let (mut value, mut last, mut reads) = (Vec::new(), 0, 0);
        while !stop.load(Ordering::Relaxed) {
            match reader.get_into("large", &mut value) {
                Ok(found) => assert!(found),
                Err(Error::Contended) => continue,
                Err(error) => panic!("{error}"),
            }
            let count = u64::from_le_bytes(value[..8].try_into().expect("eight bytes"));
            assert!(value == large(count), "torn: begins with {count}, {} bytes", value.len());
            assert!(count >= last, "{count} was read after {last}");
            (last, reads) = (count, reads + 1);
        }
        writer.join().expect("it wrote");
        assert!(reads > 0 && reader.get("large").expect("readable") == Some(large(399)));
    });
}

#[test]
fn local_reads_need_no_server_and_notice_a_purge_and_a_new_start() {
    let store = Store::start();
    client(&store).set("key", "value").expect("room");
    let mut early = reader(&store);
    let (place, launch, _) = store.end(Signal::TERM);
    let mut late = LocalReader::open(place.name()).expect("no server is needed");
    for reader in [&mut early, &mut late] {
        assert_eq!(reader.get("key").expect("readable"), Some(b"value".to_vec()));
    }
    assert!(place.tools_by_name(&["purge"]).status.success());
    for reader in [&mut early, &mut late] {
        assert!(matches!(reader.get("key"), Err(Error::NoStore { .. })));
    }
    let store = launch.start_at(place);
    assert_eq!(store.ready().start, "loaded");
    client(&store).set("key", "new").expect("room");
    for reader in [&mut early, &mut late] {
        assert_eq!(reader.get("key").expect("readable"), Some(b"new".to_vec()));
    }
}

#[test]
fn local_reader_follows_a_segment_that_was_removed_by_hand() {
    let store = Store::start();
    client(&store).set("key", "old").expect("room");
    let mut reader = reader(&store);
    std::fs::remove_file(store.place().segment()).expect("it is there");
    assert_eq!(reader.get("key").expect("readable"), Some(b"old".to_vec()));
    client(&store).set("key", "still served").expect("room");
    assert_eq!(reader.get("key").expect("readable"), Some(b"still served".to_vec()));
    let store = store.restart();
    client(&store).set("key", "new").expect("room");
    eventually("the reader reads the new segment", SOON, || {
        reader.get("key").expect("readable") == Some(b"new".to_vec())
    });
}

#[test]
fn local_reader_refuses_what_is_not_its_users_alone() {
    let place = Place::new();
    let refused = |what: &str| match LocalReader::open(place.name()) {
        Err(error) => assert!(error.to_string().contains(what), "{error}"),
        Ok(_) => panic!("it was not refused"),
    };
    refused("start one with");
    let (place, _, _) = Launch::new().start_at(place).end(Signal::TERM);
    let refused = |what: &str| match LocalReader::open(place.name()) {
        Err(error) => assert!(error.to_string().contains(what), "{error}"),
        Ok(_) => panic!("it was not refused"),
    };
    let segment = place.segment();
    std::fs::set_permissions(&segment, std::fs::Permissions::from_mode(0o644)).expect("mine");
    refused("mode is 0644");
    std::fs::set_permissions(&segment, std::fs::Permissions::from_mode(0o600)).expect("mine");
    if rustix::process::geteuid().is_root() {
        let other = rustix::process::Uid::from_raw(65_534);
        rustix::fs::chown(&segment, Some(other), None).expect("root may");
        refused("belongs to user 65534");
        rustix::fs::chown(&segment, Some(rustix::process::geteuid()), None).expect("root may");
    }
    let moved = place.directory().join("moved");
    std::fs::copy(&segment, &moved).expect("room");
    std::fs::remove_file(&segment).expect("mine");
    std::os::unix::fs::symlink(&moved, &segment).expect("mine");
    refused("symbolic link");
}

/// System calls of a program that reads so many keys from the store's shared memory.
fn system_calls(place: &Place, keys: usize) -> usize {
    let mut program = Command::new(binaries::example("local"))
        .arg(place.name())
        .env(MARK, place.name())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("it runs");
    let pid = nix::unistd::Pid::from_raw(i32::try_from(program.id()).expect("a pid"));
    ptrace::seize(pid, ptrace::Options::PTRACE_O_TRACESYSGOOD).expect("a child of ours");
    ptrace::interrupt(pid).expect("it runs");
    waitpid(pid, None).expect("it stops");
    let (mut input, output) = (program.stdin.take().expect("a pipe"), program.stdout.take().expect("a pipe"));
    let writer = thread::spawn(move || {
        let lines: String = (0..keys).map(|key| format!("{}\n", key % 10)).collect();
        input.write_all(lines.as_bytes()).expect("it reads");
    });
    let lines = thread::spawn(move || std::io::read_to_string(output).expect("text"));
    let mut stops = 0;
    loop {
        ptrace::syscall(pid, None).expect("it is stopped");
        match waitpid(pid, None).expect("it stops or ends") {
            WaitStatus::PtraceSyscall(_) => stops += 1,
            WaitStatus::Exited(_, status) => {
                assert_eq!(status, 0);
                break;
            }
            _ => {}
        }
    }
    writer.join().expect("all is written");
    let lines = lines.join().expect("all is read");
    assert_eq!(lines.lines().count(), keys);
    assert!(lines.lines().all(|line| line.ends_with("a value")), "{lines}");
    let _ = program.wait();
    // One when a call begins, one when it ends.
    stops / 2
}

#[test]
fn local_reads_make_no_system_calls() {
    let (place, ..) = {
        let store = Store::start();
        let mut client = client(&store);
        (0..10).for_each(|key| client.set(key.to_string(), "a value").expect("room"));
        store.end(Signal::TERM)
    };
    let begun = Instant::now();
    let (few, many) = (system_calls(&place, 10), system_calls(&place, 50_000));
    // The program reads its input in pieces of 8 KiB or less, writes its output so, and looks at the segment's name now and then.
    let looks = begun.elapsed().as_millis() as usize / 100;
    println!("{few} system calls for 10 keys, {many} for 50,000");
    assert!(few > 0 && many < few + 1_000 + looks, "{few} system calls for 10 keys, {many} for 50,000");
}

#[test]
fn local_reads_from_c_give_what_is_stored_without_a_server() {
    const LENGTH: usize = 700_000;
    let store = Store::start();
    let mut client = client(&store);
    client.set("7", vec![b'x'; LENGTH]).expect("room");
    client.set("8", "").expect("room");
    let programs = [Library::Shared, Library::Static]
        .map(|library| compile(&source("local.c"), store.place().directory(), library));
    let run = |place: &Place| {
        for program in &programs {
            let mut command = Command::new(program);
            let output = command.arg(place.name()).arg(LENGTH.to_string()).env(MARK, place.name()).output();
            let output = output.expect("it runs");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
    };
    run(store.place());
    let (place, ..) = store.end(Signal::TERM);
    run(&place);
}

fn statistic(client: &mut Client, wanted: &str) -> u64 {
    let all = client.stats().expect("answered");
    match all.iter().find(|(name, _)| name == wanted) {
        Some((_, Statistic::Number(number))) => *number,
        other => panic!("{wanted}: {other:?}"),
    }
}

fn local_client(address: &str) -> Client {
    ConnectOptions::new().local_reads(true).connect(address).expect("the store is there")
}

#[test]
fn client_with_local_reads_asks_the_server_for_changes_only_and_reads_without_it() {
    let store = Store::start();
    let mut observer = client(&store);
    for address in [store.address(), store.unix_address()] {
        let mut client = local_client(&address);
        let before = statistic(&mut observer, "requests_get");
        for count in 0..500u32 {
            client.set("key", count.to_string()).expect("room");
            assert_eq!(client.get("key").expect("read"), Some(count.to_string().into_bytes()));
            let mut pipeline = client.pipeline();
            pipeline.get("key").get("none");
            let answers = pipeline.run().expect("read");
            assert!(
                matches!(&answers[0], Answer::Value(Some(value)) if *value == count.to_string().into_bytes())
            );
            assert!(matches!(&answers[1], Answer::Value(None)));
        }
        assert_eq!(client.get("none").expect("read"), None);
        assert!(matches!(client.get(""), Err(Error::KeyLength { .. })));
        assert_eq!(statistic(&mut observer, "requests_get"), before, "the server was asked");
        // The server keeps the order of reads and changes.
        let mut pipeline = client.pipeline();
        pipeline.set("key", "a").get("key").set("key", "b").get("key");
        let answers = pipeline.run().expect("answered");
        assert!(matches!(&answers[1], Answer::Value(Some(value)) if value == b"a"));
        assert!(matches!(&answers[3], Answer::Value(Some(value)) if value == b"b"));
        assert_eq!(statistic(&mut observer, "requests_get"), before + 2);
    }
    let mut local = local_client(&store.address());
    assert_eq!(local.get("key").expect("read"), Some(b"b".to_vec()));
    let (_place, ..) = store.end(Signal::TERM);
    assert_eq!(local.get("key").expect("read without a server"), Some(b"b".to_vec()));
}

#[test]
fn client_with_local_reads_never_takes_another_store_for_its_server() {
    let store = Store::start();
    let address = store.address();
    let mut client = local_client(&address);
    client.set("key", "old").expect("room");
    assert_eq!(client.get("key").expect("read"), Some(b"old".to_vec()));
    // The segment gets lost by hand, and the store at the same place is another one then.
    let (place, launch, _) = store.end(Signal::TERM);
    std::fs::remove_file(place.segment()).expect("it is there");
    std::fs::remove_file(place.backup()).expect("it is there");
    let store = launch.option("--listen", &address).start_at(place);
    let mut other = self::client(&store);
    other.set("key", "new").expect("room");
    eventually("the client asks the server that is there", SOON, || {
        client.get("key").expect("read") == Some(b"new".to_vec())
    });
    let before = statistic(&mut other, "requests_get");
    assert_eq!(client.get("key").expect("read"), Some(b"new".to_vec()));
    assert_eq!(statistic(&mut other, "requests_get"), before, "it reads the new segment");
}

#[test]
fn c_program_with_local_reads_gets_every_return_value_of_the_contract() {
    let store = Store::start();
    let mut observer = client(&store);
    let before = statistic(&mut observer, "requests_get");
    for program in ["header.c", "threads.c"] {
        let program = compile(&source(program), store.place().directory(), Library::Shared);
        let address = store.ready().tcp;
        let output = Command::new(program)
            .args([address.ip().to_string(), address.port().to_string()])
            .env(MARK, store.place().name())
            .env("KVS_LOCAL_READS", "1")
            .output()
            .expect("it runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    assert_eq!(statistic(&mut observer, "requests_get"), before, "the server was asked");
}
