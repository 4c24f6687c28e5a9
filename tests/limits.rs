//! The promise: what goes over a limit gets an error that names the limit, and the connection stays usable; a full store
//! says so, goes on reading, and has room again when something is deleted.
//!
//! Method: each limit is met exactly and exceeded by one, over the wire. Fullness is reached for real in a small segment.
//! `KVS_CHURN_SECONDS` sets how long values are overwritten at 80% of the capacity (15 in a normal run).

use std::time::{Duration, Instant};

use kvs_core::limits::KEY_BYTES_MAX;
use kvs_core::wire::{ErrorCode, RequestBody, SetCondition};
use kvs_harness::connection::{Answer, Connection, delete, get, increment, set};
use kvs_harness::random::{Random, seed};
use kvs_harness::store::{Launch, Store};

const MAX_VALUE: usize = 1 << 20;

fn store() -> Store {
    Launch::new().option("--max-value", "1MiB").start()
}

fn both_transports(store: &Store) -> [Connection; 2] {
    [store.connect(), store.connect_unix()]
}

/// The answer is this error, its message has `limit` in it, and the connection goes on.
fn assert_limit(connection: &mut Connection, request: &RequestBody<'_>, code: ErrorCode, limit: &str) {
    let answer = connection.ask(request).expect("answered");
    let Answer::Error(found, message) = answer else { panic!("{code:?} expected, not {answer:?}") };
    assert_eq!(found, code, "{message}");
    assert!(message.contains(limit), "the limit {limit} is not named: {message}");
    assert_eq!(connection.ask(&set(b"after", b"1")).expect("stored"), Answer::Stored);
}

#[test]
fn key_of_every_length_is_stored_and_found() {
    let store = store();
    let mut random = Random::new(1);
    let lengths = (1..300).chain((300..KEY_BYTES_MAX).step_by(997)).chain([KEY_BYTES_MAX - 1, KEY_BYTES_MAX]);
    for length in lengths {
        let key = random.bytes(length);
        for connection in &mut both_transports(&store) {
            assert_eq!(connection.ask(&set(&key, &key)).expect("stored"), Answer::Stored, "{length}");
            assert!(connection.ask(&get(&key)).expect("read") == Answer::Value(key.clone()), "{length}");
            assert_eq!(connection.ask(&delete(&key)).expect("deleted"), Answer::Deleted, "{length}");
            assert_eq!(connection.ask(&get(&key)).expect("read"), Answer::Missing, "{length}");
        }
    }
}

#[test]
fn key_too_long_or_empty_is_refused_by_every_operation() {
    let store = store();
    for connection in &mut both_transports(&store) {
        for key in [&b""[..], &[b'k'; KEY_BYTES_MAX + 1], &[b'k'; 2 * KEY_BYTES_MAX]] {
            let absent = RequestBody::Set { condition: SetCondition::IfAbsent, key, value: b"v" };
            for request in [get(key), set(key, b"value"), absent, delete(key), increment(key, 1)] {
                assert_limit(connection, &request, ErrorCode::KeyLength, "65535");
            }
            // Together with a value that makes the frame larger than any buffer.
            let large = vec![7; MAX_VALUE / 2];
            assert_limit(connection, &set(key, &large), ErrorCode::KeyLength, "65535");
        }
    }
}

#[test]
fn value_of_the_largest_length_is_stored_and_one_more_byte_is_refused() {
    let store = store();
    let value = Random::new(2).bytes(MAX_VALUE + 1);
    let largest_key = vec![b'k'; KEY_BYTES_MAX];
    for connection in &mut both_transports(&store) {
        for key in [&b"k"[..], &largest_key] {
            let largest = &value[..MAX_VALUE];
            assert_eq!(connection.ask(&set(key, largest)).expect("stored"), Answer::Stored);
            assert!(connection.ask(&get(key)).expect("read") == Answer::Value(largest.to_vec()));
        }
        assert_limit(connection, &set(b"k", &value), ErrorCode::ValueLength, "1MiB");
        assert!(connection.ask(&get(b"k")).expect("read") == Answer::Value(value[..MAX_VALUE].to_vec()));
    }
}

#[test]
fn value_over_the_limit_in_a_pipeline_costs_its_neighbours_nothing() {
    let store = store();
    let value = vec![1; MAX_VALUE + 1];
    for connection in &mut both_transports(&store) {
        let sent = [set(b"before", b"1"), set(b"too large", &value), set(b"behind", b"2"), get(b"behind")];
        let mut writer =
            Connection::from_socket(connection.socket().try_clone().expect("handle")).expect("socket");
        writer.set_number(1);
        sent.iter().for_each(|request| _ = writer.queue(request));
        let sending = std::thread::spawn(move || writer.flush().expect("sent"));
        assert_eq!(connection.receive().expect("answered").1, Answer::Stored);
        assert_eq!(connection.receive().expect("answered").1.code(), Some(ErrorCode::ValueLength));
        assert_eq!(connection.receive().expect("answered").1, Answer::Stored);
        assert_eq!(connection.receive().expect("answered").1, Answer::Value(b"2".to_vec()));
        sending.join().expect("sender");
    }
}

#[test]
fn increment_at_the_limits_of_a_number_is_refused() {
    let store = store();
    let mut connection = store.connect();
    assert_eq!(connection.ask(&increment(b"n", i64::MAX)).expect("counted"), Answer::Number(i64::MAX));
    assert_limit(&mut connection, &increment(b"n", 1), ErrorCode::NumberRange, "64 bits");
    assert_eq!(connection.ask(&increment(b"n", i64::MIN)).expect("counted"), Answer::Number(-1));
    assert_eq!(connection.ask(&set(b"text", b"12 apples")).expect("stored"), Answer::Stored);
    let answer = connection.ask(&increment(b"text", 1)).expect("answered");
    assert_eq!(answer.code(), Some(ErrorCode::NotANumber), "{answer:?}");
    assert_eq!(connection.ask(&get(b"text")).expect("read"), Answer::Value(b"12 apples".to_vec()));
}

#[test]
fn listing_with_any_limit_and_cursor_is_answered() {
    let store = store();
    let mut connection = store.connect();
    let mut random = Random::new(seed());
    assert_eq!(connection.ask(&set(b"only", b"1")).expect("stored"), Answer::Stored);
    for _ in 0..1_000 {
        let cursor = random.number() >> random.below(64);
        let request = RequestBody::List { prefix: b"", cursor, limit: random.number() as u32 };
        let answer = connection.ask(&request).expect("answered");
        assert!(matches!(answer, Answer::Keys(..) | Answer::Error(..)), "{answer:?}");
    }
    assert_eq!(connection.ask(&get(b"only")).expect("read"), Answer::Value(b"1".to_vec()));
}

/// Stores values of `length` bytes until the store is full; returns which of them are there.
fn fill(connection: &mut Connection, length: usize) -> Vec<u64> {
    let value = vec![b'f'; length];
    let at_once = (100_000 / length as u64).clamp(1, 200);
    let mut stored = Vec::new();
    for first in (0..).step_by(at_once as usize) {
        let numbers = first..first + at_once;
        numbers.clone().for_each(|number| _ = connection.queue(&set(&key(number), &value)));
        connection.flush().expect("sent");
        let before = stored.len();
        for number in numbers {
            match connection.receive().expect("answered").1 {
                Answer::Stored => stored.push(number),
                answer => assert_eq!(answer.code(), Some(ErrorCode::StoreFull), "{answer:?}"),
            }
        }
        // A single value may still fit where another one did not: blocks belong to shards.
        if stored.len() == before {
            return stored;
        }
    }
    unreachable!("a store has an end")
}

fn key(number: u64) -> Vec<u8> {
    format!("fill {number}").into_bytes()
}

fn delete_all(connection: &mut Connection, numbers: &[u64]) {
    for some in numbers.chunks(500) {
        some.iter().for_each(|number| _ = connection.queue(&delete(&key(*number))));
        connection.flush().expect("sent");
        for number in some {
            assert_eq!(connection.receive().expect("deleted").1, Answer::Deleted, "{number}");
        }
    }
}

#[test]
fn full_store_refuses_writes_reads_on_and_has_room_after_deletes() {
    for length in [100, 3_000, 50_000, 700_000] {
        let store = Launch::new().capacity("32MiB").start();
        let mut connection = store.connect();
        let filled = fill(&mut connection, length);
        let bytes = filled.len() * length;
        assert!(bytes > 12 << 20, "only {bytes} bytes of values of {length} fit 32 MiB");
        assert_full(&mut connection, length);
        for number in filled.iter().step_by(1 + filled.len() / 50) {
            let answer = connection.ask(&get(&key(*number))).expect("read");
            assert!(
                answer == Answer::Value(vec![b'f'; length]),
                "{number}, {length} bytes: {:?}",
                answer.code()
            );
        }
        delete_all(&mut connection, &filled);
        // All of it comes back.
        let again = fill(&mut connection, length).len();
        assert!(
            again >= filled.len() * 95 / 100,
            "{again} values of {length} bytes fit after {} were deleted",
            filled.len()
        );
        check(&store);
    }
}

/// Of some more values at least one is refused, with what to do about it, and isn't there then.
fn assert_full(connection: &mut Connection, length: usize) {
    let value = vec![1; length];
    // Keys as long as the others have, so that these values take blocks of the same size.
    let mut more = (0..50).map(|number| format!("more {number:06}").into_bytes());
    let refused = more.find_map(|key| {
        let Answer::Error(code, message) = connection.ask(&set(&key, &value)).expect("answered") else {
            return None;
        };
        assert_eq!(code, ErrorCode::StoreFull, "{message}");
        Some((key, message))
    });
    let (key, message) =
        refused.unwrap_or_else(|| panic!("a full store takes 50 more values of {length} bytes"));
    assert!(message.contains("--capacity"), "what to do is not said: {message}");
    assert_eq!(connection.ask(&get(&key)).expect("read"), Answer::Missing);
}

#[test]
fn memory_freed_in_one_size_serves_another() {
    let store = Launch::new().capacity("32MiB").start();
    let mut connection = store.connect();
    for length in [100, 700_000, 1_000, 200_000, 32, 5_000] {
        let filled = fill(&mut connection, length);
        // What an entry takes beside its value counts where values are small.
        let bytes = filled.len() * (length + 40);
        assert!(bytes > 12 << 20, "only {bytes} bytes fit with values of {length} bytes");
        delete_all(&mut connection, &filled);
    }
    check(&store);
}

#[test]
fn values_of_all_sizes_overwritten_at_four_fifths_full_always_find_room() {
    let seconds = std::env::var("KVS_CHURN_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(15);
    let store = Launch::new().capacity("256MiB").start();
    let mut churn = Churn::new(&store, (256 << 20) * 8 / 10);
    while churn.total < churn.mark - (1 << 20) {
        churn.add();
    }
    let end = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < end {
        (0..64).for_each(|_| churn.overwrite());
    }
    let (overwritten, keys) = (churn.overwritten, churn.lengths.len());
    println!("{overwritten} values overwritten, {keys} keys, {} MiB stored", churn.total >> 20);
    check(&store);
}

/// Values of 1 KiB to 1 MiB, with a total that stays at a mark.
struct Churn {
    connection: Connection,
    random: Random,
    bytes: Vec<u8>,
    lengths: Vec<u64>,
    total: u64,
    mark: u64,
    overwritten: u64,
}

impl Churn {
    fn new(store: &Store, mark: u64) -> Self {
        let mut random = Random::new(seed());
        let bytes = random.bytes(1 << 20);
        let connection = store.connect_unix();
        Self { connection, random, bytes, lengths: Vec::new(), total: 0, mark, overwritten: 0 }
    }

    fn add(&mut self) {
        self.lengths.push(0);
        self.store(self.lengths.len() - 1);
    }

    fn overwrite(&mut self) {
        let which = self.random.below(self.lengths.len() as u64) as usize;
        self.store(which);
        self.overwritten += 1;
    }

    fn store(&mut self, which: usize) {
        let others = self.total - self.lengths[which];
        let mut length = self.length();
        while others + length > self.mark {
            length = self.length();
        }
        let key = format!("churn {which}");
        let value = &self.bytes[..length as usize];
        let answer = self.connection.ask(&set(key.as_bytes(), value)).expect("answered");
        assert_eq!(
            answer,
            Answer::Stored,
            "{length} bytes, {} stored, {} overwrites",
            self.total,
            self.overwritten
        );
        self.lengths[which] = length;
        self.total = others + length;
    }

    /// Spread evenly over the powers of two, so that small ones are many.
    fn length(&mut self) -> u64 {
        let power = self.random.between(10, 19);
        self.random.between(1 << power, 2 << power)
    }
}

fn check(store: &Store) {
    let check = store.place().tools_by_name(&["check"]);
    let said = String::from_utf8_lossy(&check.stdout).into_owned() + &String::from_utf8_lossy(&check.stderr);
    assert!(check.status.success(), "kvs-tools check: {}\n{said}", check.status);
}
