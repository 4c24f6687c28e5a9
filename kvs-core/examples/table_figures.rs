//! Figures of the table alone, on a real segment: memory per entry, how far entries lie from their homes, and what
//! single inserts and lookups cost while it grows.
//!
//! ```text
//! cargo run --release -p kvs-core --example table_figures -- 10000000
//! ```

use std::path::PathBuf;
use std::time::Instant;

use kvs_core::segment::layout::{EXTENT_BYTES, WorkerSlot};
use kvs_core::segment::{self, Segment};
use kvs_core::table::geometry::Geometry;
use kvs_core::table::{KeyHash, Table};
use kvs_core::transaction::Transaction;
use kvs_core::wire::SetCondition;

const VALUE: [u8; 32] = [7; 32];

fn key_of(number: u64) -> [u8; 16] {
    let mut key = *b"key:000000000000";
    let mut rest = number;
    for digit in key[4..].iter_mut().rev() {
        *digit = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    key
}

fn insert(table: &Table, slot: &WorkerSlot, number: u64) {
    let key = key_of(number);
    let mut transaction = Transaction::begin(table.segment(), slot);
    table.set(&mut transaction, table.hash_of(&key), &key, &VALUE, SetCondition::Always).expect("room");
    transaction.commit().expect("small");
}

fn reaches(table: &Table) -> Vec<u64> {
    let shards = table.segment().regions().shard_count;
    let mut counts = vec![0; 128];
    for shard in 0..shards {
        let view = table.view();
        let word = view.shard(shard).expect("exists").geometry.load();
        let geometry = Geometry::decode(word).expect("sound");
        for home in 0..u64::from(geometry.homes) {
            counts[view.buckets(shard).header(home).expect("sound").reach as usize] += 1;
        }
    }
    counts
}

fn lookups(table: &Table, count: u64) -> f64 {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut target = [0u8; 32];
    let started = Instant::now();
    let tries = 2_000_000;
    for _ in 0..tries {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let key = key_of(state % count);
        let hash: KeyHash = table.hash_of(&key);
        let found = table.read(hash, &key, |value| value.copy_to(0, &mut target)).expect("sound");
        assert!(found.is_some() && target == VALUE);
    }
    started.elapsed().as_nanos() as f64 / f64::from(tries)
}

fn main() {
    let count: u64 =
        std::env::args().nth(1).map_or(1_000_000, |text| text.parse().expect("a number of entries"));
    let capacity = std::env::args().nth(2).map_or(1 << 30, |text| text.parse().expect("a capacity in bytes"));
    let path = PathBuf::from(format!("/dev/shm/kvs-figures-{}", std::process::id()));
    let segment = Segment::open_or_create(&path, capacity).expect("a segment").segment;
    let slot = segment.memory().object(segment.claim_worker(0).expect("memory")).expect("a slot");
    let table = Table::new(&segment).expect("a table");

    let mut latencies = Vec::with_capacity(count as usize);
    let started = Instant::now();
    for number in 0..count {
        let begun = Instant::now();
        insert(&table, slot, number);
        latencies.push(u32::try_from(begun.elapsed().as_nanos()).unwrap_or(u32::MAX));
    }
    let seconds = started.elapsed().as_secs_f64();
    latencies.sort_unstable();
    let at = |part: f64| f64::from(latencies[((count - 1) as f64 * part) as usize]) / 1000.0;
    println!("{count} inserts in {seconds:.2} s: {:.0} ns each", seconds * 1e9 / count as f64);
    println!(
        "insert latency: p50 {:.2} us, p99 {:.2} us, p99.99 {:.1} us, max {:.1} us",
        at(0.5),
        at(0.99),
        at(0.9999),
        at(1.0)
    );

    let totals = table.totals();
    let reserved = segment.header().expect("mapped").reserved_bytes.load();
    let overhead = (reserved - totals.content_bytes) as f64 / totals.entries as f64;
    println!("memory: {reserved} bytes, {overhead:.2} bytes an entry over key and value");
    let buckets: u64 = (0..segment.regions().shard_count)
        .map(|index| segment.shard(index).expect("exists").reserved_bytes.load())
        .sum();
    let extents = segment.header().expect("mapped").extents_reserved.load() * EXTENT_BYTES;
    let fixed = reserved - buckets - extents;
    println!("  of these: {extents} entries' extents, {buckets} buckets, {fixed} tables");
    let reaches = reaches(&table);
    let homes: u64 = reaches.iter().sum();
    let mean =
        reaches.iter().zip(0u64..).map(|(&homes, reach)| homes * reach).sum::<u64>() as f64 / homes as f64;
    let longest = reaches.iter().rposition(|&homes| homes > 0).unwrap_or(0);
    println!("reach: mean {mean:.3} buckets, longest {longest}");
    println!("random lookup: {:.0} ns", lookups(&table, count));
    drop(table);
    segment::remove(&path).or_else(|_| std::fs::remove_file(&path)).expect("remove the segment");
}
