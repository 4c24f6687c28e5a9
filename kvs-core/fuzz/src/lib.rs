//! What is done with each input: anything but a panic, a signal or an endless loop is right, and what is stated here besides.
//! `tests/fuzz.rs` runs the same on inputs of its own in every test run.
#![forbid(unsafe_code)]

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;

use kvs_core::check;
use kvs_core::connection::context::{Context, Statistics};
use kvs_core::connection::{Connection, Progress, slot};
use kvs_core::control::{Adopted, StatisticOwned, Transport};
use kvs_core::inspect;
use kvs_core::limits::{CAPACITY_BYTES_MIN, VALUE_BYTES_MAX_LIMIT};
use kvs_core::segment::layout::{ConnectionSlot, PAGE_BYTES, Regions, WorkerSlot};
use kvs_core::segment::{Segment, SegmentView};
use kvs_core::table::Table;
use kvs_core::transaction::Transaction;
use kvs_core::wire::{self, FRAME_HEADER_BYTES, PROTOCOL, Request, RequestBody, SetCondition};

/// Bytes as a stream of frames, requests and responses. What decodes is encoded again, and then decodes to the same.
pub fn frame(input: &[u8]) {
    let _ = wire::looks_like_http(input);
    let _ = wire::decode_set_prefix(input, input.len() + 1);
    if let Ok(Some(extent)) = wire::peek(input, wire::request_length_max(VALUE_BYTES_MAX_LIMIT)) {
        assert!(extent.total > FRAME_HEADER_BYTES);
    }
    if let Ok(request) = wire::decode_request(input) {
        let mut frame = Vec::new();
        wire::encode_request(&mut frame, &request);
        assert_eq!(wire::decode_request(&frame[FRAME_HEADER_BYTES..]).as_ref(), Ok(&request));
        if let RequestBody::Set { key, value, .. } = request.body
            && let Ok(Some(prefix)) = wire::decode_set_prefix(input, input.len())
        {
            assert_eq!((prefix.key, prefix.value_length), (key, value.len()));
        }
    }
    if let Ok(response) = wire::decode_response(input) {
        let mut frame = Vec::new();
        wire::encode_response(&mut frame, &response);
        assert_eq!(wire::decode_response(&frame[FRAME_HEADER_BYTES..]).as_ref(), Ok(&response));
    }
}

struct NoStatistics;

impl Statistics for NoStatistics {
    fn statistics(&self) -> Vec<(String, StatisticOwned)> {
        Vec::new()
    }
}

/// Bytes from a client, in pieces as long as the first byte says, behind a Hello unless it is odd. The answers are frames, and
/// the segment is sound at the end.
pub fn connection(input: &[u8]) {
    let Some((&how, bytes)) = input.split_first() else { return };
    let segment = Segment::on_heap(CAPACITY_BYTES_MIN).expect("heap memory");
    segment.claim_worker(0).expect("heap memory");
    let table = Table::new(&segment).expect("just made");
    let mut context = Context::new(&table, worker(&segment), &NoStatistics, 1 << 20, 8);
    let adopted = Adopted { connection: 1, transport: Transport::Tcp };
    let mut connection = Connection::open(&segment, 0, adopted).expect("room");
    let mut stream = Vec::new();
    if how % 2 == 0 {
        let body = RequestBody::Hello { protocol: PROTOCOL, name: "fuzz", pid: 1 };
        wire::encode_request(&mut stream, &Request { number: 0, body });
    }
    stream.extend_from_slice(bytes);
    let mut answers = Vec::new();
    for piece in stream.chunks(usize::from(how) * 4 + 1) {
        feed(&mut connection, &mut context, piece, &mut answers);
    }
    assert_frames(&answers, connection.is_refused());
    connection.close(&mut context).expect("sound");
    table.collect_garbage(worker(&segment)).expect("sound");
    let report = check::check_view(&SegmentView::of(&segment)).expect("a header");
    assert!(report.faults.is_empty(), "{:?}", report.faults);
}

fn feed<'s>(
    connection: &mut Connection<'s>,
    context: &mut Context<'s>,
    mut bytes: &[u8],
    answers: &mut Vec<u8>,
) {
    // Each round takes input or gives output, or there is nothing left to do.
    loop {
        let (first, second) = connection.input_space(context).expect("sound");
        let in_first = bytes.len().min(first.len());
        first[..in_first].copy_from_slice(&bytes[..in_first]);
        let in_second = (bytes.len() - in_first).min(second.len());
        second[..in_second].copy_from_slice(&bytes[in_first..in_first + in_second]);
        connection.received((in_first + in_second) as u64);
        bytes = &bytes[in_first + in_second..];
        let progress = connection.execute(context).expect("sound");
        let before = answers.len();
        for part in connection.pending(context).expect("sound") {
            answers.extend_from_slice(&part);
        }
        let sent = answers.len() - before;
        connection.sent(context, sent as u64).expect("sound");
        if bytes.is_empty() && sent == 0 && progress == Progress::NeedsInput && !connection.has_output() {
            return connection.rest(context).expect("sound");
        }
    }
}

fn assert_frames(mut answers: &[u8], refused: bool) {
    while !answers.is_empty() {
        if refused && answers.starts_with(b"HTTP/1.1 400 ") {
            return;
        }
        let extent = wire::peek(answers, usize::MAX).expect("a frame").expect("whole");
        wire::decode_response(&answers[FRAME_HEADER_BYTES..extent.total]).expect("a response");
        answers = &answers[extent.total..];
    }
}

/// A filled segment in which words are changed: each twelve bytes of the input say which and to what. It is verified, inspected,
/// recovered and used.
pub fn segment(input: &[u8]) {
    let segment = filled();
    let memory = segment.memory();
    for (offset, value) in changes(input, segment.regions(), 0) {
        memory.store(memory.word(offset).expect("inside"), value);
    }
    look_into(&SegmentView::of(&segment));
    let _ = check::check_copy(&segment);
    segment.initialize_locks().expect("locks");
    let Ok(table) = Table::new(&segment) else { return };
    for number in 0..120u32 {
        let key = key_of(number * 7);
        let hash = table.hash_of(&key);
        let _ = table.read(hash, &key, |value| Ok(value.length()));
        put(&table, &key, &vec![b'n'; number as usize * 20]);
        let mut transaction = Transaction::begin(&segment, worker(&segment));
        let _ = table.increment(&mut transaction, hash, &key, 1);
        let _ = table.delete(&mut transaction, hash, &key).map(|_| transaction.commit());
    }
    let _ = table.collect_garbage(worker(&segment));
    let _ = table.scan(0, 1000, &mut |_| {});
    let connection =
        segment.memory().object::<ConnectionSlot>(segment.regions().connection(0)).expect("inside");
    let _ = slot::release(&segment, worker(&segment), connection);
}

/// A segment file in which words of its first pages are changed: it is opened, or refused with an error.
pub fn attach(path: &Path, input: &[u8]) {
    let _ = std::fs::remove_file(path);
    let made = Segment::open_or_create(path, CAPACITY_BYTES_MIN).expect("room in memory");
    let regions = *made.segment.regions();
    drop(made);
    let file = OpenOptions::new().write(true).open(path).expect("just made");
    for (offset, value) in changes(input, &regions, 1) {
        file.write_all_at(&value.to_le_bytes(), offset).expect("room in memory");
    }
    drop(file);
    if let Ok(view) = SegmentView::open(path) {
        look_into(&view);
    }
    let _ = check::check(path);
    let _ = Segment::open_or_create(path, CAPACITY_BYTES_MIN).map(|opened| Table::new(&opened.segment));
}

fn look_into(view: &SegmentView) {
    let _ = check::check_view(view);
    let _ = inspect::header(view);
    let _ = inspect::memory::figures(view);
    let _ = inspect::slots::workers(view);
    let _ = inspect::slots::connections(view);
    for shard in 0..view.regions().shard_count {
        let _ = inspect::shards::figures(view, shard);
    }
    let _ = inspect::entries::entry(view, &key_of(1));
    let _ = inspect::entries::for_each(view, |_, _| Ok::<_, kvs_core::table::view::ReadError>(()));
}

/// Words to change: the first byte of twelve chooses a part of the segment, three the place in it, the others are the value.
/// `headers` limits it to the first parts.
fn changes(input: &[u8], regions: &Regions, headers: usize) -> Vec<(u64, u64)> {
    let parts = [
        (0, PAGE_BYTES),
        (PAGE_BYTES, regions.free_maps),
        (regions.free_maps, regions.workers),
        (regions.workers, regions.workers + 2048),
        (regions.connections, regions.connections + 512),
        (regions.buckets, regions.buckets + 16_384),
        (regions.data, regions.data + (1 << 20)),
    ];
    let parts = if headers == 0 { &parts[..] } else { &parts[..3] };
    let words = input.as_chunks::<12>().0.iter().take(64);
    words
        .map(|bytes| {
            let (start, end) = parts[usize::from(bytes[0]) % parts.len()];
            let place = u64::from(u32::from_le_bytes([bytes[1], bytes[2], bytes[3], 0]));
            let value = bytes[4..].iter().rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte));
            (start + place % ((end - start) / 8) * 8, value)
        })
        .collect()
}

fn filled() -> Segment {
    let segment = Segment::on_heap(CAPACITY_BYTES_MIN).expect("heap memory");
    segment.claim_worker(0).expect("heap memory");
    let table = Table::new(&segment).expect("just made");
    for number in 0..400u32 {
        put(&table, &key_of(number), &vec![b'v'; number as usize * 5]);
    }
    let adopted = Adopted { connection: 1, transport: Transport::Tcp };
    let mut context = Context::new(&table, worker(&segment), &NoStatistics, 1 << 20, 8);
    let mut connection = Connection::open(&segment, 0, adopted).expect("room");
    let mut stream = Vec::new();
    let hello = RequestBody::Hello { protocol: PROTOCOL, name: "fuzz", pid: 1 };
    let large = RequestBody::Set { condition: SetCondition::Always, key: b"large", value: &[b'l'; 90_000] };
    wire::encode_request(&mut stream, &Request { number: 0, body: hello });
    wire::encode_request(&mut stream, &Request { number: 1, body: large.clone() });
    wire::encode_request(&mut stream, &Request { number: 2, body: large });
    // The last value stays half collected.
    stream.truncate(stream.len() - 20_000);
    feed(&mut connection, &mut context, &stream, &mut Vec::new());
    segment
}

fn key_of(number: u32) -> Vec<u8> {
    format!("key {number}").into_bytes()
}

fn put(table: &Table, key: &[u8], value: &[u8]) {
    let mut transaction = Transaction::begin(table.segment(), worker(table.segment()));
    let set = table.set(&mut transaction, table.hash_of(key), key, value, SetCondition::Always);
    let _ = set.map(|_| transaction.commit());
    let _ = table.collect_garbage(worker(table.segment()));
}

fn worker(segment: &Segment) -> &WorkerSlot {
    segment.memory().object(segment.regions().worker(0)).expect("inside")
}
