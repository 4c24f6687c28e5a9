//! Goal: results are found again and never mistaken for others, and records go to those who should have them. Method: a window
//! against a map, over numbers that come round, jump and are looked up again; a registry on a segment whose heads are set by hand.

use std::collections::HashMap;

use proptest::prelude::*;

use super::record::{Known, Ledger, Outcome};
use super::registry::JoinError;
use super::*;
use crate::connection::slot;
use crate::control::{Adopted, Transport};
use crate::limits::{CAPACITY_BYTES_MIN, SESSION_KEPT, SESSION_WINDOW, SESSIONS_MAX};
use crate::wire::{ErrorCode, SessionToken};

fn segment() -> Segment {
    let segment = Segment::on_heap(CAPACITY_BYTES_MIN).expect("heap memory");
    segment.claim_worker(0).expect("heap memory");
    segment
}

fn worker(segment: &Segment) -> &WorkerSlot {
    segment.memory().object(segment.regions().worker(0)).expect("exists")
}

fn connect(segment: &Segment, index: u64) -> &ConnectionSlot {
    let adopted = Adopted { connection: 100 + index, transport: Transport::Tcp };
    slot::open(segment, index, adopted).expect("heap memory")
}

fn token(number: u64) -> SessionToken {
    SessionToken::from_words([number, 77])
}

/// Joins as a connection does; the record and whether the session was known.
fn join(
    sessions: &Sessions,
    segment: &Segment,
    slot: &ConnectionSlot,
    (number, attempt): (u64, u64),
) -> Result<(SessionIndex, bool), JoinError> {
    let mut known = None;
    let places = (worker(segment), slot);
    let member = sessions.join(segment, places, (token(number), attempt), |transaction, resumed| {
        known = Some(resumed);
        transaction.commit().map_err(JoinError::from)
    })?;
    Ok((member.index(), known.expect("decided")))
}

fn leave_slot(sessions: &Sessions, segment: &Segment, slot: &ConnectionSlot) {
    let member = Membership::of(segment, slot).expect("sound").expect("it has one");
    let leave = || leave(segment, worker(segment), slot, now_ms());
    sessions.leave(&member, leave).expect("sound");
}

fn head(segment: &Segment, index: SessionIndex) -> &SessionHead {
    segment.memory().object(segment.regions().session_head(index)).expect("exists")
}

#[test]
fn session_is_found_again_by_its_token_and_by_its_slot() {
    let segment = segment();
    let sessions = Sessions::default();
    let (first, second) = (connect(&segment, 0), connect(&segment, 1));
    assert_eq!(join(&sessions, &segment, first, (1, 1)).expect("room"), (0, false));
    assert_eq!(join(&sessions, &segment, second, (2, 1)).expect("room"), (1, false));
    assert_eq!((of(first), of(second)), (Some(0), Some(1)));
    // A process that knows nothing finds both.
    let sessions = Sessions::default();
    leave_slot(&sessions, &segment, first);
    assert_eq!(of(first), None);
    assert_eq!(join(&sessions, &segment, connect(&segment, 2), (1, 2)).expect("known"), (0, true));
    assert_eq!(join(&sessions, &segment, connect(&segment, 3), (2, 2)).expect("known"), (1, true));
    // The one it was taken from still names it, and is not its owner.
    let old = Membership::of(&segment, second).expect("sound").expect("named");
    assert!(!old.is_owner(second.id.load()) && old.is_owner(103));
}

#[test]
fn session_goes_to_the_highest_attempt_only() {
    let segment = segment();
    let sessions = Sessions::default();
    let (old, new) = (connect(&segment, 0), connect(&segment, 1));
    join(&sessions, &segment, new, (1, 5)).expect("room");
    for attempt in [0, 4, 5] {
        let joined = join(&sessions, &segment, old, (1, attempt));
        assert!(matches!(joined, Err(JoinError::Superseded)), "attempt {attempt}");
    }
    // Not when the newer one has gone, either: its client may have been answered on it.
    leave_slot(&sessions, &segment, new);
    assert!(matches!(join(&sessions, &segment, old, (1, 5)), Err(JoinError::Superseded)));
    assert_eq!(join(&sessions, &segment, old, (1, 6)).expect("known"), (0, true));
    // The connection that has it may say so twice.
    assert_eq!(join(&sessions, &segment, old, (1, 6)).expect("known"), (0, true));
}

#[test]
fn session_that_ended_leaves_its_record_empty_for_another() {
    let segment = segment();
    let sessions = Sessions::default();
    let slot = connect(&segment, 0);
    join(&sessions, &segment, slot, (1, 1)).expect("room");
    let mut member = Membership::of(&segment, slot).expect("sound").expect("named");
    let mut transaction = Transaction::begin(&segment, worker(&segment));
    let Known::New(place) = member.ledger().look_up(9) else { panic!("known") };
    member.ledger().note(&mut transaction, place, Outcome::Number(-4));
    transaction.commit().expect("small");
    assert_eq!(Ledger::open(member.window).look_up(9), Known::Before(Outcome::Number(-4)));
    sessions
        .end(&segment, (worker(&segment), slot), &member, |transaction| transaction.commit())
        .expect("sound");
    assert_eq!((of(slot), head(&segment, 0).state.load()), (None, FREE));
    assert_eq!(join(&sessions, &segment, slot, (2, 1)).expect("room"), (0, false));
    let mut member = Membership::of(&segment, slot).expect("sound").expect("named");
    assert!(matches!(member.ledger().look_up(9), Known::New(_)));
    assert_eq!(segment.header().expect("exists").sessions_reserved.load(), 1);
}

#[test]
fn session_records_go_to_whom_they_should() {
    let segment = segment();
    let sessions = Sessions::default();
    for index in 0..4 {
        join(&sessions, &segment, connect(&segment, index), (index, 1)).expect("room");
    }
    let slot_of = |index| segment.memory().object(segment.regions().connection(index)).expect("exists");
    for index in [1, 3] {
        leave_slot(&sessions, &segment, slot_of(index));
    }
    // Just gone: they may come back, and a record that was never used is taken.
    assert_eq!(join(&sessions, &segment, connect(&segment, 4), (4, 1)).expect("room"), (4, false));
    // One has been gone since the machine was started, which is longer than that but on a machine that was started just now.
    segment.memory().store(&head(&segment, 3).since_ms, 0);
    let sessions = Sessions::default();
    let is_over = now_ms() > SESSION_KEPT.as_millis() as u64;
    let expected = if is_over { [3, 5] } else { [5, 3] };
    assert_eq!(join(&sessions, &segment, connect(&segment, 5), (5, 1)).expect("room").0, expected[0]);
    // Its client comes back too late, or in time.
    let back = join(&sessions, &segment, connect(&segment, 6), (3, 2)).expect("room");
    assert_eq!(back, (expected[1], !is_over));
}

#[test]
fn session_with_a_connection_never_goes_also_when_all_records_are_taken() {
    let segment = segment();
    let memory = segment.memory();
    memory.store(&segment.header().expect("exists").sessions_reserved, SESSIONS_MAX);
    for index in 0..SESSIONS_MAX {
        let head = head(&segment, index);
        memory.store(&head.state, USED);
        memory.store(&head.token[0], index);
        memory.store(&head.token[1], 77);
        memory.store(&head.owner, if index % 2 == 0 { index + 1 } else { 0 });
        memory.store(&head.since_ms, now_ms() - index / 2 % 1000);
    }
    let sessions = Sessions::default();
    // Those gone longest: since_ms is lowest where index / 2 % 1000 is 999.
    let (index, known) =
        join(&sessions, &segment, connect(&segment, 0), (SESSIONS_MAX + 1, 1)).expect("one goes");
    assert!(!known && index % 2 == 1 && index / 2 % 1000 == 999, "{index}");
    for index in 0..SESSIONS_MAX {
        memory.store(&head(&segment, index).owner, index + 1);
    }
    let sessions = Sessions::default();
    let joined = join(&sessions, &segment, connect(&segment, 1), (SESSIONS_MAX + 2, 1));
    assert!(matches!(joined, Err(JoinError::Full(_))), "each has a connection");
}

#[test]
fn session_results_that_were_damaged_are_errors_and_nothing_is_executed() {
    let segment = segment();
    let sessions = Sessions::default();
    let slot = connect(&segment, 0);
    join(&sessions, &segment, slot, (1, 1)).expect("room");
    let mut member = Membership::of(&segment, slot).expect("sound").expect("named");
    let Known::New(place) = member.ledger().look_up(5) else { panic!("known") };
    let result = &member.window.results[(place % SESSION_WINDOW) as usize];
    segment.memory().store(&result.outcome, place << 16 | 99);
    let ledger = Ledger::open(member.window);
    assert_eq!(ledger.look_up(5), Known::Before(Outcome::Failed(ErrorCode::Damaged)));
    assert!(record::verify(member.window).is_err());
    segment.memory().store(&result.outcome, u64::MAX);
    assert_eq!(Ledger::open(member.window).look_up(6), Known::OutOfReach);
    segment.memory().store(&slot.session, 1 << 40);
    assert!(Membership::of(&segment, slot).is_err());
}

fn outcome() -> impl Strategy<Value = Outcome> {
    prop_oneof![
        Just(Outcome::Stored),
        Just(Outcome::Exists),
        Just(Outcome::Deleted),
        Just(Outcome::Missing),
        any::<i64>().prop_map(Outcome::Number),
        Just(Outcome::Failed(ErrorCode::StoreFull)),
        Just(Outcome::Failed(ErrorCode::Session)),
    ]
}

proptest! {
    /// Numbers go up by one, or jump; now and then the window is read anew, as a restart does.
    #[test]
    fn session_window_agrees_with_a_map(
        first: u32,
        changes in prop::collection::vec((outcome(), prop_oneof![20 => Just(0u32), 1 => 0u32..300], 0u8..40), 1..900),
    ) {
        let segment = segment();
        let sessions = Sessions::default();
        let slot = connect(&segment, 0);
        join(&sessions, &segment, slot, (1, 1)).expect("room");
        let mut member = Membership::of(&segment, slot).expect("sound").expect("named");
        let (mut number, mut model) = (first, HashMap::new());
        for (outcome, jump, restart) in changes {
            number = number.wrapping_add(jump);
            let Known::New(place) = member.ledger().look_up(number) else { panic!("{number} is known") };
            let mut transaction = Transaction::begin(&segment, worker(&segment));
            member.ledger().note(&mut transaction, place, outcome);
            transaction.commit().expect("small");
            member.ledger().noted(place);
            model.insert(number, outcome);
            number = number.wrapping_add(1);
            if restart == 0 {
                member.ledger = None;
            }
        }
        prop_assert_eq!(record::verify(member.window), Ok(()));
        member.ledger = None;
        for back in 1..=SESSION_WINDOW as u32 {
            let asked = number.wrapping_sub(back);
            let expected = match model.get(&asked) {
                Some(outcome) => Known::Before(*outcome),
                // It was jumped over, or comes before the first, which is as if it had been.
                None => Known::Before(Outcome::Failed(ErrorCode::Internal)),
            };
            prop_assert_eq!(member.ledger().look_up(asked), expected, "{} back", back);
        }
        let too_old = number.wrapping_sub(SESSION_WINDOW as u32 + 1);
        prop_assert_eq!(member.ledger().look_up(too_old), Known::OutOfReach);
    }
}
