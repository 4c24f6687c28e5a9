//! Goal: whatever instruction a data server dies at, recovery leaves a segment without a fault, and each request has happened
//! wholly or not at all. Method: random requests over a connection, each made to die before a random store into the
//! segment; then recovery as the next data server does it, the verifier, and the model.

use std::collections::HashMap;

use proptest::prelude::*;

use super::tests::{Answer, Client, other};
use crate::check;
use crate::connection::Connection;
use crate::connection::context::Context;
use crate::limits::{CAPACITY_BYTES_MIN, VALUE_BYTES_MAX_DEFAULT};
use crate::recover;
use crate::segment::layout::WorkerSlot;
use crate::segment::{Segment, SegmentView};
use crate::sys::crash;
use crate::table::Table;
use crate::table::tests::Step;
use crate::wire::{RequestBody, SetCondition};

pub(super) type Model = HashMap<Vec<u8>, Vec<u8>>;

pub(super) fn key_of(step: &Step) -> Vec<u8> {
    let (Step::Set { key, .. } | Step::Delete { key } | Step::Increment { key, .. } | Step::Get { key }) =
        step;
    format!("key {key}").into_bytes()
}

/// Does it to the model; returns the answer.
pub(super) fn apply(step: &Step, model: &mut Model, value: Vec<u8>) -> Answer {
    let key = key_of(step);
    match step {
        Step::Set { if_absent: true, .. } if model.contains_key(&key) => other("Exists"),
        Step::Set { .. } => {
            model.insert(key, value);
            other("Stored")
        }
        Step::Delete { .. } => other(if model.remove(&key).is_some() { "Deleted" } else { "Missing" }),
        Step::Get { .. } => model.get(&key).map_or(other("Missing"), |value| Answer::Value(value.clone())),
        Step::Increment { by, .. } => {
            let old = model.get(&key).map(|value| String::from_utf8_lossy(value).parse::<i64>());
            match old.unwrap_or(Ok(0)) {
                Ok(old) => {
                    model.insert(key, (old + by).to_string().into_bytes());
                    Answer::Number(old + by)
                }
                Err(_) => other("not a number"),
            }
        }
    }
}

fn step() -> impl Strategy<Value = (Step, u64)> {
    let key = 0u16..1500;
    let length = prop_oneof![6 => 0usize..200, 2 => 200usize..5_000, 2 => 30_000usize..150_000];
    let step = prop_oneof![
        6 => (key.clone(), length, any::<bool>()).prop_map(|(key, length, if_absent)| Step::Set { key, length, if_absent }),
        2 => key.clone().prop_map(|key| Step::Delete { key }),
        1 => (1490u16..1500, -9i64..9).prop_map(|(key, by)| Step::Increment { key, by }),
        1 => key.prop_map(|key| Step::Get { key }),
    ];
    // Small changes have a few dozen stores, large ones hundreds.
    (step, prop_oneof![4 => 0u64..60, 2 => 0u64..600, 1 => Just(u64::MAX)])
}

/// A segment over which data servers live and die.
pub(super) struct Lives {
    pub(super) segment: Segment,
    /// Of those that served.
    pub(super) deaths: u32,
}

impl Lives {
    pub(super) fn new(capacity: u64) -> Self {
        let segment = Segment::on_heap(capacity).expect("heap memory");
        segment.claim_worker(0).expect("heap memory");
        Self { segment, deaths: 0 }
    }

    /// What a data server does that finds the segment of a dead one and no socket.
    pub(super) fn recover(&self) {
        let table = Table::new(&self.segment).expect("sound");
        recover::take_over(&table).expect("sound");
        assert_sound(&self.segment, "logs are completed");
        // Which takes over once more, and changes nothing by that.
        recover::recover(&table).expect("sound");
        assert_sound(&self.segment, "all is given back");
    }

    /// The one that served is dead, with its `client`. Those after it die in recovery before these stores; the last one doesn't.
    pub(super) fn bury(&mut self, client: Client<'_>, stores: &[u64]) {
        self.deaths += 1;
        // Its descriptors and its heap are gone with the process.
        std::mem::forget(client);
        for stores in stores {
            crash::die_before(*stores, || self.recover());
        }
        self.recover();
    }
}

pub(super) fn assert_sound(segment: &Segment, when: &str) {
    let report = check::check_view(&SegmentView::of(segment)).expect("a header");
    assert_eq!(report.faults, Vec::<String>::new(), "{when}");
}

struct Dying {
    lives: Lives,
    model: Model,
}

impl Dying {
    /// Takes requests over one connection until one of them dies; returns how many.
    fn live(&mut self, steps: &[(Step, u64)]) -> usize {
        let segment = self.lives.segment.clone();
        let worker: &WorkerSlot = segment.memory().object(segment.regions().worker(0)).expect("exists");
        let table = Table::new(&segment).expect("sound");
        let context = Context::new(&table, worker, &super::tests::NoStatistics, VALUE_BYTES_MAX_DEFAULT, 8);
        let mut client = Client::greeted(&segment, context);
        for (index, (step, stores)) in steps.iter().enumerate() {
            let key = key_of(step);
            let value = match step {
                Step::Set { length, .. } => super::tests::bytes_of(*length, index as u8),
                _ => Vec::new(),
            };
            let answer = crash::die_before(*stores, || client.ask(&request(step, &key, &value)));
            let mut after = self.model.clone();
            let expected = apply(step, &mut after, value);
            match answer {
                Some(Answer::Error(..)) if expected == other("not a number") => {}
                Some(answer) => {
                    assert_eq!(answer, expected, "{step:?}");
                    self.model = after;
                }
                None => {
                    self.lives.bury(client, &[0, 1, 2, 5, 11]);
                    let found = stored(&segment, &key);
                    let (before, after) = (self.model.get(&key).cloned(), after.get(&key).cloned());
                    assert!(found == before || found == after, "{step:?} happened by half");
                    match found {
                        Some(value) => self.model.insert(key, value),
                        None => self.model.remove(&key),
                    };
                    return index + 1;
                }
            }
        }
        let Client { mut context, connection, .. } = client;
        connection
            .map(|connection: Connection<'_>| connection.close(&mut context))
            .transpose()
            .expect("sound");
        steps.len()
    }
}

pub(super) fn request<'a>(step: &Step, key: &'a [u8], value: &'a [u8]) -> RequestBody<'a> {
    match step {
        Step::Set { if_absent, .. } => {
            let condition = if *if_absent { SetCondition::IfAbsent } else { SetCondition::Always };
            RequestBody::Set { condition, key, value }
        }
        Step::Delete { .. } => RequestBody::Delete { key },
        Step::Increment { by, .. } => RequestBody::Increment { key, by: *by },
        Step::Get { .. } => RequestBody::Get { key },
    }
}

pub(super) fn stored(segment: &Segment, key: &[u8]) -> Option<Vec<u8>> {
    crate::table::tests::get(&Table::new(segment).expect("sound"), key)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 200, ..ProptestConfig::default() })]
    #[test]
    fn crash_before_any_store_leaves_all_or_nothing(steps in proptest::collection::vec(step(), 400..800)) {
        let mut dying = Dying { lives: Lives::new(4 * CAPACITY_BYTES_MIN), model: Model::new() };
        let mut rest = &steps[..];
        while !rest.is_empty() {
            let lived = dying.live(rest);
            rest = &rest[lived..];
        }
        let Lives { segment, deaths } = &dying.lives;
        prop_assert!(*deaths > 50, "{deaths} deaths");
        for (key, value) in &dying.model {
            let found = stored(segment, key);
            prop_assert_eq!(found.as_ref(), Some(value));
        }
        let totals = Table::new(segment).expect("sound").totals();
        prop_assert_eq!(totals.entries, dying.model.len() as u64);
    }
}
