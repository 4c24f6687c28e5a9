//! Goal: answers are found wherever the stream is cut, and nothing else passes for one. Method: the bytes each store sends, whole, cut
//! at every place, and wrong.

use kvs_core::wire::{
    ErrorCode, RequestBody, Response, ResponseBody, SetCondition, decode_request, encode_response, peek,
};

use super::kvs::Kvs;
use super::protocol::{Body, Protocol};
use super::text::Text;
use crate::bench::workload::{Distribution, Workload};

fn workload(value_bytes: usize) -> Workload {
    let distribution = Distribution::Uniform;
    Workload { keys: 1000, key_bytes: 16, value_bytes, read_share: 0.5, distribution, seed: 1 }
}

fn frame(number: u32, body: ResponseBody<'_>) -> Vec<u8> {
    let mut frame = Vec::new();
    encode_response(&mut frame, &Response { number, body });
    frame
}

/// Checks that `bytes` are this answer, that each beginning of them is none yet, and what is behind them doesn't matter.
fn assert_answer(protocol: &dyn Protocol, bytes: &[u8], body: Body<'_>) {
    for cut in 0..bytes.len() {
        assert_eq!(protocol.answer(&bytes[..cut], 9), Ok(None), "cut at {cut} of {bytes:?}");
    }
    let followed = [bytes, b"more"].concat();
    for input in [bytes, &followed] {
        let answer = protocol.answer(input, 9).expect("sound").expect("whole");
        assert_eq!((answer.length, answer.body), (bytes.len(), body));
    }
}

#[test]
fn protocol_kvs_answers_are_found_whole_and_split() {
    for value_bytes in [0, 1, 32, 127, 128, 20_000] {
        let protocol = Kvs::new(&workload(value_bytes));
        let value = vec![7; value_bytes];
        assert_answer(&protocol, &frame(9, ResponseBody::Value { value: &value }), Body::Value(&value));
        assert_answer(&protocol, &frame(9, ResponseBody::Stored), Body::Stored);
        assert_answer(&protocol, &frame(9, ResponseBody::Missing), Body::Missing);
    }
}

#[test]
fn protocol_kvs_other_answers_are_refused() {
    let protocol = Kvs::new(&workload(32));
    let error = ResponseBody::Error { code: ErrorCode::StoreFull, message: "no room" };
    for (bytes, why) in [
        (frame(8, ResponseBody::Stored), "answer 8"),
        (frame(9, ResponseBody::Value { value: &[7; 31] }), "31 bytes"),
        (frame(9, ResponseBody::Deleted), "something else"),
        (frame(9, error), "no room"),
        (b"HTTP/1.1 400 Bad Request\r\n".to_vec(), "frame"),
    ] {
        let refused = protocol.answer(&bytes, 9).expect_err("no answer");
        assert!(refused.contains(why), "{refused}");
    }
}

#[test]
fn protocol_kvs_requests_are_what_the_wire_says() {
    for value_bytes in [0, 32, 127, 128, 20_000] {
        let protocol = Kvs::new(&workload(value_bytes));
        let (mut output, value) = (Vec::new(), vec![7; value_bytes]);
        protocol.ask_read(&mut output, 5, 42);
        let read = output.len();
        protocol.ask_write(&mut output, 6, 43, &value);
        for (bytes, number, body) in [
            (&output[..read], 5, RequestBody::Get { key: b"0000000000000042" }),
            (
                &output[read..],
                6,
                RequestBody::Set { condition: SetCondition::Always, key: b"0000000000000043", value: &value },
            ),
        ] {
            let extent = peek(bytes, 1 << 20).expect("a frame").expect("whole");
            let request = decode_request(extent.payload(bytes).expect("whole")).expect("a request");
            assert_eq!((extent.total, request.number, request.body), (bytes.len(), number, body));
        }
    }
}

#[test]
fn protocol_text_answers_are_found_whole_and_split() {
    let (redis, memcached) = (Text::redis(&workload(3)), Text::memcached(&workload(3)));
    assert_answer(&redis, b"$3\r\n\r\n\r\r\n", Body::Value(b"\r\n\r"));
    assert_answer(&redis, b"+OK\r\n", Body::Stored);
    assert_answer(&redis, b"$-1\r\n", Body::Missing);
    assert_answer(&memcached, b"VA 3\r\nabc\r\n", Body::Value(b"abc"));
    assert_answer(&memcached, b"HD\r\n", Body::Stored);
    assert_answer(&memcached, b"EN\r\n", Body::Missing);
}

#[test]
fn protocol_text_other_answers_are_refused() {
    let (redis, memcached) = (Text::redis(&workload(3)), Text::memcached(&workload(3)));
    assert!(redis.answer(b"$4\r\nabcd\r\n", 9).is_err());
    assert!(redis.answer(b"$3\r\nabcd\r\n", 9).is_err());
    assert!(redis.answer(&[b'x'; 2000], 9).is_err());
    let refused = redis.answer(b"-OOM command not allowed\r\n", 9).expect_err("an error");
    assert!(refused.contains("OOM command"), "{refused}");
    let refused = memcached.answer(b"SERVER_ERROR out of memory\r\n", 9).expect_err("an error");
    assert!(refused.contains("out of memory"), "{refused}");
}

#[test]
fn protocol_text_requests_are_what_the_stores_read() {
    let mut output = Vec::new();
    let redis = Text::redis(&workload(3));
    redis.ask_read(&mut output, 1, 42);
    redis.ask_write(&mut output, 2, 43, b"abc");
    let memcached = Text::memcached(&workload(3));
    memcached.ask_read(&mut output, 3, 42);
    memcached.ask_write(&mut output, 4, 43, b"abc");
    let expected = "*2\r\n$3\r\nGET\r\n$16\r\n0000000000000042\r\n\
                    *3\r\n$3\r\nSET\r\n$16\r\n0000000000000043\r\n$3\r\nabc\r\n\
                    mg 0000000000000042 v\r\nms 0000000000000043 3\r\nabc\r\n";
    assert_eq!(String::from_utf8(output).expect("text"), expected);
}
