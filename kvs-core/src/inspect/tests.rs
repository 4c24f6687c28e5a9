//! Goal: the figures are those of what was put in. Method: a segment on the heap, filled with known things.

use super::*;
use crate::check;
use crate::limits::CAPACITY_BYTES_MIN;
use crate::segment::Segment;
use crate::table::Table;
use crate::table::tests::set;
use crate::table::view::ReadError;
use crate::transaction::Recovered;
use crate::wire::SetCondition;

fn filled() -> Segment {
    let segment = Segment::on_heap(CAPACITY_BYTES_MIN).expect("heap memory");
    segment.claim_worker(0).expect("heap memory");
    let table = Table::new(&segment).expect("just made");
    for key in 0..1000u32 {
        let key = format!("key {key}");
        set(&table, key.as_bytes(), key.as_bytes(), SetCondition::Always).expect("room");
    }
    set(&table, b"large", &vec![7; 100_000], SetCondition::Always).expect("room");
    segment
}

#[test]
fn inspect_figures_add_up() {
    let segment = filled();
    let view = SegmentView::of(&segment);
    let memory = memory::figures(&view).expect("sound");
    assert_eq!(memory.reserved_bytes, memory.fixed_bytes + memory.bucket_bytes + memory.extent_bytes);
    assert_eq!(memory.extent_bytes, memory.slab_bytes + memory.block_bytes + memory.free_bytes);
    assert_eq!(memory.classes.iter().map(|class| class.used).sum::<u64>(), 1001);
    let report = check::check_view(&view).expect("sound");
    assert_eq!(memory.extent_bytes, report.extents * (2 << 20));
    let shards: Vec<_> = (0..4).map(|index| shards::figures(&view, index).expect("sound")).collect();
    assert_eq!(shards.iter().map(|shard| shard.entries).sum::<u64>(), report.entries);
    for shard in &shards {
        let in_buckets: u64 = (0..).zip(shard.occupancy).map(|(used, buckets)| used * buckets).sum();
        assert_eq!(in_buckets, shard.entries);
        assert!((1..=64).contains(&shard.longest_probe()) && shard.fill_percent() < 100.0);
    }
    assert!(shards::figures(&view, 4).is_err());
    let classes: u64 =
        (0..4).flat_map(|index| shards::classes(&view, index).expect("sound")).map(|class| class.used).sum();
    assert_eq!(classes, 1001);
    let workers = slots::workers(&view).expect("sound");
    assert_eq!((workers.len(), &workers[0].intent, workers[0].garbage), (1, &Recovered::Nothing, 0));
    assert_eq!(slots::connections(&view).expect("sound"), []);
}

#[test]
fn inspect_entries_are_those_of_the_table() {
    let segment = filled();
    let view = SegmentView::of(&segment);
    let mut seen = std::collections::BTreeMap::new();
    entries::for_each(&view, |key, value| {
        seen.insert(key.to_vec(), value.to_vec());
        Ok::<_, ReadError>(())
    })
    .expect("sound");
    assert_eq!((seen.len(), seen[&b"key 7"[..]].as_slice()), (1001, &b"key 7"[..]));
    let large = entries::entry(&view, b"large").expect("sound").expect("there");
    assert_eq!((large.value.len(), large.checksum_fits), (100_000, true));
    assert!(large.chunks > 0 && large.chunk_bytes <= 100_016 && large.bucket >= large.home);
    assert_eq!(entries::entry(&view, b"nothing"), Ok(None));
}
