//! Goal: encoding and decoding agree, streaming agrees with both, and arbitrary bytes never panic. Method: proptest.

use proptest::prelude::*;

use super::super::*;

fn byte_string() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![4 => prop::collection::vec(any::<u8>(), 0..40), 1 => prop::collection::vec(any::<u8>(), 120..300)]
}

fn condition() -> impl Strategy<Value = SetCondition> {
    prop_oneof![Just(SetCondition::Always), Just(SetCondition::IfAbsent)]
}

fn check_request(number: u32, body: RequestBody<'_>) {
    let request = Request { number, body };
    let mut out = b"before".to_vec();
    encode_request(&mut out, &request);
    let frame = &out[6..];
    let extent = peek(frame, request_length_max(0)).unwrap().unwrap();
    assert_eq!(extent.total, frame.len());
    assert_eq!(decode_request(extent.payload(frame).unwrap()), Ok(request));
}

fn check_response(number: u32, body: ResponseBody<'_>) {
    let response = Response { number, body };
    let mut frame = Vec::new();
    encode_response(&mut frame, &response);
    assert_eq!(decode_response(&frame[FRAME_HEADER_BYTES..]), Ok(response));
}

proptest! {
    #[test]
    fn requests_survive_the_wire(
        number: u32, key in byte_string(), value in byte_string(), condition in condition(),
        by: i64, cursor: u64, limit: u32, protocol: u16, name: String, token: [u8; SESSION_TOKEN_BYTES],
    ) {
        check_request(number, RequestBody::Hello { protocol, name: &name, pid: limit });
        check_request(number, RequestBody::Get { key: &key });
        check_request(number, RequestBody::Set { condition, key: &key, value: &value });
        check_request(number, RequestBody::Delete { key: &key });
        check_request(number, RequestBody::Increment { key: &key, by });
        check_request(number, RequestBody::List { prefix: &key, cursor, limit });
        check_request(number, RequestBody::Stats);
        check_request(number, RequestBody::Session { token: SessionToken::new(token), attempt: cursor });
        check_request(number, RequestBody::EndSession);
    }

    #[test]
    fn responses_survive_the_wire(
        number: u32, keys in prop::collection::vec(byte_string(), 0..20), text: String, count: u64, value: i64,
        next: Option<u64>, resumed: bool,
    ) {
        check_response(number, ResponseBody::Number { value });
        check_response(number, ResponseBody::Session { resumed, window: number });
        let keys = keys.iter().map(|key| KeyBytes(key)).collect();
        check_response(number, ResponseBody::Keys { keys, next });
        let values = [StatisticValue::Number(count), StatisticValue::Text(&text), StatisticValue::Absent];
        let statistics = values.map(|value| Statistic { name: &text, value }).to_vec();
        check_response(number, ResponseBody::Stats { statistics });
        let welcome =
            ResponseBody::Welcome { protocol: 1, server: &text, connection: count, value_bytes_max: count };
        check_response(number, welcome);
    }

    #[test]
    fn set_prefix_agrees_with_whole_request(
        number: u32, key in prop::collection::vec(any::<u8>(), 1..300), value in byte_string(),
        condition in condition(),
    ) {
        let mut frame = Vec::new();
        encode_request(&mut frame, &Request { number, body: RequestBody::Set { condition, key: &key, value: &value } });
        let payload = &frame[FRAME_HEADER_BYTES..];
        let value_offset = payload.len() - value.len();
        for arrived in 0..value_offset {
            prop_assert_eq!(decode_set_prefix(&payload[..arrived], payload.len()), Ok(None));
        }
        let expected = SetPrefix { number, condition, key: &key, value_length: value.len(), value_offset };
        for arrived in value_offset..=payload.len() {
            prop_assert_eq!(decode_set_prefix(&payload[..arrived], payload.len()), Ok(Some(expected)));
        }
    }

    #[test]
    fn value_head_agrees_with_whole_response(number: u32, value in byte_string()) {
        let mut whole = Vec::new();
        encode_response(&mut whole, &Response { number, body: ResponseBody::Value { value: &value } });
        let mut head = [0; VALUE_HEAD_BYTES_MAX];
        let head_length = value_response_head(&mut head, number, value.len());
        let streamed = [&head[..head_length], &value].concat();
        prop_assert_eq!(streamed, whole);
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), length: usize) {
        let _ = peek(&bytes, length);
        let _ = looks_like_http(&bytes);
        let _ = decode_request(&bytes);
        let _ = decode_response(&bytes);
        let _ = decode_set_prefix(&bytes, length);
        let _ = decode_set_prefix(&bytes, bytes.len());
    }

    /// Random bytes are mostly refused at once; bytes that begin well get further.
    #[test]
    fn broken_messages_never_panic(
        number: u8, variant in 0..12u8, rest in prop::collection::vec(any::<u8>(), 0..60),
    ) {
        let bytes = [&[number & 0x7f, variant][..], &rest].concat();
        let _ = decode_request(&bytes);
        let _ = decode_response(&bytes);
        let prefix = decode_set_prefix(&bytes, bytes.len());
        if let (Ok(Some(prefix)), Ok(Request { body, .. })) = (prefix, decode_request(&bytes)) {
            let value = &bytes[prefix.value_offset..];
            prop_assert_eq!(body, RequestBody::Set { condition: prefix.condition, key: prefix.key, value });
        }
    }
}
