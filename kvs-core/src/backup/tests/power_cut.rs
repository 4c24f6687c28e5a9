//! Goal: whenever the power goes, whatever of the un-synced reached the disk, loading finds what was acknowledged, and nothing that
//! was never there; and the store goes on from there to the next power cut.
//!
//! Method: random lives on a simulated disk; at every point of the history of the disk, several disks that a power cut there could
//! leave are loaded and held against the ledger. Some of them live on, and are cut again.

use std::time::{Duration, Instant};

use super::super::simulate::{Random, SimulatedDisk};
use super::history::{Store, Trouble};
use super::{contents, load_or_empty};
use crate::table::Table;

/// What was tried.
#[derive(Debug, Default, Clone, Copy)]
struct Tally {
    histories: u64,
    /// Points in time of a power cut.
    points: u64,
    /// Disks that were loaded.
    disks: u64,
    /// Disks with a torn end; those that had to be loaded again for it.
    torn: u64,
    again: u64,
    /// Histories that began with such a disk.
    later_lives: u64,
}

/// Disks tried at each point.
const DISKS: u64 = 3;

fn explore(seed: u64, tally: &mut Tally) {
    let mut random = Random::new(seed);
    let mut store = Store::new(1 + random.below(3));
    let trouble = match random.below(4) {
        0 => Trouble { kills: 0, faults: 40 },
        1 => Trouble { kills: 30, faults: 0 },
        2 => Trouble { kills: 100, faults: 0 },
        _ => Trouble::default(),
    };
    let disk = SimulatedDisk::default();
    let steps = 20 + random.below(150) as usize;
    store.live(&disk, &mut random, steps, trouble);
    let mut explorer = Explorer { seed, random, tally };
    explorer.every_point(&disk, &store, DISKS, 2);
}

struct Explorer<'t> {
    seed: u64,
    random: Random,
    tally: &'t mut Tally,
}

impl Explorer<'_> {
    fn every_point(&mut self, disk: &SimulatedDisk, store: &Store, disks: u64, depth: u64) {
        self.tally.histories += 1;
        let mut replay = disk.replay();
        loop {
            self.tally.points += 1;
            for _ in 0..disks {
                let left = replay.cut(&mut self.random);
                self.look(&left, store, replay.at(), depth);
            }
            if !replay.step() {
                break;
            }
        }
    }

    /// Loads what a power cut left, and goes on with it now and then.
    fn look(&mut self, left: &SimulatedDisk, store: &Store, at: usize, depth: u64) {
        self.tally.disks += 1;
        let where_ = format!("seed {}, depth {depth}, after operation {at}", self.seed);
        let loaded = load_or_empty(left, store.workers).unwrap_or_else(|error| panic!("{where_}: {error}"));
        self.tally.torn += u64::from(loaded.torn);
        self.tally.again += u64::from(loaded.again);
        let found = contents(&Table::new(&loaded.segment).expect("sound"));
        store.ledger.verify(&found, at).unwrap_or_else(|violation| panic!("{where_}: {violation}"));
        if depth > 0 && self.random.one_in(24) {
            self.tally.later_lives += 1;
            let ledger = store.ledger.after(&found);
            let mut next = Store { segment: loaded.segment, workers: store.workers, ledger };
            let kills = [0, 20][self.random.below(2) as usize];
            let steps = 5 + self.random.below(25) as usize;
            next.live(left, &mut self.random, steps, Trouble { kills, faults: 0 });
            self.every_point(left, &next, 1, depth - 1);
        }
    }
}

fn seed() -> Option<u64> {
    std::env::var("KVS_SEED").ok().and_then(|text| text.parse().ok())
}

#[test]
fn power_cut_sample_of_points_loses_nothing_acknowledged_and_invents_nothing() {
    let mut tally = Tally::default();
    let begun = Instant::now();
    for seed in seed().map_or(0..u64::MAX, |seed| seed..seed + 1) {
        explore(seed, &mut tally);
        if begun.elapsed() > Duration::from_secs(8) {
            break;
        }
    }
    assert!(tally.torn > 0 && tally.later_lives > 0, "{tally:?}");
}

#[test]
#[ignore = "takes minutes; cargo test --release -p kvs-core power_cut -- --ignored --nocapture"]
fn power_cut_at_every_point_loses_nothing_acknowledged_and_invents_nothing() {
    let histories = std::env::var("KVS_HISTORIES").ok().and_then(|text| text.parse().ok()).unwrap_or(300);
    let mut tally = Tally::default();
    let begun = Instant::now();
    for seed in seed().map_or(1_000_000..1_000_000 + histories, |seed| seed..seed + 1) {
        explore(seed, &mut tally);
    }
    println!("{tally:#?} in {:.0?}", begun.elapsed());
    assert!(tally.points > 10_000, "{tally:?}");
}
