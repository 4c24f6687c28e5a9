//! The promise: the store behaves like a map from keys to values, whatever is done in whatever order.
//!
//! Method: a million random operations go through the real server in batches, over TCP and the unix socket in turn, and every answer is
//! held against a `HashMap`. Few keys, so that each is written often; lengths around every edge of the layout: nothing, the
//! last block of a slab, one byte more, block lists of one and many chunks. At the end, and after a restart, the whole contents are
//! compared. `KVS_OPERATIONS` sets how many, `KVS_SEED` repeats a run.

use std::collections::{BTreeSet, HashMap};

use kvs_core::limits::KEY_BYTES_MAX;
use kvs_core::wire::{ErrorCode, RequestBody, SetCondition};
use kvs_harness::connection::{Answer, Connection, get};
use kvs_harness::random::{Random, seed};
use kvs_harness::store::{Launch, Store};

const OPERATIONS_DEFAULT: u64 = 1_000_000;
/// A batch is sent as a whole before its answers are read, so it must fit the buffers on the way.
const BATCH_REQUESTS: usize = 256;
const BATCH_BYTES: usize = 64 << 10;
/// How many operations there are to one listing of keys.
const LIST_EVERY: u64 = 20_000;

type Model = HashMap<Vec<u8>, Vec<u8>>;

#[test]
fn store_under_random_operations_agrees_with_a_map() {
    let operations = std::env::var("KVS_OPERATIONS").ok().and_then(|text| text.parse().ok());
    let operations = operations.unwrap_or(OPERATIONS_DEFAULT);
    let store = Launch::new().capacity("1GiB").start();
    let mut run = Run::new(&store);
    while run.done < operations {
        run.batch();
    }
    run.compare_all(&store);
    println!("{} operations, {} keys in the end", run.done, run.model.len());
    let model = std::mem::take(&mut run.model);
    drop(run);
    let store = store.restart();
    assert_eq!(store.ready().entries, model.len() as u64);
    compare(&mut store.connect(), &model);
}

struct Run {
    random: Random,
    keys: Vec<Vec<u8>>,
    model: Model,
    expected: Vec<(String, Answer)>,
    connections: [Connection; 2],
    batches: usize,
    done: u64,
}

impl Run {
    fn new(store: &Store) -> Self {
        let mut random = Random::new(seed());
        let keys: BTreeSet<Vec<u8>> = (0..3_000).map(|which| random_key(which, &mut random)).collect();
        Self {
            random,
            keys: keys.into_iter().collect(),
            model: Model::new(),
            expected: Vec::new(),
            connections: [store.connect(), store.connect_unix()],
            batches: 0,
            done: 0,
        }
    }

    /// One batch, on the two connections in turn.
    fn batch(&mut self) {
        let which = self.batches % 2;
        self.batches += 1;
        let mut queued = 0;
        while self.expected.len() < BATCH_REQUESTS && queued < BATCH_BYTES {
            queued += self.one_operation(which);
            self.done += 1;
            if self.done.is_multiple_of(LIST_EVERY) {
                self.finish_batch(which);
                self.compare_list(which);
            }
        }
        self.finish_batch(which);
    }

    fn finish_batch(&mut self, which: usize) {
        let connection = &mut self.connections[which];
        connection.flush().expect("sent");
        for (what, expected) in self.expected.drain(..) {
            let (_, answer) = connection.receive().expect("answered");
            assert!(same(&answer, &expected), "{what}: {}, not {}", brief(&answer), brief(&expected));
        }
    }

    /// Queues an operation with the answer it must get; returns the bytes of its value.
    fn one_operation(&mut self, which: usize) -> usize {
        let key = self.keys[self.random.below(self.keys.len() as u64) as usize].clone();
        match self.random.below(20) {
            0..=7 => self.get(which, &key),
            8..=12 => self.set(which, key, SetCondition::Always),
            13..=14 => self.set(which, key, SetCondition::IfAbsent),
            15..=16 => self.delete(which, &key),
            _ => self.increment(which, key),
        }
    }

    fn expect(&mut self, operation: &str, key: &[u8], answer: Answer) {
        let start = &key[..key.len().min(20)];
        let what = format!("{operation} of {} ({} bytes)", start.escape_ascii(), key.len());
        self.expected.push((what, answer));
    }

    fn get(&mut self, which: usize, key: &[u8]) -> usize {
        self.connections[which].queue(&get(key));
        let value = self.model.get(key).cloned();
        let length = value.as_ref().map_or(0, Vec::len);
        self.expect("get", key, value.map_or(Answer::Missing, Answer::Value));
        length
    }

    fn set(&mut self, which: usize, key: Vec<u8>, condition: SetCondition) -> usize {
        let length = random_length(&mut self.random);
        let value = self.random.bytes(length);
        self.connections[which].queue(&RequestBody::Set { condition, key: &key, value: &value });
        if condition == SetCondition::IfAbsent && self.model.contains_key(&key) {
            self.expect("set if absent", &key, Answer::Exists);
        } else {
            self.expect("set", &key, Answer::Stored);
            self.model.insert(key, value);
        }
        length
    }

    fn delete(&mut self, which: usize, key: &[u8]) -> usize {
        self.connections[which].queue(&RequestBody::Delete { key });
        let removed = self.model.remove(key).is_some();
        self.expect("delete", key, if removed { Answer::Deleted } else { Answer::Missing });
        0
    }

    fn increment(&mut self, which: usize, key: Vec<u8>) -> usize {
        let by = match self.random.below(50) {
            0 => i64::MAX,
            1 => i64::MIN,
            _ => self.random.below(2_000) as i64 - 1_000,
        };
        self.connections[which].queue(&RequestBody::Increment { key: &key, by });
        let answer = match self.model.get(&key).map_or(Some(0), |value| decimal(value)) {
            None => Answer::Error(ErrorCode::NotANumber, String::new()),
            Some(number) => number
                .checked_add(by)
                .map_or(Answer::Error(ErrorCode::NumberRange, String::new()), Answer::Number),
        };
        self.expect("increment", &key, answer.clone());
        if let Answer::Number(number) = answer {
            self.model.insert(key, number.to_string().into_bytes());
        }
        0
    }

    /// Lists the keys with a short prefix, page by page, and compares them with the map's.
    fn compare_list(&mut self, which: usize) {
        let key = &self.keys[self.random.below(self.keys.len() as u64) as usize];
        let prefix = key[..key.len().min(2)].to_vec();
        let limit = self.random.between(1, 300) as u32;
        let listed = list(&mut self.connections[which], &prefix, limit);
        let expected: BTreeSet<Vec<u8>> =
            self.model.keys().filter(|key| key.starts_with(&prefix)).cloned().collect();
        assert!(listed == expected, "{} keys listed, not {}", listed.len(), expected.len());
    }

    fn compare_all(&mut self, store: &Store) {
        let mut connection = store.connect();
        compare(&mut connection, &self.model);
        for key in &self.keys {
            if !self.model.contains_key(key) {
                assert_eq!(connection.ask(&get(key)).expect("read"), Answer::Missing);
            }
        }
    }
}

/// The whole contents: the same keys, the same values.
fn compare(connection: &mut Connection, model: &Model) {
    let listed = list(connection, b"", 1_000);
    assert!(listed.len() == model.len(), "{} keys, not {}", listed.len(), model.len());
    for (key, value) in model {
        let Answer::Value(found) = connection.ask(&get(key)).expect("read") else {
            panic!("{} is not there", key.escape_ascii());
        };
        assert!(found == *value, "{}: {} bytes that differ", key.escape_ascii(), value.len());
    }
}

/// All keys with a prefix; a key that shows twice is a fault while nobody writes.
fn list(connection: &mut Connection, prefix: &[u8], limit: u32) -> BTreeSet<Vec<u8>> {
    let (mut keys, mut cursor) = (BTreeSet::new(), 0);
    loop {
        match connection.ask(&RequestBody::List { prefix, cursor, limit }).expect("listed") {
            Answer::Keys(page, next) => {
                for key in page {
                    assert!(keys.insert(key), "a key is listed twice");
                }
                match next {
                    Some(next) => cursor = next,
                    None => return keys,
                }
            }
            other => panic!("{other:?}"),
        }
    }
}

/// A key with a prefix it shares with others; a few are as long as keys may be.
fn random_key(which: u64, random: &mut Random) -> Vec<u8> {
    let length = match random.below(100) {
        0 => random.between(4_000, 4_200),
        1 if which < 300 => random.between(KEY_BYTES_MAX as u64 - 1, KEY_BYTES_MAX as u64),
        2..=9 => random.between(60, 300),
        10..=14 => 0,
        _ => random.between(6, 30),
    };
    let mut key = vec![b'a' + (which % 26) as u8];
    key.extend(random.bytes((length as usize).saturating_sub(1)));
    key
}

/// Mostly small, often at an edge, seldom large.
fn random_length(random: &mut Random) -> usize {
    let length = match random.below(20_000) {
        0 => random.between(2 << 20, 5 << 20),
        1..=20 => random.between(90_000, 110_000),
        21..=400 => random.between(3_900, 4_300),
        401..=600 => random.between(500, 20_000),
        601..=2_000 => 0,
        2_001..=8_000 => random.between(1, 16),
        _ => random.between(17, 120),
    };
    length as usize
}

/// A value that counts as a number: decimal, no longer than the longest number, and without a plus.
fn decimal(value: &[u8]) -> Option<i64> {
    let text = std::str::from_utf8(value).ok()?;
    text.parse().ok().filter(|_| value.len() <= 20 && !text.starts_with('+'))
}

/// Equal, but for the words of an error.
fn same(found: &Answer, expected: &Answer) -> bool {
    match (found, expected) {
        (Answer::Error(found, _), Answer::Error(expected, _)) => found == expected,
        _ => found == expected,
    }
}

fn brief(answer: &Answer) -> String {
    match answer {
        Answer::Value(value) if value.len() > 40 => format!("a value of {} bytes", value.len()),
        other => format!("{other:?}"),
    }
}
