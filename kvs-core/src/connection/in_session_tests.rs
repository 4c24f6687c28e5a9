//! Goal: a change of a session happens on one connection and once, whatever the client repeats and on how many connections.
//! Method: connections of one session on a segment in this process's memory, asked by hand.

use super::context::Context;
use super::tests::{Answer, Client, NoStatistics, bytes_of, other};
use crate::check;
use crate::limits::{CAPACITY_BYTES_MIN, VALUE_BYTES_MAX_DEFAULT};
use crate::segment::layout::WorkerSlot;
use crate::segment::{Segment, SegmentView};
use crate::session::Sessions;
use crate::table::Table;
use crate::wire::{ErrorCode, Request, RequestBody, SessionToken, SetCondition, encode_request};

const TOKEN: SessionToken = SessionToken::new(*b"sixteen of bytes");

/// Runs `test` with two connections that have said hello, the first of which has joined.
fn with_two(test: impl FnOnce(&mut Client<'_>, &mut Client<'_>)) {
    let segment = Segment::on_heap(4 * CAPACITY_BYTES_MIN).expect("heap memory");
    segment.claim_worker(0).expect("heap memory");
    let table = Table::new(&segment).expect("just made");
    let worker: &WorkerSlot = segment.memory().object(segment.regions().worker(0)).expect("exists");
    let sessions = Sessions::default();
    let context =
        || Context::new(&table, worker, &NoStatistics, VALUE_BYTES_MAX_DEFAULT, 8).with_sessions(&sessions);
    let mut old = Client::greeted(&segment, context());
    let mut new = Client::greeted_in_slot(1, &segment, context());
    join(&mut old, 1, false);
    test(&mut old, &mut new);
    for Client { mut context, connection, .. } in [old, new] {
        connection.expect("open").close(&mut context).expect("sound");
    }
    table.collect_garbage(worker).expect("sound");
    let report = check::check_view(&SegmentView::of(&segment)).expect("a header");
    assert_eq!(report.faults, Vec::<String>::new());
}

fn join(client: &mut Client<'_>, attempt: u64, resumed: bool) {
    let joined = client.ask(&RequestBody::Session { token: TOKEN, attempt });
    assert_eq!(joined, other(&format!("Session {{ resumed: {resumed}, window: 256 }}")));
}

fn change(client: &mut Client<'_>, number: u32, body: &RequestBody<'_>) -> Answer {
    client.number_from(number);
    client.ask(body)
}

fn set<'a>(key: &'a [u8], value: &'a [u8]) -> RequestBody<'a> {
    RequestBody::Set { condition: SetCondition::Always, key, value }
}

const fn increment(key: &[u8]) -> RequestBody<'_> {
    RequestBody::Increment { key, by: 1 }
}

fn assert_refused(client: &mut Client<'_>, answer: &Answer) {
    assert!(matches!(answer, Answer::Error(ErrorCode::Session, _)), "{answer:?}");
    assert!(client.connection.as_ref().expect("open").is_refused());
}

#[test]
fn session_change_on_the_older_connection_is_refused_and_not_made() {
    with_two(|old, new| {
        assert_eq!(change(old, 1, &increment(b"n")), Answer::Number(1));
        join(new, 2, true);
        let refused = change(old, 2, &increment(b"n"));
        assert_refused(old, &refused);
        assert_eq!(change(new, 1, &increment(b"n")), Answer::Number(1));
        assert_eq!(change(new, 2, &increment(b"n")), Answer::Number(2));
    });
}

#[test]
fn session_large_value_half_taken_by_the_older_connection_is_the_newer_ones() {
    with_two(|old, new| {
        let value = bytes_of(200_000, 3);
        let mut frame = Vec::new();
        let if_absent = RequestBody::Set { condition: SetCondition::IfAbsent, key: b"large", value: &value };
        encode_request(&mut frame, &Request { number: 1, body: if_absent.clone() });
        let (first, rest) = frame.split_at(150_000);
        old.feed(first);
        join(new, 2, true);
        assert_eq!(change(new, 1, &if_absent), other("Stored"));
        old.feed(rest);
        let refused = old.answer();
        assert_refused(old, &refused);
        // Again, and it is not even taken in.
        assert_eq!(change(new, 1, &if_absent), other("Stored"));
        assert_eq!(new.ask(&RequestBody::Get { key: b"large" }), Answer::Value(value.clone()));
        assert_eq!(change(new, 2, &if_absent), other("Exists"));
        assert_eq!(change(new, 2, &if_absent), other("Exists"));
    });
}

#[test]
fn session_change_that_failed_fails_again_when_what_came_behind_it_is_done() {
    with_two(|old, new| {
        assert_eq!(change(old, 1, &set(b"n", b"no number")), other("Stored"));
        let not_a_number = |answer: &Answer| matches!(answer, Answer::Error(ErrorCode::NotANumber, _));
        let too_long = vec![0; VALUE_BYTES_MAX_DEFAULT as usize + 1];
        let (first, key) = (change(old, 2, &increment(b"n")), change(old, 3, &increment(b"")));
        assert!(
            not_a_number(&first) && matches!(key, Answer::Error(ErrorCode::KeyLength, _)),
            "{first:?} {key:?}"
        );
        let value = change(old, 4, &set(b"n", &too_long));
        assert!(matches!(value, Answer::Error(ErrorCode::ValueLength, _)), "{value:?}");
        assert_eq!(change(old, 5, &set(b"n", b"7")), other("Stored"));
        join(new, 2, true);
        assert_eq!(change(new, 1, &set(b"n", b"no number")), other("Stored"));
        assert!(not_a_number(&change(new, 2, &increment(b"n"))));
        assert!(matches!(change(new, 3, &increment(b"")), Answer::Error(ErrorCode::KeyLength, _)));
        let value = change(new, 4, &set(b"n", b"short now"));
        assert!(matches!(value, Answer::Error(ErrorCode::ValueLength, _)), "{value:?}");
        assert_eq!(change(new, 5, &set(b"n", b"7")), other("Stored"));
        assert_eq!(new.ask(&RequestBody::Get { key: b"n" }), Answer::Value(b"7".to_vec()));
    });
}

#[test]
fn session_that_ended_or_was_changed_for_another_remembers_nothing() {
    with_two(|old, new| {
        assert_eq!(change(old, 1, &increment(b"n")), Answer::Number(1));
        assert_eq!(old.ask(&RequestBody::EndSession), other("Session { resumed: false, window: 0 }"));
        // Without a session numbers mean nothing.
        assert_eq!(change(old, 1, &increment(b"n")), Answer::Number(2));
        join(new, 2, false);
        assert_eq!(change(new, 1, &increment(b"n")), Answer::Number(3));
        let another = SessionToken::new([9; 16]);
        let joined = new.ask(&RequestBody::Session { token: another, attempt: 1 });
        assert_eq!(joined, other("Session { resumed: false, window: 256 }"));
        assert_eq!(change(new, 1, &increment(b"n")), Answer::Number(4));
        join(old, 3, true);
        assert_eq!(change(old, 1, &increment(b"n")), Answer::Number(3));
    });
}

#[test]
fn session_without_a_token_or_with_a_number_out_of_reach_ends_the_connection() {
    with_two(|old, new| {
        assert_eq!(change(old, 1000, &increment(b"n")), Answer::Number(1));
        let too_old = change(old, 700, &increment(b"n"));
        assert_refused(old, &too_old);
        let none = new.ask(&RequestBody::Session { token: SessionToken::new([0; 16]), attempt: 1 });
        assert_refused(new, &none);
    });
}
