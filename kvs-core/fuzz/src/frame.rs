//! What clients and the server say to each other.

use kvs_core::limits::VALUE_BYTES_MAX_LIMIT;
use kvs_core::wire::{self, FRAME_HEADER_BYTES, RequestBody, ResponseBody, VALUE_HEAD_BYTES_MAX};

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
        if let ResponseBody::Value { value } = response.body {
            let mut head = [0; VALUE_HEAD_BYTES_MAX];
            let length = wire::value_response_head(&mut head, response.number, value.len());
            assert_eq!([&head[..length], value].concat(), frame);
        }
    }
}
