//! Goal: a client in another language can rely on these bytes. Method: every message once, written out in hex. A change
//! here is a change of the format and needs a new version.

use super::super::*;
use RequestBody as Ask;
use ResponseBody as Answer;

fn bytes(hex: &str) -> Vec<u8> {
    hex.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect()
}

fn assert_request(body: RequestBody<'_>, number: u32, hex: &str) {
    let request = Request { number, body };
    let mut frame = Vec::new();
    encode_request(&mut frame, &request);
    assert_eq!(frame, bytes(hex), "{request:?}");
    assert_eq!(decode_request(&frame[FRAME_HEADER_BYTES..]), Ok(request));
}

fn assert_response(body: ResponseBody<'_>, number: u32, hex: &str) {
    let response = Response { number, body };
    let mut frame = Vec::new();
    encode_response(&mut frame, &response);
    assert_eq!(frame, bytes(hex), "{response:?}");
    assert_eq!(decode_response(&frame[FRAME_HEADER_BYTES..]), Ok(response));
}

#[test]
fn golden_requests() {
    assert_request(
        Ask::Hello { protocol: 1, name: "me", pid: 300 },
        0,
        "09 00 00 00 01 00 00 01 02 6d 65 ac 02",
    );
    assert_request(Ask::Get { key: b"a" }, 1, "05 00 00 00 01 01 01 01 61");
    let always = SetCondition::Always;
    let if_absent = SetCondition::IfAbsent;
    let set_always = Ask::Set { condition: always, key: b"a", value: b"xyz" };
    assert_request(set_always, 7, "0a 00 00 00 01 07 02 00 01 61 03 78 79 7a");
    let set_if_absent = Ask::Set { condition: if_absent, key: b"ab", value: b"" };
    assert_request(set_if_absent, 2, "08 00 00 00 01 02 02 01 02 61 62 00");
    assert_request(Ask::Delete { key: b"a" }, 3, "05 00 00 00 01 03 03 01 61");
    assert_request(Ask::Increment { key: b"a", by: 1 }, 4, "06 00 00 00 01 04 04 01 61 02");
    assert_request(Ask::Increment { key: b"a", by: -300 }, 4, "07 00 00 00 01 04 04 01 61 d7 04");
    let list = Ask::List { prefix: b"a", cursor: 128, limit: 1000 };
    assert_request(list, 5, "09 00 00 00 01 05 05 01 61 80 01 e8 07");
    assert_request(Ask::Stats, u32::MAX, "07 00 00 00 01 ff ff ff ff 0f 06");
    let token = SessionToken::new([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0xff]);
    let hex = "15 00 00 00 01 00 07 01 02 03 04 05 06 07 08 09 0a 0b 0c 0d 0e 0f ff 80 01";
    assert_request(Ask::Session { token, attempt: 128 }, 0, hex);
    assert_request(Ask::EndSession, 9, "03 00 00 00 01 09 08");
}

#[test]
fn golden_responses() {
    let welcome = Answer::Welcome { protocol: 1, server: "kvs", connection: 5, value_bytes_max: 16 << 20 };
    assert_response(welcome, 0, "0d 00 00 00 01 00 00 01 03 6b 76 73 05 80 80 80 08");
    assert_response(Answer::Value { value: b"xyz" }, 1, "07 00 00 00 01 01 01 03 78 79 7a");
    assert_response(Answer::Stored, 7, "03 00 00 00 01 07 02");
    assert_response(Answer::Deleted, 7, "03 00 00 00 01 07 03");
    assert_response(Answer::Missing, 7, "03 00 00 00 01 07 04");
    assert_response(Answer::Exists, 7, "03 00 00 00 01 07 05");
    assert_response(Answer::Number { value: -2 }, 7, "04 00 00 00 01 07 06 03");
    let keys = vec![KeyBytes(b"a"), KeyBytes(b"bc")];
    let page = Answer::Keys { keys, next: Some(9) };
    assert_response(page, 7, "0b 00 00 00 01 07 07 02 01 61 02 62 63 01 09");
    assert_response(Answer::Keys { keys: vec![], next: None }, 7, "05 00 00 00 01 07 07 00 00");
    let statistics = vec![
        Statistic { name: "n", value: StatisticValue::Number(128) },
        Statistic { name: "t", value: StatisticValue::Text("x") },
        Statistic { name: "a", value: StatisticValue::Absent },
    ];
    let hex = "11 00 00 00 01 07 08 03 01 6e 00 80 01 01 74 01 01 78 01 61 02";
    assert_response(Answer::Stats { statistics }, 7, hex);
    assert_response(Answer::Session { resumed: true, window: 256 }, 7, "06 00 00 00 01 07 0a 01 80 02");
    let refused = Answer::Error { code: ErrorCode::TooManyConnections, message: "no" };
    assert_response(refused, 0, "07 00 00 00 01 00 09 09 02 6e 6f");
}

#[test]
fn golden_error_codes() {
    let codes = [
        ErrorCode::Malformed,
        ErrorCode::UnsupportedVersion,
        ErrorCode::UnknownMessage,
        ErrorCode::FrameTooLarge,
        ErrorCode::KeyLength,
        ErrorCode::ValueLength,
        ErrorCode::NotANumber,
        ErrorCode::NumberRange,
        ErrorCode::StoreFull,
        ErrorCode::TooManyConnections,
        ErrorCode::Damaged,
        ErrorCode::HelloExpected,
        ErrorCode::ShuttingDown,
        ErrorCode::Internal,
        ErrorCode::BackupFailed,
        ErrorCode::Session,
    ];
    for (index, code) in codes.into_iter().enumerate() {
        let hex = format!("05 00 00 00 01 00 09 {index:02x} 00");
        assert_response(Answer::Error { code, message: "" }, 0, &hex);
        assert_eq!((usize::from(code.index()), ErrorCode::from_index(index as u8)), (index, Some(code)));
    }
}
