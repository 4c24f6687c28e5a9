//! What clients and the server say to each other.

use kvs_core::limits::VALUE_BYTES_MAX_LIMIT;
use kvs_core::wire::{
    self, DecodeError, FRAME_HEADER_BYTES, Request, RequestBody, ResponseBody, SetPrefix,
    VALUE_HEAD_BYTES_MAX,
};

/// Bytes as a stream of frames, requests and responses. What decodes is encoded again, and then decodes to the same.
pub fn frame(input: &[u8]) {
    let _ = wire::looks_like_http(input);
    let _ = wire::decode_set_prefix(input, input.len() + 1);
    if let Ok(Some(prefix)) = wire::decode_set_prefix(input, input.len()) {
        let SetPrefix { number, condition, key, value_offset, .. } = prefix;
        let body = RequestBody::Set { condition, key, value: &input[value_offset..] };
        assert_eq!(wire::decode_request(input), Ok(Request { number, body }));
        assert_eq!(prefix.value_length, input.len() - value_offset);
    }
    if let Ok(Some(extent)) = wire::peek(input, wire::request_length_max(VALUE_BYTES_MAX_LIMIT)) {
        assert!(extent.total > FRAME_HEADER_BYTES);
    }
    if let Ok(request) = wire::decode_request(input) {
        let mut frame = Vec::new();
        wire::encode_request(&mut frame, &request);
        assert_eq!(wire::decode_request(&frame[FRAME_HEADER_BYTES..]).as_ref(), Ok(&request));
        if let RequestBody::Set { key: [_, ..], .. } = request.body {
            assert!(matches!(
                wire::decode_set_prefix(input, input.len()),
                Ok(Some(_)) | Err(DecodeError::KeyLength { .. })
            ));
        }
    }
    if let Ok(response) = wire::decode_response(input) {
        let mut frame = Vec::new();
        wire::encode_response(&mut frame, &response);
        assert_eq!(wire::decode_response(&frame[FRAME_HEADER_BYTES..]).as_ref(), Ok(&response));
        if let ResponseBody::Value { value } = response.body {
            let mut head = [0; VALUE_HEAD_BYTES_MAX];
            let length = wire::value_response_head(&mut head, response.number, value.len());
            assert_eq!([&head[..length], value].concat(), frame);
        }
    }
}
