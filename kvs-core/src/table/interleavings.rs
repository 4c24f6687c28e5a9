//! Goal: no interleaving of a lock-free read with a change gives a reader anything but what was there at some moment of
//! its read. Method: `shuttle` switches threads at every access to shared memory, in random order and, for the
//! growth step, with few preemptions at the worst places (PCT); one thread changes, others read.
//!
//! ```text
//! cargo test --release -p kvs-core --features shuttle
//! ```

use std::sync::Arc;

use shuttle::thread;

use super::geometry::Geometry;
use super::view::ReadError;
use super::*;
use crate::limits::CAPACITY_BYTES_MIN;

/// Shards so small that a few inserts make them grow.
fn small_table(homes: u32) -> Arc<Table> {
    let segment = Segment::on_heap(CAPACITY_BYTES_MIN).expect("heap memory");
    for index in 0..segment.regions().shard_count {
        let shard = segment.shard(index).expect("exists");
        segment.memory().store(&shard.geometry, Geometry { homes, frontier: homes }.word());
    }
    Arc::new(Table::new(&segment).expect("just made"))
}

fn slot_of(table: &Table) -> &WorkerSlot {
    table.segment().memory().object(table.segment().regions().worker(0)).expect("exists")
}

fn set(table: &Table, key: &[u8], value: &[u8]) {
    let mut transaction = Transaction::begin(table.segment(), slot_of(table));
    table.set(&mut transaction, table.hash_of(key), key, value, SetCondition::Always).expect("room");
    transaction.commit().expect("small");
}

fn delete(table: &Table, key: &[u8]) {
    let mut transaction = Transaction::begin(table.segment(), slot_of(table));
    table.delete(&mut transaction, table.hash_of(key), key).expect("sound");
    transaction.commit().expect("small");
}

/// None when writers were faster every time; else what was found.
fn get(table: &Table, key: &[u8]) -> Option<Option<Vec<u8>>> {
    let read = table.view().read(table.hash_of(key), key, |value| {
        let mut bytes = vec![0; value.length() as usize];
        value.copy_to(0, &mut bytes)?;
        Ok(bytes)
    });
    match read {
        Ok(found) => Some(found),
        Err(ReadError::Contended) => None,
        Err(ReadError::Damaged(damaged)) => panic!("{damaged}"),
    }
}

/// Keys of one shard, so that they share its slabs and buckets.
fn keys_of_shard(table: &Table, count: usize) -> Vec<Vec<u8>> {
    let all = (0u32..).map(|number| format!("key {number}").into_bytes());
    all.filter(|key| table.hash_of(key).shard(4) == 1).take(count).collect()
}

/// A value that shows when it is torn: one byte again and again.
fn value_of(number: u8) -> Vec<u8> {
    vec![number; 24]
}

fn number_of(value: &[u8]) -> u8 {
    assert!(value.len() == 24 && value.iter().all(|&byte| byte == value[0]), "torn: {value:?}");
    value[0]
}

/// A key is replaced again and again, its block freed and used for its neighbour: readers see values that only go up.
fn replaced_while_read() {
    let table = small_table(4);
    let keys = keys_of_shard(&table, 2);
    set(&table, &keys[0], &value_of(1));
    let readers: Vec<_> = (0..2)
        .map(|_| {
            let (table, key) = (Arc::clone(&table), keys[0].clone());
            thread::spawn(move || {
                let mut last = 0;
                for _ in 0..3 {
                    if let Some(found) = get(&table, &key) {
                        let number = number_of(&found.expect("it was never deleted"));
                        assert!(number >= last, "went back from {last} to {number}");
                        last = number;
                    }
                }
            })
        })
        .collect();
    for number in 2..6 {
        set(&table, &keys[0], &value_of(number));
        set(&table, &keys[1], &value_of(100 + number));
    }
    readers.into_iter().for_each(|reader| reader.join().expect("a reader"));
}

/// A key is deleted and another one takes its block: whoever reads the first never gets the second's value.
fn deleted_while_read() {
    let table = small_table(4);
    let keys = keys_of_shard(&table, 2);
    set(&table, &keys[0], &value_of(1));
    let reader = {
        let (table, keys) = (Arc::clone(&table), keys.clone());
        thread::spawn(move || {
            let mut gone = false;
            for _ in 0..3 {
                match get(&table, &keys[0]) {
                    None => {}
                    Some(None) => gone = true,
                    Some(Some(value)) => assert!(number_of(&value) == 1 && !gone),
                }
            }
        })
    };
    delete(&table, &keys[0]);
    set(&table, &keys[1], &value_of(2));
    reader.join().expect("the reader");
}

/// A shard grows while keys that are there all the time are read: each is found every time.
fn grown_while_read() {
    let table = small_table(2);
    let keys = keys_of_shard(&table, 14);
    keys[..11].iter().for_each(|key| set(&table, key, &value_of(7)));
    let reader = {
        let (table, keys) = (Arc::clone(&table), keys.clone());
        thread::spawn(move || {
            for key in &keys[..11] {
                assert!(!matches!(get(&table, key), Some(None)), "lost while the shard grew");
            }
        })
    };
    let shard = table.segment().shard(1).expect("exists");
    let before = shard.geometry.load();
    keys[11..].iter().for_each(|key| set(&table, key, &value_of(7)));
    assert_ne!(shard.geometry.load(), before, "it did not grow");
    reader.join().expect("the reader");
}

/// A scan runs while the shard grows: what was there from its start to its end is visited once.
fn grown_while_scanned() {
    let table = small_table(2);
    let keys = keys_of_shard(&table, 14);
    keys[..11].iter().for_each(|key| set(&table, key, &value_of(7)));
    let scanner = {
        let (table, keys) = (Arc::clone(&table), keys.clone());
        thread::spawn(move || {
            let (mut seen, mut cursor) = (Vec::new(), Some(1 << 56));
            while let Some(at) = cursor.filter(|at| TableView::shard_of_cursor(*at) == 1) {
                match table.view().scan(at, 1, &mut |key| seen.push(key.to_vec())) {
                    Ok(next) => cursor = next,
                    Err(ReadError::Contended) => {}
                    Err(error) => panic!("{error}"),
                }
            }
            for key in &keys[..11] {
                assert_eq!(seen.iter().filter(|other| *other == key).count(), 1);
            }
        })
    };
    keys[11..].iter().for_each(|key| set(&table, key, &value_of(7)));
    scanner.join().expect("the scanner");
}

#[test]
fn interleavings_replaced_while_read() {
    shuttle::check_random(replaced_while_read, 600);
    shuttle::check_pct(replaced_while_read, 300, 4);
}

#[test]
fn interleavings_deleted_while_read() {
    shuttle::check_random(deleted_while_read, 600);
    shuttle::check_pct(deleted_while_read, 300, 4);
}

#[test]
fn interleavings_grown_while_read() {
    shuttle::check_random(grown_while_read, 600);
    shuttle::check_pct(grown_while_read, 300, 4);
}

#[test]
fn interleavings_grown_while_scanned() {
    shuttle::check_random(grown_while_scanned, 300);
    shuttle::check_pct(grown_while_scanned, 200, 4);
}
