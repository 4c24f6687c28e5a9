//! Goal: the bytes on the wire never change by accident, and no bytes from outside do harm.
//! Method: golden bytes for every message ([`golden`]), random messages and random bytes ([`random`]), and the edges of
//! frames here.

mod golden;
mod random;

use super::*;

#[test]
fn peek_waits_for_whole_header() {
    let frame = [3, 0, 0, 0, 1, 7, 2, 0];
    for length in 0..FRAME_HEADER_BYTES {
        assert_eq!(peek(&frame[..length], 100), Ok(None));
    }
    assert_eq!(peek(&frame[..FRAME_HEADER_BYTES], 100), Ok(Some(FrameExtent { total: 7 })));
}

#[test]
fn peek_refuses_length_before_version_arrives() {
    assert_eq!(peek(&[101, 0, 0, 0], 100), Err(FrameError::Length { found: 101, max: 100 }));
    assert_eq!(peek(b"GET ", request_length_max(u64::MAX)).unwrap_err().code(), ErrorCode::FrameTooLarge);
}

#[test]
fn peek_refuses_empty_frames_and_other_versions() {
    for length in 0..3 {
        assert_eq!(peek(&[length, 0, 0, 0, 1], 100), Err(FrameError::Empty(length.into())));
    }
    assert_eq!(peek(&[3, 0, 0, 0, 2], 100), Err(FrameError::Version(2)));
}

#[test]
fn extent_gives_payload_only_when_whole() {
    let frame = [3, 0, 0, 0, 1, 7, 2, 99];
    let extent = peek(&frame, 100).unwrap().unwrap();
    assert_eq!(extent.payload_length(), 2);
    assert_eq!(extent.payload(&frame), Some(&[7, 2][..]));
    assert_eq!(extent.payload(&frame[..6]), None);
    assert_eq!(extent.payload_start(&frame[..6]), &[7]);
    assert_eq!(extent.payload_start(&frame), &[7, 2]);
    assert_eq!(extent.payload_start(&frame[..3]), &[] as &[u8]);
}

#[test]
fn http_is_recognised_from_four_bytes() {
    for start in [&b"GET / HTTP/1.1"[..], b"POST", b"PRI * HTTP/2.0", b"HTTP/1.1 400 Bad Request"] {
        assert!(looks_like_http(start));
    }
    assert!(!looks_like_http(b"GET"));
    assert!(!looks_like_http(&[10, 0, 0, 0, 1]));
}

#[test]
fn unknown_variant_is_told_from_malformed() {
    assert_eq!(decode_request(&[9, 9]), Err(DecodeError::UnknownMessage { number: 9, variant: 9 }));
    assert_eq!(decode_response(&[9, 11]), Err(DecodeError::UnknownMessage { number: 9, variant: 11 }));
    let refused = decode_request(&[9, 1, 5, b'a']).unwrap_err();
    assert_eq!((refused.code(), refused.number()), (ErrorCode::Malformed, 9));
    assert_eq!(decode_request(&[]).unwrap_err().number(), 0);
}

#[test]
fn leftover_bytes_are_malformed() {
    let refused = decode_request(&[9, 6, 0]).unwrap_err();
    assert!(matches!(refused, DecodeError::Malformed { number: 9, .. }));
}

#[test]
fn set_prefix_refuses_other_messages() {
    assert_eq!(decode_set_prefix(&[9, 1, 1], 50), Err(DecodeError::NotASet { number: 9 }));
    assert_eq!(decode_set_prefix(&[9, 9], 50), Err(DecodeError::UnknownMessage { number: 9, variant: 9 }));
    assert_eq!(decode_set_prefix(&[9, 2, 2], 50).unwrap_err().code(), ErrorCode::Malformed);
}

#[test]
fn set_prefix_refuses_impossible_keys() {
    assert_eq!(decode_set_prefix(&[9, 2, 0, 0], 50), Err(DecodeError::KeyLength { number: 9, found: 0 }));
    let too_long = [9, 2, 0, 0x80, 0x80, 4];
    assert_eq!(
        decode_set_prefix(&too_long, 70_000),
        Err(DecodeError::KeyLength { number: 9, found: 65_536 })
    );
}

#[test]
fn set_prefix_refuses_value_that_does_not_fit_frame() {
    let start = [9, 2, 0, 1, b'k', 10];
    assert!(decode_set_prefix(&start, 16).unwrap().is_some());
    for payload_length in [15, 17] {
        assert_eq!(decode_set_prefix(&start, payload_length).unwrap_err().code(), ErrorCode::Malformed);
    }
    assert_eq!(decode_set_prefix(&start[..5], 5).unwrap_err().code(), ErrorCode::Malformed);
}

#[test]
fn session_token_is_compared_whole_and_shown_to_nobody() {
    let bytes = [7; SESSION_TOKEN_BYTES];
    let token = SessionToken::new(bytes);
    assert_eq!(token, SessionToken::from_words(token.words()));
    for place in 0..SESSION_TOKEN_BYTES {
        let mut other = bytes;
        other[place] ^= 0x80;
        assert_ne!(token, SessionToken::new(other), "byte {place}");
    }
    assert!(SessionToken::new([0; SESSION_TOKEN_BYTES]).is_zero() && !token.is_zero());
    let shown = format!("{:?}", RequestBody::Session { token, attempt: 3 });
    assert!(shown.contains("secret") && !shown.contains('7'), "{shown}");
}
