//! Goal: the table does what a `HashMap` does, whatever the order of changes, the sizes and the growth, and leaves no
//! block behind. Method: random operations on a segment in this process's memory, held against the model; then all
//! is removed and every extent must be free again.
use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::arena::extents::free_in_extent;
use crate::limits::CAPACITY_BYTES_MIN;
use crate::segment::layout::ORDERS;

fn slot_of(segment: &Segment) -> &WorkerSlot {
    segment.memory().object(segment.regions().worker(0)).expect("worker slots exist")
}

/// Writes as the data server does: inline when it fits, else through a list.
pub(crate) fn set(
    table: &Table,
    key: &[u8],
    value: &[u8],
    condition: SetCondition,
) -> Result<bool, TableError> {
    let segment = table.segment();
    let (slot, hash) = (slot_of(segment), table.hash_of(key));
    if Table::fits_inline(key.len(), value.len()) {
        let mut transaction = Transaction::begin(segment, slot);
        let set = table.set(&mut transaction, hash, key, value, condition)?;
        transaction.commit()?;
        table.collect_garbage(slot)?;
        return Ok(set);
    }
    set_large(table, slot, key, value, condition)
}

/// Writes through a list, whatever the length.
pub(crate) fn set_large(
    table: &Table,
    worker: &WorkerSlot,
    key: &[u8],
    value: &[u8],
    condition: SetCondition,
) -> Result<bool, TableError> {
    let (segment, owner) = (table.segment(), &worker.loading);
    let mut content = key.to_vec();
    content.resize(key.len().next_multiple_of(8), 0);
    content.extend_from_slice(value);
    let list = BlockList::create(segment, worker, owner, content.len() as u64)?;
    if let Err(error) = list.append(worker, &content) {
        list.release(worker, owner)?;
        return Err(error.into());
    }
    let mut transaction = Transaction::begin(segment, worker);
    let set = table.set_assembled(&mut transaction, table.hash_of(key), key, &list, owner, condition);
    if let Ok(true) = set {
        transaction.commit()?;
    } else {
        drop(transaction);
        list.release(worker, owner)?;
    }
    table.collect_garbage(worker)?;
    set
}

pub(crate) fn get(table: &Table, key: &[u8]) -> Option<Vec<u8>> {
    let read = table.read(table.hash_of(key), key, |value| {
        let mut bytes = vec![0; value.length() as usize];
        // In two parts, so that positions inside of a value are tried too.
        let half = bytes.len() / 3;
        value.copy_to(0, &mut bytes[..half])?;
        value.copy_to(half as u64, &mut bytes[half..])?;
        Ok(bytes)
    });
    read.expect("a sound table")
}

fn delete(table: &Table, key: &[u8]) -> bool {
    let (segment, slot) = (table.segment(), slot_of(table.segment()));
    let mut transaction = Transaction::begin(segment, slot);
    let deleted = table.delete(&mut transaction, table.hash_of(key), key).expect("a sound table");
    transaction.commit().expect("small");
    table.collect_garbage(slot).expect("a sound table");
    deleted
}

fn increment(table: &Table, key: &[u8], by: i64) -> Result<i64, TableError> {
    let segment = table.segment();
    let mut transaction = Transaction::begin(segment, slot_of(segment));
    let sum = table.increment(&mut transaction, table.hash_of(key), key, by)?;
    transaction.commit()?;
    Ok(sum)
}

fn scan(table: &Table, homes_at_once: usize) -> Vec<Vec<u8>> {
    let (mut keys, mut cursor) = (Vec::new(), 0);
    while let Some(next) =
        table.scan(cursor, homes_at_once, &mut |key| keys.push(key.to_vec())).expect("a sound table")
    {
        cursor = next;
    }
    keys
}

fn table_of(capacity: u64) -> Table {
    Table::new(&Segment::on_heap(capacity).expect("heap memory")).expect("just made")
}

/// Bytes of data blocks that are not free.
pub(crate) fn bytes_in_use(segment: &Segment) -> u64 {
    let reserved = segment.header().expect("mapped").extents_reserved.load();
    let free: u64 = (0..reserved)
        .map(|index| {
            let extent = segment.memory().object(segment.regions().extent(index)).expect("in range");
            (0..ORDERS).map(|order| free_in_extent(extent)[order] * (4096 << order)).sum::<u64>()
        })
        .sum();
    reserved * (2 << 20) - free
}

/// Something that is done to a store.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    Set { key: u16, length: usize, if_absent: bool },
    Delete { key: u16 },
    Increment { key: u16, by: i64 },
    Get { key: u16 },
}

pub(crate) fn step() -> impl Strategy<Value = Step> {
    let length = prop_oneof![
        8 => 0usize..100,
        3 => 0usize..5_000,
        1 => 4_000usize..4_100,
        1 => 0usize..300_000,
    ];
    prop_oneof![
        6 => (0u16..600, length, any::<bool>()).prop_map(|(key, length, if_absent)| Step::Set { key, length, if_absent }),
        3 => (0u16..600).prop_map(|key| Step::Delete { key }),
        2 => (600u16..650, -5i64..100).prop_map(|(key, by)| Step::Increment { key, by }),
        1 => (0u16..650).prop_map(|key| Step::Get { key }),
    ]
}

/// Keys of all lengths, some with a common beginning, a few longer than a block.
fn key_of(number: u16) -> Vec<u8> {
    let mut key = format!("key:{number}").into_bytes();
    let length = match number % 50 {
        0 => 5_000,
        1 => 65_535,
        2..10 => 200,
        _ => key.len(),
    };
    key.resize(length.max(key.len()), b'x');
    key
}

fn run(
    table: &Table,
    model: &mut BTreeMap<Vec<u8>, Vec<u8>>,
    step: &Step,
    salt: usize,
) -> Result<(), TestCaseError> {
    match *step {
        Step::Set { key, length, if_absent } => {
            let key = key_of(key);
            let value: Vec<u8> = (0..length).map(|at| (at * 7 + salt) as u8).collect();
            let condition = if if_absent { SetCondition::IfAbsent } else { SetCondition::Always };
            let expected = !if_absent || !model.contains_key(&key);
            prop_assert_eq!(set(table, &key, &value, condition).expect("room"), expected);
            if expected {
                model.insert(key, value);
            }
        }
        Step::Delete { key } => {
            let key = key_of(key);
            prop_assert_eq!(delete(table, &key), model.remove(&key).is_some());
        }
        Step::Increment { key, by } => {
            let key = key_of(key);
            let before: i64 =
                model.get(&key).map_or(0, |value| String::from_utf8_lossy(value).parse().expect("a number"));
            prop_assert_eq!(increment(table, &key, by).expect("a number"), before + by);
            model.insert(key, (before + by).to_string().into_bytes());
        }
        Step::Get { key } => {
            let key = key_of(key);
            prop_assert_eq!(get(table, &key), model.get(&key).cloned());
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn table_random_changes_agree_with_a_map(steps in proptest::collection::vec(step(), 1..800)) {
        let table = table_of(256 << 20);
        let mut model = BTreeMap::new();
        for (salt, step) in steps.iter().enumerate() {
            run(&table, &mut model, step, salt)?;
        }
        for (key, value) in &model {
            let found = get(&table, key);
            prop_assert_eq!(found.as_ref(), Some(value));
        }
        let totals = table.totals();
        prop_assert_eq!(totals.entries, model.len() as u64);
        prop_assert_eq!(totals.content_bytes, model.iter().map(|(key, value)| (key.len() + value.len()) as u64).sum::<u64>());
        let keys = scan(&table, 3);
        prop_assert_eq!(keys.len(), model.len());
        prop_assert_eq!(keys.into_iter().collect::<BTreeSet<_>>(), model.keys().cloned().collect::<BTreeSet<_>>());
        for key in model.keys() {
            prop_assert!(delete(&table, key));
        }
        prop_assert_eq!(table.totals(), Totals::default());
        // Each shard may keep one empty slab of a class.
        let kept: u64 = (0..table.segment().regions().shard_count)
            .flat_map(|index| table.segment().shard(index).expect("exists").slabs.iter().map(Word::load))
            .sum();
        prop_assert_eq!(bytes_in_use(table.segment()), kept * slab::SLAB_BYTES);
    }
}

#[test]
fn table_grows_from_nothing_and_every_key_is_found_and_scanned_once() {
    let table = table_of(64 << 20);
    let key = |number: u32| number.to_string().into_bytes();
    let count = 200_000;
    let mut scanned = BTreeMap::new();
    let mut cursor = Some(0);
    for number in 0..count {
        assert!(set(&table, &key(number), &number.to_le_bytes(), SetCondition::IfAbsent).expect("room"));
        assert_eq!(get(&table, &key(number / 2)).as_deref(), Some(&(number / 2).to_le_bytes()[..]));
        // A scan that takes as long as the growth must not miss what was there before it began.
        if number >= 50_000 && number % 4 == 0 {
            cursor = cursor.and_then(|cursor| {
                table
                    .scan(cursor, 2, &mut |key| *scanned.entry(key.to_vec()).or_insert(0) += 1)
                    .expect("sound")
            });
        }
    }
    while let Some(at) = cursor {
        cursor =
            table.scan(at, 100, &mut |key| *scanned.entry(key.to_vec()).or_insert(0) += 1).expect("sound");
    }
    assert!((0..50_000).all(|number| scanned.get(&key(number)) == Some(&1)));
    assert!(scanned.values().all(|&times| times == 1));
    for number in 0..count {
        assert_eq!(get(&table, &key(number)).as_deref(), Some(&number.to_le_bytes()[..]), "{number}");
    }
    assert_eq!(get(&table, b"missing"), None);
    let longest = (0..4).map(|index| longest_reach(&table, index)).max().expect("shards");
    assert!(longest < 64, "an entry lies {longest} buckets from its home");
}

fn longest_reach(table: &Table, shard: u64) -> u64 {
    let view = table.view();
    let geometry =
        geometry::Geometry::decode(view.shard(shard).expect("exists").geometry.load()).expect("sound");
    (0..geometry.buckets())
        .map(|index| view.buckets(shard).header(index).expect("sound").reach)
        .max()
        .expect("buckets")
}

#[test]
fn table_full_says_so_keeps_all_and_takes_more_when_there_is_room() {
    let table = table_of(CAPACITY_BYTES_MIN);
    let key = |number: u32| format!("{number:08}").into_bytes();
    let mut stored = 0;
    let refused = loop {
        match set(&table, &key(stored), &[7; 100], SetCondition::Always) {
            Ok(_) => stored += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(refused, TableError::Full(_)), "{refused}");
    assert!(stored > 50_000, "{stored}");
    assert!(matches!(set(&table, b"large", &[1; 100_000], SetCondition::Always), Err(TableError::Full(_))));
    assert!((0..stored).all(|number| get(&table, &key(number)).is_some()));
    for number in 0..1000 {
        assert!(delete(&table, &key(number)));
    }
    for number in 0..500 {
        assert!(set(&table, &key(number), &[8; 100], SetCondition::Always).is_ok());
    }
    assert_eq!(table.totals().entries, u64::from(stored) - 500);
}

#[test]
fn table_increment_refuses_what_is_no_number_and_what_overflows() {
    let table = table_of(CAPACITY_BYTES_MIN);
    for odd in [
        &b"x"[..],
        b"",
        b"+1",
        b" 1",
        b"1 ",
        b"99999999999999999999999",
        b"9223372036854775808",
        b"1.0",
        b"\xff",
    ] {
        set(&table, b"n", odd, SetCondition::Always).expect("room");
        assert!(matches!(increment(&table, b"n", 1), Err(TableError::NotANumber)), "{odd:?}");
        assert_eq!(get(&table, b"n").as_deref(), Some(odd));
    }
    set(&table, b"n", b"9223372036854775807", SetCondition::Always).expect("room");
    assert!(matches!(increment(&table, b"n", 1), Err(TableError::NumberRange)));
    assert_eq!(increment(&table, b"n", -1).expect("in range"), i64::MAX - 1);
    assert_eq!(increment(&table, b"m", i64::MIN).expect("in range"), i64::MIN);
    assert!(matches!(increment(&table, b"m", -1), Err(TableError::NumberRange)));
}

#[test]
fn table_quarantined_shard_refuses_and_the_others_serve() {
    let table = table_of(CAPACITY_BYTES_MIN);
    for number in 0..100u32 {
        set(&table, &number.to_le_bytes(), b"v", SetCondition::Always).expect("room");
    }
    let shard = table.segment().shard(1).expect("exists");
    table.segment().memory().store(&shard.geometry, 0);
    let results: Vec<bool> = (0..100u32)
        .map(|number| {
            let key = number.to_le_bytes();
            table.read(table.hash_of(&key), &key, |value| Ok(value.length())).is_ok()
        })
        .collect();
    assert!(results.iter().any(|&served| served) && results.iter().any(|&served| !served));
    assert_eq!(shard.quarantined.load(), 1);
}

#[test]
fn table_entries_have_fitting_checksums() {
    let table = table_of(CAPACITY_BYTES_MIN);
    set(&table, b"small", b"value", SetCondition::Always).expect("room");
    set(&table, b"large", &vec![5; 70_001], SetCondition::Always).expect("room");
    for key in [&b"small"[..], b"large"] {
        let fits = table.view().find(table.hash_of(key), key, |place| place.entry.checksum_fits());
        assert_eq!(fits, Ok(Some(true)));
    }
}
