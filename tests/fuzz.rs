//! The promise: whatever bytes come from a client or are found in a segment or a backup file, nothing crashes.
//!
//! Method: the bodies of the fuzz targets (`kvs-core/fuzz`, run there by `cargo +nightly fuzz run NAME corpus/NAME seeds/NAME`) get
//! the inputs in `seeds`, the same with a few bytes changed, and others made here. `KVS_FUZZ` sets how many for each, `KVS_SEED`
//! repeats a run. What a fuzzer finds is kept in `seeds`.

#[path = "../kvs-core/fuzz/src/lib.rs"]
mod bodies;

use std::path::Path;

use kvs_core::backup::record::{self, Kind};
use kvs_core::wire::{
    FRAME_HEADER_BYTES, KeyBytes, Request, RequestBody, Response, ResponseBody, SESSION_TOKEN_BYTES,
    SessionToken, SetCondition, encode_request, encode_response,
};
use kvs_harness::binaries::workspace;
use kvs_harness::random::{Random, seed};
use kvs_harness::store::Place;

fn inputs(default: u64) -> u64 {
    std::env::var("KVS_FUZZ").ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// The inputs kept for a target.
fn seeds(target: &str) -> Vec<Vec<u8>> {
    let directory = workspace().join("kvs-core/fuzz/seeds").join(target);
    let mut files: Vec<_> =
        std::fs::read_dir(&directory).expect("seeds").map(|file| file.expect("a seed").path()).collect();
    files.sort();
    files.iter().map(|file| std::fs::read(file).expect("a seed")).collect()
}

/// Each seed as it is, then `count` inputs: seeds with changes, and what `other` makes.
fn run(target: &str, count: u64, other: impl Fn(&mut Random) -> Vec<u8>, body: impl Fn(&[u8])) {
    let seeds = seeds(target);
    assert!(seeds.len() > 3, "the seeds of {target} are there");
    seeds.iter().for_each(|seed| body(seed));
    let mut random = Random::new(seed());
    for _ in 0..inputs(count) {
        let input = if random.once_in(2) {
            let seed = seeds[random.below(seeds.len() as u64) as usize].clone();
            mutate(&mut random, seed)
        } else {
            other(&mut random)
        };
        body(&input);
    }
}

/// Some bytes become others.
fn mutate(random: &mut Random, mut bytes: Vec<u8>) -> Vec<u8> {
    for _ in 0..random.below(4) {
        if bytes.is_empty() {
            break;
        }
        let at = random.below(bytes.len() as u64) as usize;
        match random.below(4) {
            0 => bytes[at] = random.number() as u8,
            1 => bytes[at] ^= 1 << random.below(8),
            2 => bytes.truncate(at),
            _ => bytes[at] = [0, 0x7f, 0x80, 0xff][random.below(4) as usize],
        }
    }
    bytes
}

fn some_bytes(random: &mut Random, longest: u64) -> Vec<u8> {
    let length = random.below(longest + 1) as usize;
    random.bytes(length)
}

fn some_request(random: &mut Random) -> Vec<u8> {
    let key = [b'k', random.below(9) as u8];
    let value = if random.once_in(12) { some_bytes(random, 200_000) } else { some_bytes(random, 5_000) };
    let condition = if random.once_in(3) { SetCondition::IfAbsent } else { SetCondition::Always };
    let token = SessionToken::new([random.below(3) as u8; SESSION_TOKEN_BYTES]);
    let kinds = if random.once_in(4) { 8 } else { 6 };
    let body = match random.below(kinds) {
        7 => RequestBody::Session { token, attempt: random.below(4) },
        6 => RequestBody::EndSession,
        0 => RequestBody::Get { key: &key },
        1 | 2 => RequestBody::Set { condition, key: &key, value: &value },
        3 => RequestBody::Delete { key: &key },
        4 => RequestBody::Increment { key: &key, by: random.number() as i64 },
        _ => RequestBody::List { prefix: &key[..1], cursor: random.below(3), limit: random.below(9) as u32 },
    };
    let mut frame = Vec::new();
    // Small ones meet in a session.
    let number = if random.once_in(2) { random.below(6) } else { random.number() };
    encode_request(&mut frame, &Request { number: number as u32, body });
    frame
}

fn some_response(random: &mut Random) -> Vec<u8> {
    let value = some_bytes(random, 40);
    let body = match random.below(3) {
        0 => ResponseBody::Value { value: &value },
        1 => ResponseBody::Number { value: random.number() as i64 },
        _ => ResponseBody::Keys { keys: vec![KeyBytes(&value)], next: Some(random.number()) },
    };
    let mut frame = Vec::new();
    encode_response(&mut frame, &Response { number: random.number() as u32, body });
    frame
}

#[test]
fn fuzz_frames_of_any_bytes_decode_or_are_refused() {
    let other = |random: &mut Random| {
        let frame = match random.below(3) {
            0 => some_request(random),
            1 => some_response(random),
            _ => some_bytes(random, 40),
        };
        mutate(random, frame)
    };
    run("frame", 200_000, other, |bytes| {
        bodies::frame(bytes);
        bodies::frame(bytes.get(FRAME_HEADER_BYTES..).unwrap_or_default());
    });
}

#[test]
fn fuzz_packets_between_the_servers_are_messages_or_refused() {
    run("control", 20_000, |random| some_bytes(random, 60), bodies::control);
}

#[test]
fn fuzz_connections_fed_with_any_bytes_answer_in_frames_and_leave_nothing() {
    let other = |random: &mut Random| {
        let mut stream = vec![random.number() as u8 & !u8::from(!random.once_in(8))];
        for _ in 0..random.below(12) {
            let request = some_request(random);
            let broken = random.once_in(6);
            stream.extend(if broken { mutate(random, request) } else { request });
        }
        stream
    };
    run("connection", 3_000, other, bodies::connection);
}

/// Changes of words, twelve bytes each, that are often near what could be there.
fn some_changes(random: &mut Random) -> Vec<u8> {
    let mut input = Vec::new();
    for _ in 0..random.between(1, 10) {
        let value = match random.below(5) {
            0 => random.number(),
            1 => random.below(5_000),
            2 => u64::MAX - random.below(3),
            // What looks like an offset, or a slot.
            _ => (random.below(1 << 26) * 16) | (random.below(1 << 16) << 48),
        };
        // What matters most is at the beginning of each part.
        let place = if random.once_in(2) { random.below(16) } else { random.number() };
        let [part, low, middle, high, ..] = (place << 8 | random.below(256)).to_le_bytes();
        input.extend_from_slice(&[part, low, middle, high]);
        input.extend_from_slice(&value.to_le_bytes());
    }
    input
}

#[test]
fn fuzz_segments_with_any_words_are_verified_recovered_and_used() {
    run("segment", 3_000, some_changes, bodies::segment);
}

/// Records that are repaired later, among bytes that are none.
fn some_backup(random: &mut Random) -> Vec<u8> {
    let mut input = vec![3 - random.below(8) as u8 / 7, random.below(12) as u8];
    for _ in 0..random.below(12) {
        let key = format!("key {}", random.below(4)).into_bytes();
        let kind = [Kind::Set, Kind::Set, Kind::Delete, Kind::Synced][random.below(4) as usize];
        let value = if kind == Kind::Set { some_bytes(random, 200) } else { Vec::new() };
        let key = if kind == Kind::Synced { Vec::new() } else { key };
        let start = input.len();
        record::begin(&mut input, (0, 0), kind, random.below(1500), (key.len(), value.len()));
        input.extend([key, value].concat());
        record::finish(&mut input, start, 0);
        if random.once_in(30) {
            let between = some_bytes(random, 60);
            input.extend(between);
        }
    }
    input
}

#[test]
fn fuzz_backup_files_of_any_bytes_are_loaded_cut_or_refused() {
    run("backup", 3_000, some_backup, bodies::backup);
}

#[test]
fn fuzz_segment_files_with_any_words_are_opened_or_refused() {
    let place = Place::new();
    let path = Path::new("/dev/shm").join(format!("kvs-{}", place.name()));
    let other = |random: &mut Random| {
        let mut input = vec![random.number() as u8];
        input.extend(some_changes(random));
        input
    };
    run("attach", 1_000, other, |input| bodies::attach(&path, input));
    std::fs::remove_file(&path).expect("the last one is there");
}
