//! Goal: a segment as the store leaves it has no fault; one changed word that matters is one; nothing at all makes the walk
//! crash. Method: a filled segment on the heap, words changed one by one.

use proptest::prelude::*;

use super::*;
use crate::arena::block_list::BlockList;
use crate::connection::ring::{RING_ORDER, Ring};
use crate::connection::slot;
use crate::control::{Adopted, Transport};
use crate::limits::CAPACITY_BYTES_MIN;
use crate::segment::layout::{ConnectionSlot, PAGE_BYTES, Shard};
use crate::sys::memory::{Offset, Word};
use crate::table::Table;
use crate::table::bucket::{Bucket, Slot};
use crate::table::tests::set;
use crate::transaction::Transaction;
use crate::wire::SetCondition;

/// A segment with a bit of everything: small and large values, one of them replaced and not freed, a connection with
/// buffers and a list.
fn filled() -> Segment {
    let segment = Segment::on_heap(CAPACITY_BYTES_MIN).expect("heap memory");
    segment.claim_worker(0).expect("heap memory");
    let table = Table::new(&segment).expect("just made");
    for key in 0..3000u32 {
        put(&table, format!("key {key}").as_bytes(), &vec![b'v'; key as usize % 700]);
    }
    for key in 0..4u32 {
        put(&table, format!("large {key}").as_bytes(), &vec![b'l'; 70_000 + 9_000 * key as usize]);
    }
    for key in 0..1000u32 {
        delete(&table, format!("key {key}").as_bytes());
    }
    delete(&table, b"large 0");
    let adopted = Adopted { connection: 7, transport: Transport::Unix };
    let slot = slot::open(&segment, 0, adopted).expect("heap memory");
    let worker = worker(&segment);
    Ring::take(&segment, worker, &slot.input, RING_ORDER).expect("room");
    let list = BlockList::create(&segment, worker, &slot.outgoing, 100_000).expect("room");
    list.space(worker).expect("room");
    segment
}

fn worker(segment: &Segment) -> &WorkerSlot {
    segment.memory().object(segment.regions().worker(0)).expect("exists")
}

fn put(table: &Table, key: &[u8], value: &[u8]) {
    assert!(set(table, key, value, SetCondition::Always).expect("room"));
}

fn delete(table: &Table, key: &[u8]) {
    let mut transaction = Transaction::begin(table.segment(), worker(table.segment()));
    assert!(table.delete(&mut transaction, table.hash_of(key), key).expect("a sound table"));
    transaction.commit().expect("small");
}

fn report_of(segment: &Segment) -> Report {
    check_view(&SegmentView::of(segment)).expect("a header")
}

#[test]
fn check_of_a_sound_segment_finds_everything_and_no_fault() {
    let segment = filled();
    assert_ne!(worker(&segment).garbage.load(), 0, "a large value waits to be freed");
    let report = report_of(&segment);
    assert_eq!(report.faults, Vec::<String>::new());
    assert_eq!((report.fault_count, report.entries, report.connections), (0, 2003, 1));
    let totals = Table::new(&segment).expect("sound").totals();
    assert_eq!((report.entries, report.content_bytes), (totals.entries, totals.content_bytes));
}

/// The first slot in use: shard, bucket, the slot's word.
fn first_slot(segment: &Segment) -> (&Shard, &Bucket, &Word) {
    let shard = segment.shard(0).expect("exists");
    for index in 0.. {
        let offset = Offset::<Bucket>::new(segment.regions().bucket_region(0)).index(index);
        let bucket = segment.memory().object(offset).expect("a slot is in use");
        if let Some(word) = bucket.slots.iter().find(|word| word.load() != 0) {
            return (shard, bucket, word);
        }
    }
    unreachable!("the loop has no end of its own")
}

#[test]
fn check_tells_each_kind_of_damage() {
    type Change = fn(&Segment) -> (u64, u64);
    // Each gives the offset of a word and what it becomes.
    let cases: [(&str, Change, &str); 14] = [
        ("slot gone", |s| (place(s, first_slot(s).2), 0), "counts"),
        ("slot elsewhere", |s| (place(s, first_slot(s).2), first_slot(s).2.load() + 16), "slot"),
        ("another tag", |s| (place(s, first_slot(s).2), first_slot(s).2.load() ^ 1 << 50), "another hash"),
        ("value flipped", |s| (entry_of(s) + 16, 5), "checksum"),
        ("version flipped", |s| (entry_of(s), u64::MAX), "version"),
        ("unpublished", |s| (entry_of(s), 0), "not published"),
        ("entry counted twice", |s| (place(s, &first_slot(s).0.entries), 9999), "counts 9999 entries"),
        ("geometry", |s| (place(s, &first_slot(s).0.geometry), 0), "geometry"),
        ("partial list cut", |s| (place(s, partial(s)), 0), "partial list"),
        ("slabs counted", |s| (place(s, &s.shard(0).expect("exists").slabs[3]), 77), "counts 77 slabs"),
        ("free map", |s| (s.regions().free_map(0, 0), u64::MAX), "free map"),
        ("garbage lost", |s| (place(s, &worker(s).garbage), 0), "neither free nor anybody's"),
        ("ring lost", |s| (place(s, &connection(s).input.block), 0), "neither free nor anybody's"),
        ("reserved bytes", |s| (place(s, &s.header().expect("exists").reserved_bytes), 1), "reserved"),
    ];
    for (name, change, expected) in cases {
        let segment = filled();
        let (offset, value) = change(&segment);
        let word = segment.memory().word(offset).expect("inside");
        segment.memory().store(word, value);
        let report = report_of(&segment);
        let told = report.faults.iter().any(|fault| fault.contains(expected));
        assert!(told, "{name}: {:?}", report.faults);
    }
}

fn place(segment: &Segment, word: &Word) -> u64 {
    segment.memory().offset_of(word).expect("inside")
}

fn entry_of(segment: &Segment) -> u64 {
    Slot::decode(first_slot(segment).2.load()).expect("in use").offset
}

fn partial(segment: &Segment) -> &Word {
    segment
        .shard(0)
        .expect("exists")
        .partial
        .iter()
        .find(|word| word.load() != 0)
        .expect("some slab has room")
}

fn connection(segment: &Segment) -> &ConnectionSlot {
    segment.memory().object(segment.regions().connection(0)).expect("exists")
}

#[test]
fn check_of_a_copy_completes_what_was_decided() {
    let segment = filled();
    let table = Table::new(&segment).expect("just made");
    let mut transaction = Transaction::begin(&segment, worker(&segment));
    let hash = table.hash_of(b"another");
    table.set(&mut transaction, hash, b"another", b"value", SetCondition::Always).expect("room");
    transaction.decide_only();
    assert_eq!(report_of(&segment).entries, 2003);
    let report = check_copy(&segment).expect("a header");
    assert_eq!((report.faults, report.intents, report.entries), (Vec::new(), 1, 2004));
}

#[test]
fn check_of_a_log_that_contradicts_itself_says_so() {
    let segment = filled();
    segment.memory().store(&worker(&segment).intent, 0xdead_0003);
    let report = check_copy(&segment).expect("a header");
    assert!(report.faults[0].contains("contradicts itself"), "{:?}", report.faults);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn check_survives_any_words_anywhere(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), word()), 1..12),
        region in 0usize..5,
    ) {
        let segment = damaged(&changes, region);
        let report = check_copy(&segment).expect("a header");
        prop_assert!(report.faults.len() <= FAULTS_MAX);
    }

    #[test]
    fn table_survives_any_words_anywhere(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), word()), 1..12),
        region in 0usize..5,
    ) {
        let segment = damaged(&changes, region);
        let table = Table::new(&segment).expect("a header");
        // As attaching does. Whatever comes of the rest is an error at worst.
        segment.initialize_locks().expect("locks");
        for key in 0..200u32 {
            let key = format!("key {}", key * 15);
            let hash = table.hash_of(key.as_bytes());
            let _ = table.read(hash, key.as_bytes(), |value| Ok(value.length()));
            let _ = set(&table, key.as_bytes(), &vec![b'n'; hash.0 as usize % 600], SetCondition::Always);
            let mut transaction = Transaction::begin(&segment, worker(&segment));
            let _ = table.delete(&mut transaction, hash, key.as_bytes()).map(|_| transaction.commit());
        }
        let _ = set(&table, b"large 1", &[b'n'; 50_000], SetCondition::Always);
        let _ = table.collect_garbage(worker(&segment));
        let _ = table.scan(0, 1000, &mut |_| {});
        let _ = slot::release(&segment, worker(&segment), connection(&segment));
    }
}

/// A filled segment with some words of a region changed.
fn damaged(changes: &[(prop::sample::Index, u64)], region: usize) -> Segment {
    let segment = filled();
    let regions = *segment.regions();
    let (start, end) = [
        (0, PAGE_BYTES),
        (PAGE_BYTES, regions.free_maps),
        (regions.free_maps, regions.workers),
        (regions.buckets, regions.buckets + 20_000),
        (regions.data, regions.data + (4 << 20)),
    ][region];
    let memory = segment.memory();
    for (index, value) in changes {
        let offset = start + index.index(((end - start) / 8) as usize) as u64 * 8;
        memory.store(memory.word(offset).expect("inside"), *value);
    }
    segment
}

fn word() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        0u64..5000,
        Just(u64::MAX),
        // What looks like an offset, a slot, a chunk.
        (0u64..1 << 26, 0u64..1 << 16).prop_map(|(offset, tag)| (offset * 16) | (tag << 48)),
    ]
}
