//! Goal: a client that repeats what was not answered gets the answers, and leaves the store, of one that never lost a connection.
//! Method: batches of random requests in a session, in each of which the data server dies before a random store into the
//! segment, joining the session and recovering included; the next one recovers, and the client joins with the next attempt and
//! repeats the batch. Answers and contents are held against a map that knows nothing of any of that.

use proptest::prelude::*;

use super::context::Context;
use super::crashes::{Lives, Model, apply, key_of, request, stored};
use super::tests::{Answer, Client, NoStatistics, bytes_of, other};
use crate::check;
use crate::limits::{CAPACITY_BYTES_MIN, VALUE_BYTES_MAX_DEFAULT};
use crate::segment::SegmentView;
use crate::segment::layout::WorkerSlot;
use crate::session::Sessions;
use crate::sys::crash;
use crate::table::Table;
use crate::table::tests::Step;
use crate::wire::{RequestBody, SessionToken};

const TOKEN: SessionToken = SessionToken::new(*b"sixteen of bytes");
/// Numbers come round in the middle of it.
const NUMBER_FIRST: u32 = 200u32.wrapping_neg();

fn step() -> impl Strategy<Value = Step> {
    let key = 0u16..60;
    let length = prop_oneof![8 => 0usize..200, 1 => 200usize..5_000, 1 => 30_000usize..90_000];
    prop_oneof![
        4 => (key.clone(), length, any::<bool>()).prop_map(|(key, length, if_absent)| Step::Set { key, length, if_absent }),
        3 => key.clone().prop_map(|key| Step::Delete { key }),
        4 => (50u16..60, -9i64..9).prop_map(|(key, by)| Step::Increment { key, by }),
        1 => key.prop_map(|key| Step::Get { key }),
    ]
}

/// Some requests that go out together, and before which store the data server dies when it gets them first, and then again.
fn batch() -> impl Strategy<Value = (Vec<Step>, Vec<u64>)> {
    let deaths = prop_oneof![3 => 0u64..60, 3 => 0u64..400, 1 => Just(u64::MAX)];
    (proptest::collection::vec(step(), 1..12), proptest::collection::vec(deaths, 1..4))
}

struct Store {
    lives: Lives,
    attempt: u64,
}

impl Store {
    /// One life of a data server: joins, and serves the batch; dies before store number `stores`. None when it did.
    fn live(&mut self, stores: u64, number: u32, batch: &[(Step, Vec<u8>)]) -> Option<Vec<Answer>> {
        let segment = self.lives.segment.clone();
        let worker: &WorkerSlot = segment.memory().object(segment.regions().worker(0)).expect("exists");
        let table = Table::new(&segment).expect("sound");
        let sessions = Sessions::default();
        let context = Context::new(&table, worker, &NoStatistics, VALUE_BYTES_MAX_DEFAULT, 8);
        self.attempt += 1;
        let mut client = Client::greeted(&segment, context.with_sessions(&sessions));
        let answers = crash::die_before(stores, || converse(&mut client, self.attempt, number, batch));
        if answers.is_none() {
            self.lives.bury(client, &[0, 1, 3, 8]);
        } else {
            let Client { mut context, connection, .. } = client;
            connection.expect("open").close(&mut context).expect("sound");
            self.lives.recover();
        }
        answers
    }
}

fn converse(client: &mut Client<'_>, attempt: u64, number: u32, batch: &[(Step, Vec<u8>)]) -> Vec<Answer> {
    let joined = client.ask(&RequestBody::Session { token: TOKEN, attempt });
    let Answer::Other(text) = &joined else { panic!("{joined:?}") };
    assert!(text.starts_with("Session"), "{text}");
    let mut changes = 0;
    for (step, value) in batch {
        client.number_from(number.wrapping_add(changes));
        let key = key_of(step);
        let body = request(step, &key, value);
        changes += u32::from(body.is_change());
        client.send(&body);
    }
    batch.iter().map(|_| client.answer()).collect()
}

/// An error that is repeated has other words.
fn same(found: &Answer, expected: &Answer) -> bool {
    match (found, expected) {
        (Answer::Error(..), expected) => *expected == other("not a number"),
        (found, expected) => found == expected,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 300, ..ProptestConfig::default() })]
    #[test]
    fn session_whose_data_server_dies_before_any_store_is_exactly_once(
        batches in proptest::collection::vec(batch(), 60..120),
    ) {
        let mut store = Store { lives: Lives::new(8 * CAPACITY_BYTES_MIN), attempt: 0 };
        let (mut model, mut number) = (Model::new(), NUMBER_FIRST);
        for (salt, (steps, deaths)) in batches.into_iter().enumerate() {
            let batch: Vec<(Step, Vec<u8>)> = steps.into_iter().map(|step| {
                let value = match step {
                    Step::Set { length, .. } => bytes_of(length, salt as u8),
                    _ => Vec::new(),
                };
                (step, value)
            }).collect();
            let answers = deaths.into_iter().chain([u64::MAX]).find_map(|stores| store.live(stores, number, &batch));
            // A read that is repeated reads what is there then, so what it may say depends on when it was answered.
            for ((step, value), answer) in batch.iter().zip(answers.expect("the last life has no death")) {
                let expected = apply(step, &mut model, value.clone());
                let is_read = matches!(step, Step::Get { .. });
                prop_assert!(is_read || same(&answer, &expected), "{step:?}: {answer:?}, not {expected:?}");
                number = number.wrapping_add(u32::from(!is_read));
            }
        }
        let Lives { segment, deaths } = &store.lives;
        prop_assert!(*deaths > 20, "{deaths} deaths");
        for (key, value) in &model {
            let found = stored(segment, key);
            prop_assert_eq!(found.as_ref(), Some(value));
        }
        let totals = Table::new(segment).expect("sound").totals();
        prop_assert_eq!(totals.entries, model.len() as u64);
        let report = check::check_view(&SegmentView::of(segment)).expect("a header");
        prop_assert_eq!(report.sessions, 1);
    }
}
