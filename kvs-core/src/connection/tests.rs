//! Goal: whatever a client sends, in pieces of any size and however slowly it reads, the right answers come in the right
//! order and nothing is left behind. Method: a connection on a segment in this process's memory, fed and drained by
//! hand.

use std::collections::HashMap;

use proptest::prelude::*;

use super::context::Statistics;
use super::*;
use crate::control::StatisticOwned;
use crate::limits::{KEY_BYTES_MAX, VALUE_BYTES_MAX_DEFAULT};
use crate::segment::layout::WorkerSlot;
use crate::table::Table;
use crate::table::tests::bytes_in_use;
use crate::wire::{PROTOCOL, Request, RequestBody, SetCondition, decode_response, encode_request};

pub(crate) struct NoStatistics;

impl Statistics for NoStatistics {
    fn statistics(&self) -> Vec<(String, StatisticOwned)> {
        vec![("entries".into(), StatisticOwned::Number(3)), ("standby_pid".into(), StatisticOwned::Absent)]
    }
}

/// Runs `test` with a connection that has said hello, on a segment of `capacity` bytes.
fn with_client(capacity: u64, test: impl FnOnce(&mut Client<'_>)) {
    let segment = Segment::on_heap(capacity).expect("heap memory");
    let table = Table::new(&segment).expect("just made");
    let slot: &WorkerSlot = segment.memory().object(segment.regions().worker(0)).expect("exists");
    let context = Context::new(&table, slot, &NoStatistics, VALUE_BYTES_MAX_DEFAULT, 8);
    let mut client = Client::greeted(&segment, context);
    test(&mut client);
    let Client { mut context, connection, .. } = client;
    connection.expect("open").close(&mut context).expect("sound");
    // What is left in use are slabs, and what values hold.
    for key in keys_of(&table) {
        let mut transaction = crate::transaction::Transaction::begin(&segment, slot);
        table.delete(&mut transaction, table.hash_of(&key), &key).expect("sound");
        transaction.commit().expect("small");
        table.collect_garbage(slot).expect("sound");
    }
    let slabs: u64 = (0..segment.regions().shard_count)
        .flat_map(|index| segment.shard(index).expect("exists").slabs.iter().map(|count| count.load()))
        .sum();
    assert_eq!(bytes_in_use(&segment), slabs * (16 << 10), "blocks were left behind");
}

fn keys_of(table: &Table) -> Vec<Vec<u8>> {
    let (mut keys, mut cursor) = (Vec::new(), Some(0));
    while let Some(at) = cursor {
        cursor = table.scan(at, 100, &mut |key| keys.push(key.to_vec())).expect("sound");
    }
    keys
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Value(Vec<u8>),
    Number(i64),
    Keys(Vec<Vec<u8>>, Option<u64>),
    Error(ErrorCode, String),
    Other(String),
}

pub(crate) struct Client<'s> {
    pub(super) context: Context<'s>,
    pub(super) connection: Option<Connection<'s>>,
    answers: Vec<u8>,
    /// Bytes that go in or out at once.
    piece: usize,
    number: u32,
}

impl<'s> Client<'s> {
    /// On the first slot of `segment`, after hello.
    pub(super) fn greeted(segment: &'s Segment, context: Context<'s>) -> Self {
        Self::greeted_in_slot(0, segment, context)
    }

    /// On another slot.
    pub(super) fn greeted_in_slot(index: u64, segment: &'s Segment, context: Context<'s>) -> Self {
        let adopted = Adopted { connection: 77 + index, transport: Transport::Unix };
        let connection = Connection::open(segment, index, adopted).expect("room");
        let connection = Some(connection);
        let mut client = Self { context, connection, answers: Vec::new(), piece: usize::MAX, number: 0 };
        client.send(&RequestBody::Hello { protocol: PROTOCOL, name: "test", pid: 5 });
        let welcome = client.answer();
        let Answer::Other(text) = &welcome else { panic!("{welcome:?}") };
        assert!(text.starts_with("Welcome"), "{text}");
        client
    }

    /// The next request has this number, those behind it the next ones.
    pub(super) fn number_from(&mut self, number: u32) {
        self.number = number;
    }

    pub(super) fn send(&mut self, body: &RequestBody<'_>) {
        let mut bytes = Vec::new();
        encode_request(&mut bytes, &Request { number: self.number, body: body.clone() });
        self.number = self.number.wrapping_add(1);
        self.feed(&bytes);
    }

    /// Gives bytes to the connection, draining what it has to say when it can't go on otherwise.
    pub(super) fn feed(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let mut connection = self.connection.take().expect("open");
            let (first, second) = connection.input_space(&mut self.context).expect("sound");
            let from_first = bytes.len().min(first.len()).min(self.piece);
            first[..from_first].copy_from_slice(&bytes[..from_first]);
            let from_second = (bytes.len() - from_first).min(second.len()).min(self.piece - from_first);
            second[..from_second].copy_from_slice(&bytes[from_first..from_first + from_second]);
            let count = from_first + from_second;
            connection.received(count as u64);
            bytes = &bytes[count..];
            let progress = connection.execute(&mut self.context).expect("sound");
            self.connection = Some(connection);
            if progress == Progress::NeedsOutput {
                self.drain();
            } else {
                assert!(count > 0, "it neither takes input nor needs output");
            }
        }
    }

    /// Takes all output, executing what was held up by it.
    fn drain(&mut self) {
        let mut connection = self.connection.take().expect("open");
        loop {
            let progress = connection.execute(&mut self.context).expect("sound");
            let before = self.answers.len();
            for part in connection.pending(&self.context).expect("sound") {
                let room = self.piece - (self.answers.len() - before);
                self.answers.extend_from_slice(&part[..part.len().min(room)]);
            }
            let count = self.answers.len() - before;
            connection.sent(&mut self.context, count as u64).expect("sound");
            if count == 0 && progress == Progress::NeedsInput && !connection.has_output() {
                break;
            }
        }
        connection.rest(&mut self.context).expect("sound");
        self.connection = Some(connection);
    }

    pub(super) fn answer(&mut self) -> Answer {
        self.drain();
        let extent = wire::peek(&self.answers, usize::MAX).expect("a frame").expect("whole");
        let bytes: Vec<u8> = self.answers.drain(..extent.total).collect();
        let response = decode_response(&bytes[FRAME_HEADER_BYTES..]).expect("a response");
        match response.body {
            ResponseBody::Value { value } => Answer::Value(value.to_vec()),
            ResponseBody::Number { value } => Answer::Number(value),
            ResponseBody::Keys { keys, next } => {
                Answer::Keys(keys.iter().map(|key| key.0.to_vec()).collect(), next)
            }
            ResponseBody::Error { code, message } => Answer::Error(code, message.to_owned()),
            other => Answer::Other(format!("{other:?}")),
        }
    }

    pub(super) fn ask(&mut self, body: &RequestBody<'_>) -> Answer {
        self.send(body);
        self.answer()
    }

    fn set(&mut self, key: &[u8], value: &[u8], condition: SetCondition) -> Answer {
        self.ask(&RequestBody::Set { condition, key, value })
    }

    fn get(&mut self, key: &[u8]) -> Answer {
        self.ask(&RequestBody::Get { key })
    }
}

pub(super) fn other(text: &str) -> Answer {
    Answer::Other(text.to_owned())
}

pub(super) fn bytes_of(length: usize, salt: u8) -> Vec<u8> {
    (0..length).map(|at| (at * 31 + at / 251) as u8 ^ salt).collect()
}

#[test]
fn connection_values_of_every_size_go_in_and_come_out() {
    with_client(256 << 20, |client| {
        let sizes = [
            0, 1, 100, 4_000, 4_040, 4_050, 4_096, 8_000, 30_000, 32_700, 32_768, 33_000, 100_000, 262_144,
            5_000_000,
        ];
        for (salt, &size) in sizes.iter().enumerate() {
            let value = bytes_of(size, salt as u8);
            let key = format!("value of {size}");
            assert_eq!(client.set(key.as_bytes(), &value, SetCondition::Always), other("Stored"), "{size}");
            assert_eq!(client.get(key.as_bytes()), Answer::Value(value), "{size}");
        }
        for &size in sizes.iter().rev() {
            let key = format!("value of {size}");
            assert_eq!(client.set(key.as_bytes(), b"x", SetCondition::IfAbsent), other("Exists"));
            assert_eq!(client.ask(&RequestBody::Delete { key: key.as_bytes() }), other("Deleted"));
            assert_eq!(client.get(key.as_bytes()), other("Missing"));
        }
    });
}

#[test]
fn connection_keys_of_every_size_work_in_every_request() {
    with_client(64 << 20, |client| {
        for length in [1, 200, 4_060, 32_760, 40_000, KEY_BYTES_MAX] {
            let key = bytes_of(length, 9);
            for value in [&b""[..], b"17", &bytes_of(70_000, 3)] {
                assert_eq!(client.set(&key, value, SetCondition::Always), other("Stored"), "{length}");
                assert_eq!(client.get(&key), Answer::Value(value.to_vec()));
            }
            assert_eq!(client.ask(&RequestBody::Delete { key: &key }), other("Deleted"));
            assert_eq!(client.ask(&RequestBody::Increment { key: &key, by: 5 }), Answer::Number(5));
            assert_eq!(client.ask(&RequestBody::Increment { key: &key, by: -7 }), Answer::Number(-2));
        }
    });
}

#[test]
fn connection_one_byte_at_a_time_gives_the_same_answers() {
    with_client(64 << 20, |client| {
        client.piece = 1;
        assert_eq!(client.set(b"a", b"1", SetCondition::Always), other("Stored"));
        let value = bytes_of(50_000, 1);
        assert_eq!(client.set(b"b", &value, SetCondition::IfAbsent), other("Stored"));
        assert_eq!(client.get(b"b"), Answer::Value(value));
        assert_eq!(client.ask(&RequestBody::Increment { key: b"a", by: 1 }), Answer::Number(2));
    });
}

#[test]
fn connection_limits_are_named_and_the_connection_goes_on() {
    with_client(64 << 20, |client| {
        let too_long = vec![1; VALUE_BYTES_MAX_DEFAULT as usize + 1];
        let Answer::Error(ErrorCode::ValueLength, message) =
            client.set(b"k", &too_long, SetCondition::Always)
        else {
            panic!("accepted");
        };
        assert!(message.contains("16MiB"), "{message}");
        for key in [&b""[..], &[1; KEY_BYTES_MAX + 1]] {
            for body in [
                RequestBody::Get { key },
                RequestBody::Delete { key },
                RequestBody::Increment { key, by: 1 },
                RequestBody::Set { condition: SetCondition::Always, key, value: b"v" },
                RequestBody::Set { condition: SetCondition::Always, key, value: &too_long[..100_000] },
            ] {
                let answer = client.ask(&body);
                assert!(
                    matches!(&answer, Answer::Error(ErrorCode::KeyLength, message) if message.contains("65535")),
                    "{answer:?}"
                );
            }
        }
        assert_eq!(client.set(b"k", b"v", SetCondition::Always), other("Stored"));
    });
}

#[test]
fn connection_full_store_refuses_large_and_small_and_still_reads() {
    with_client(16 << 20, |client| {
        let value = bytes_of(1 << 20, 4);
        let mut stored = 0;
        let refused = loop {
            match client.set(format!("{stored}").as_bytes(), &value, SetCondition::Always) {
                Answer::Other(text) if text == "Stored" => stored += 1,
                answer => break answer,
            }
        };
        assert!(matches!(refused, Answer::Error(ErrorCode::StoreFull, _)), "{refused:?}");
        assert!(stored > 5);
        assert_eq!(client.get(b"0"), Answer::Value(value.clone()));
        assert_eq!(client.ask(&RequestBody::Delete { key: b"0" }), other("Deleted"));
        assert_eq!(client.set(b"again", &value[..500_000], SetCondition::Always), other("Stored"));
    });
}

#[test]
fn connection_pipeline_is_answered_in_order_also_when_output_is_blocked() {
    with_client(64 << 20, |client| {
        let mut bytes = Vec::new();
        for number in 0..5_000u32 {
            let key = number.to_le_bytes();
            let set = RequestBody::Set { condition: SetCondition::Always, key: &key, value: &[7; 100] };
            encode_request(&mut bytes, &Request { number: 2 * number, body: set });
            encode_request(
                &mut bytes,
                &Request { number: 2 * number + 1, body: RequestBody::Get { key: &key } },
            );
        }
        client.piece = 30_000;
        client.feed(&bytes);
        client.drain();
        let mut rest = &client.answers[..];
        for number in 0..10_000 {
            let extent = wire::peek(rest, usize::MAX).expect("a frame").expect("whole");
            let response = decode_response(&rest[FRAME_HEADER_BYTES..extent.total]).expect("a response");
            assert_eq!(response.number, number);
            let expected =
                if number % 2 == 0 { ResponseBody::Stored } else { ResponseBody::Value { value: &[7; 100] } };
            assert_eq!(response.body, expected);
            rest = &rest[extent.total..];
        }
        assert!(rest.is_empty());
        client.answers.clear();
    });
}

#[test]
fn connection_list_pages_give_every_key_once() {
    with_client(64 << 20, |client| {
        for number in 0..3_000 {
            client.set(
                format!("{}:{number}", if number % 3 == 0 { "a" } else { "b" }).as_bytes(),
                b"",
                SetCondition::Always,
            );
        }
        let (mut keys, mut cursor) = (Vec::new(), 0);
        loop {
            let answer = client.ask(&RequestBody::List { prefix: b"a:", cursor, limit: 100 });
            let Answer::Keys(page, next) = answer else { panic!("{answer:?}") };
            keys.extend(page);
            match next {
                Some(next) => cursor = next,
                None => break,
            }
        }
        assert_eq!(keys.len(), 1_000);
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), 1_000);
        let answer = client.ask(&RequestBody::List { prefix: b"", cursor: u64::MAX, limit: 0 });
        assert_eq!(answer, Answer::Keys(vec![], None));
        assert!(matches!(client.ask(&RequestBody::Stats), Answer::Other(text) if text.contains("entries")));
    });
}

#[test]
fn connection_nonsense_ends_it_with_an_error() {
    for (bytes, code) in [
        (&[0xff, 0xff, 0xff, 0xff, 1, 0, 0][..], ErrorCode::FrameTooLarge),
        (&[3, 0, 0, 0, 9, 0, 0], ErrorCode::UnsupportedVersion),
        (&[1, 0, 0, 0, 1, 0, 0], ErrorCode::Malformed),
        (&[4, 0, 0, 0, 1, 0, 1, 200], ErrorCode::Malformed),
    ] {
        with_client(16 << 20, |client| {
            client.feed(bytes);
            let answer = client.answer();
            assert!(matches!(answer, Answer::Error(found, _) if found == code), "{answer:?}");
            assert!(client.connection.as_ref().expect("open").is_refused());
            client.feed(&[1; 100]);
            client.drain();
            assert!(client.answers.is_empty());
        });
    }
    with_client(16 << 20, |client| {
        client.feed(&[3, 0, 0, 0, 1, 9, 99]);
        assert!(matches!(client.answer(), Answer::Error(ErrorCode::UnknownMessage, _)));
        assert_eq!(client.get(b"k"), other("Missing"));
    });
}

#[test]
fn connection_value_replaced_while_it_is_sent_is_sent_as_it_was() {
    with_client(16 << 20, |client| {
        let (old, new) = (bytes_of(3_000_000, 1), bytes_of(2_000_000, 2));
        assert_eq!(client.set(b"k", &old, SetCondition::Always), other("Stored"));
        let mut request = Vec::new();
        encode_request(&mut request, &Request { number: 9, body: RequestBody::Get { key: b"k" } });
        let mut connection = client.connection.take().expect("open");
        connection.input_space(&mut client.context).expect("sound").0[..request.len()]
            .copy_from_slice(&request);
        connection.received(request.len() as u64);
        assert_eq!(connection.execute(&mut client.context).expect("sound"), Progress::NeedsOutput);
        client.connection = Some(connection);
        // Another connection replaces it, twice, and removes it.
        let slot = client.context.slot;
        let adopted = Adopted { connection: 78, transport: Transport::Tcp };
        let segment = client.context.table.segment();
        let context = Context::new(client.context.table, slot, &NoStatistics, VALUE_BYTES_MAX_DEFAULT, 8);
        let connection = Connection::open(segment, 1, adopted).expect("room");
        let mut writer =
            Client { context, connection: Some(connection), answers: vec![], piece: usize::MAX, number: 0 };
        writer.send(&RequestBody::Hello { protocol: PROTOCOL, name: "writer", pid: 6 });
        writer.answer();
        assert_eq!(writer.set(b"k", &new, SetCondition::Always), other("Stored"));
        assert_eq!(writer.set(b"k", &new[1..], SetCondition::Always), other("Stored"));
        assert_eq!(writer.ask(&RequestBody::Delete { key: b"k" }), other("Deleted"));
        assert_ne!(slot.garbage.load(), 0, "it is still being sent");
        client.piece = 100_000;
        assert_eq!(client.answer(), Answer::Value(old));
        client.context.table.collect_garbage(slot).expect("sound");
        assert_eq!(slot.garbage.load(), 0);
        let Client { mut context, connection, .. } = writer;
        connection.expect("open").close(&mut context).expect("sound");
    });
}

#[test]
fn connection_left_in_the_middle_of_a_value_gives_all_back() {
    with_client(64 << 20, |client| {
        let mut bytes = Vec::new();
        let body =
            RequestBody::Set { condition: SetCondition::Always, key: b"k", value: &vec![1; 3_000_000] };
        encode_request(&mut bytes, &Request { number: 1, body });
        client.feed(&bytes[..2_000_000]);
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn connection_random_requests_in_random_pieces_agree_with_a_map(
        steps in proptest::collection::vec((0u8..5, 0u8..40, 0usize..9_000, any::<bool>()), 1..200),
        pieces in proptest::collection::vec(1usize..70_000, 1..20),
    ) {
        with_client(128 << 20, |client| {
            let mut model: HashMap<Vec<u8>, Vec<u8>> = HashMap::new();
            for (at, (kind, key, size, large)) in steps.into_iter().enumerate() {
                client.piece = pieces[at % pieces.len()];
                let key = if key % 13 == 0 { bytes_of(usize::from(key) * 900 + 1, key) } else { vec![key; 5] };
                let value = bytes_of(if large { size * 40 } else { size }, at as u8);
                match kind {
                    0 | 1 => {
                        let condition = if kind == 0 { SetCondition::Always } else { SetCondition::IfAbsent };
                        let stores = kind == 0 || !model.contains_key(&key);
                        let expected = if stores { "Stored" } else { "Exists" };
                        assert_eq!(client.set(&key, &value, condition), other(expected));
                        if stores {
                            model.insert(key, value);
                        }
                    }
                    2 => {
                        let expected = if model.remove(&key).is_some() { "Deleted" } else { "Missing" };
                        assert_eq!(client.ask(&RequestBody::Delete { key: &key }), other(expected));
                    }
                    _ => match model.get(&key) {
                        Some(value) => assert_eq!(client.get(&key), Answer::Value(value.clone())),
                        None => assert_eq!(client.get(&key), other("Missing")),
                    },
                }
            }
        });
    }
}
