//! Goal: whatever instruction a data server dies at, and however often, a client that knows nothing of it gets each of its
//! answers exactly once, in order, to the byte. Method: one connection over many lives. The test is the kernel: it alone knows
//! what was taken and given, and each life ends before a random store into the segment, recovery too.

use std::collections::HashMap;
use std::os::fd::AsFd;

use proptest::prelude::*;

use super::crashes::assert_sound;
use super::tests::{NoStatistics, bytes_of};
use super::*;
use crate::limits::{CAPACITY_BYTES_MIN, VALUE_BYTES_MAX_DEFAULT};
use crate::recover;
use crate::segment::layout::WorkerSlot;
use crate::sys::crash;
use crate::table::Table;
use crate::wire::{PROTOCOL, Request, RequestBody, SetCondition, encode_request};

/// A client that wrote all its requests at once, and what the kernel knows.
struct Stream {
    input: Vec<u8>,
    /// Taken by the server.
    taken: usize,
    /// Given by the server.
    output: Vec<u8>,
    /// Decides how much goes in and out at once.
    random: u64,
}

impl Stream {
    fn some(&mut self, most: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let most = most as u64;
        // Often little, sometimes all.
        (if self.random.is_multiple_of(3) { most } else { self.random % 3000 % (most + 1) }) as usize
    }

    /// A life of the worker: until everything is done and given.
    fn serve<'s>(&mut self, context: &mut Context<'s>, mut connection: Connection<'s>) {
        loop {
            context.serves(connection.index());
            if !connection.has_output() {
                let (first, second) = connection.input_space(context).expect("sound");
                let rest = self.input.len() - self.taken;
                let count = self.some(rest).min(first.len() + second.len());
                let bytes = &self.input[self.taken..self.taken + count];
                let in_first = count.min(first.len());
                first[..in_first].copy_from_slice(&bytes[..in_first]);
                second[..count - in_first].copy_from_slice(&bytes[in_first..]);
                self.taken += count;
                connection.received(count as u64);
            }
            let progress = connection.execute(context).expect("sound");
            while connection.has_output() {
                let parts = connection.pending(context).expect("sound");
                let bytes: Vec<u8> = parts.iter().flat_map(|part| part.iter().copied()).collect();
                let count = self.some(bytes.len());
                self.output.extend_from_slice(&bytes[..count]);
                connection.sent(context, count as u64).expect("sound");
                if count < bytes.len() {
                    break;
                }
            }
            connection.rest(context).expect("sound");
            context.serves_nobody();
            let done = self.taken == self.input.len() && !connection.has_output();
            if done && progress == Progress::NeedsInput {
                return connection.close(context).expect("sound");
            }
        }
    }
}

/// What a data server does that is passed the socket of a dead one.
fn take_over(segment: &Segment, stream: &Stream) {
    let table = Table::new(segment).expect("sound");
    recover::take_over(&table).expect("sound");
    let slot: &ConnectionSlot = segment.memory().object(segment.regions().connection(0)).expect("exists");
    if !slot::is_used(slot) {
        return;
    }
    let truth = (stream.taken as u64, stream.output.len() as u64);
    if slot.uncertain.load() == 0 {
        assert_eq!((slot.received.load(), slot.sent.load()), truth, "certain, and wrong");
    } else {
        // As the kernel says; `settle_positions` does the same with a real one.
        segment.memory().store(&slot.received, truth.0);
        segment.memory().store(&slot.sent, truth.1);
        segment.memory().store(&slot.uncertain, 0);
    }
}

/// The stream over as many lives as `deaths` has entries, and one more. Returns how many died.
fn live(segment: &Segment, stream: &mut Stream, deaths: &[u64]) -> usize {
    let anything = tempfile::tempfile().expect("a file");
    let adopted = Adopted { connection: 77, transport: Transport::Unix };
    let mut died = 0;
    let mut open = false;
    for stores in deaths.iter().copied().chain([u64::MAX]) {
        let over = crash::die_before(stores, || {
            let table = Table::new(segment).expect("sound");
            table.hold_garbage();
            let worker: &WorkerSlot = segment.memory().object(segment.regions().worker(0)).expect("exists");
            let mut context = Context::new(&table, worker, &NoStatistics, VALUE_BYTES_MAX_DEFAULT, 8);
            let connection = match resume::holder(segment, 0, 77) {
                resume::Holder::This => Connection::resume(&mut context, 0, adopted, anything.as_fd())
                    .expect("sound")
                    .expect("all of it is in the segment"),
                _ if open => return,
                _ => Connection::open(segment, 0, adopted).expect("room"),
            };
            open = true;
            table.release_garbage();
            let is_pending = connection.has_input() || connection.has_output();
            let (before, speaks) = (stream.output.len(), stream.taken < stream.input.len());
            stream.serve(&mut context, connection);
            assert!(is_pending || speaks || before == stream.output.len(), "nobody would have served it");
        });
        if over.is_some() {
            return died;
        }
        died += 1;
        for stores in [0, 1, 3, 7, 20] {
            crash::die_before(stores, || take_over(segment, stream));
        }
        take_over(segment, stream);
        assert_sound(segment, "taken over");
    }
    died
}

fn requests(steps: &[(u8, u16, usize)]) -> (Vec<u8>, Vec<u8>) {
    let (mut input, mut expected) = (Vec::new(), Vec::new());
    let mut ask = |number: usize, body: RequestBody<'_>| {
        encode_request(&mut input, &Request { number: number as u32, body });
    };
    let mut answer = |number: usize, body: ResponseBody<'_>| {
        wire::encode_response(&mut expected, &Response { number: number as u32, body });
    };
    ask(0, RequestBody::Hello { protocol: PROTOCOL, name: "survivor", pid: 5 });
    answer(
        0,
        ResponseBody::Welcome {
            protocol: PROTOCOL,
            server: concat!("kvs ", env!("CARGO_PKG_VERSION")),
            connection: 77,
            value_bytes_max: VALUE_BYTES_MAX_DEFAULT,
        },
    );
    let mut model: HashMap<Vec<u8>, Vec<u8>> = HashMap::new();
    for (number, &(kind, key, length)) in (1..).zip(steps) {
        let name = format!("key {}", key % 12).into_bytes();
        match kind {
            0 | 1 => {
                let value = bytes_of(length, key as u8);
                let condition = if kind == 0 { SetCondition::Always } else { SetCondition::IfAbsent };
                ask(number, RequestBody::Set { condition, key: &name, value: &value });
                if kind == 1 && model.contains_key(&name) {
                    answer(number, ResponseBody::Exists);
                } else {
                    model.insert(name, value);
                    answer(number, ResponseBody::Stored);
                }
            }
            2 => {
                ask(number, RequestBody::Delete { key: &name });
                let body =
                    if model.remove(&name).is_some() { ResponseBody::Deleted } else { ResponseBody::Missing };
                answer(number, body);
            }
            3 => {
                let counter = format!("counter {}", key % 3).into_bytes();
                ask(number, RequestBody::Increment { key: &counter, by: i64::from(key) });
                let old: i64 = model
                    .get(&counter)
                    .map_or(0, |text| String::from_utf8_lossy(text).parse().expect("digits"));
                let value = old + i64::from(key);
                model.insert(counter, value.to_string().into_bytes());
                answer(number, ResponseBody::Number { value });
            }
            4 => {
                // A key that is too long: skipped, and the connection goes on.
                let long = vec![b'k'; 200_000];
                ask(number, RequestBody::Get { key: &long });
                let frame = wire::FRAME_HEADER_BYTES + 1 + 1 + 3 + long.len() + usize::from(number > 127);
                let message = request::key_too_long(frame);
                answer(number, ResponseBody::Error { code: ErrorCode::KeyLength, message: &message });
            }
            _ => {
                ask(number, RequestBody::Get { key: &name });
                match model.get(&name) {
                    Some(value) => answer(number, ResponseBody::Value { value }),
                    None => answer(number, ResponseBody::Missing),
                }
            }
        }
    }
    (input, expected)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, max_shrink_iters: 300, ..ProptestConfig::default() })]
    #[test]
    fn survival_of_a_connection_at_any_store_is_exact(
        steps in proptest::collection::vec(
            (0u8..9, 0u16..1000, prop_oneof![6 => 0usize..300, 2 => 300usize..9_000, 2 => 30_000usize..200_000]),
            20..120,
        ),
        deaths in proptest::collection::vec(prop_oneof![3 => 0u64..60, 3 => 0u64..900, 1 => 0u64..4000], 10..80),
        random in 1u64..,
    ) {
        let segment = Segment::on_heap(8 * CAPACITY_BYTES_MIN).expect("heap memory");
        segment.claim_worker(0).expect("heap memory");
        let (input, expected) = requests(&steps);
        let mut stream = Stream { input, taken: 0, output: Vec::new(), random };
        live(&segment, &mut stream, &deaths);
        prop_assert!(stream.output == expected, "{} bytes of answers, not {}", stream.output.len(), expected.len());
        let slot: &ConnectionSlot = segment.memory().object(segment.regions().connection(0)).expect("exists");
        prop_assert!(!slot::is_used(slot));
        recover::recover(&Table::new(&segment).expect("sound")).expect("sound");
        assert_sound(&segment, "all is given back");
    }
}
