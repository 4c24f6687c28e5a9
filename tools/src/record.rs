//! An entry as a line of JSON: `{"key":"…","value":"…"}`, with `key_base64` or `value_base64` for what is not UTF-8.

use std::io::{self, Write};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kvs_core::limits::KEY_BYTES_MAX;
use serde::{Deserialize, Serialize};

/// JSON may write a byte of text with up to six (`\u0000`); base64 takes less.
const BYTES_PER_BYTE_MAX: u64 = 6;
/// Names, quotes and spaces of a line.
const FRAME_BYTES_MAX: u64 = 1024;
/// Longest explanation of what is wrong with a line; it may quote the line.
const REASON_LETTERS_MAX: usize = 200;

/// A key and its value.
#[derive(Debug, PartialEq, Eq)]
pub struct Record {
    /// The key.
    pub key: Vec<u8>,
    /// The value.
    pub value: Vec<u8>,
}

/// Longest line that an entry can need, in bytes.
pub fn line_bytes_max(value_bytes_max: u64) -> u64 {
    value_bytes_max.saturating_add(KEY_BYTES_MAX as u64).saturating_mul(BYTES_PER_BYTE_MAX) + FRAME_BYTES_MAX
}

#[derive(Serialize)]
struct Written<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key_base64: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value_base64: Option<String>,
}

/// Writes an entry and a line end.
pub fn write(mut to: impl Write, key: &[u8], value: &[u8]) -> io::Result<()> {
    let (key, key_base64) = text_or_base64(key);
    let (value, value_base64) = text_or_base64(value);
    serde_json::to_writer(&mut to, &Written { key, key_base64, value, value_base64 })?;
    to.write_all(b"\n")
}

fn text_or_base64(bytes: &[u8]) -> (Option<&str>, Option<String>) {
    match std::str::from_utf8(bytes) {
        Ok(text) => (Some(text), None),
        Err(_) => (None, Some(STANDARD.encode(bytes))),
    }
}

// A field that this release does not know would be lost silently, so it is refused.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Read {
    key: Option<String>,
    key_base64: Option<String>,
    value: Option<String>,
    value_base64: Option<String>,
}

/// Reads a line; the error says what is wrong with it.
pub fn parse(line: &[u8]) -> Result<Record, String> {
    if line.trim_ascii_start().first() != Some(&b'{') {
        return Err("it is no JSON object; write {\"key\":…,\"value\":…}".into());
    }
    let read: Read = serde_json::from_slice(line).map_err(|error| {
        let text = error.to_string().replace(" at line 1 column ", " at column ");
        text.chars().take(REASON_LETTERS_MAX).collect::<String>()
    })?;
    Ok(Record {
        key: bytes_of("key", read.key, read.key_base64)?,
        value: bytes_of("value", read.value, read.value_base64)?,
    })
}

fn bytes_of(name: &str, text: Option<String>, base64: Option<String>) -> Result<Vec<u8>, String> {
    match (text, base64) {
        (Some(text), None) => Ok(text.into_bytes()),
        (None, Some(base64)) => STANDARD.decode(base64).map_err(|error| {
            format!("\"{name}_base64\" is no base64: {}", error.to_string().trim_end_matches('.'))
        }),
        (None, None) => Err(format!("\"{name}\" is missing; give \"{name}\" or \"{name}_base64\"")),
        (Some(_), Some(_)) => Err(format!("it has both \"{name}\" and \"{name}_base64\"; give one of them")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(key: &[u8], value: &[u8]) -> String {
        let mut line = Vec::new();
        write(&mut line, key, value).expect("memory takes it");
        String::from_utf8(line).expect("JSON is text")
    }

    #[test]
    fn record_of_any_bytes_is_one_line_and_comes_back() {
        for bytes in [&b""[..], b"text", "grün\n\"\\\u{0}".as_bytes(), b"\xff\xfe\n", &[0; 1000]] {
            let line = written(b"k", bytes);
            assert_eq!(line.matches('\n').count(), 1, "{line:?}");
            assert!(line.len() as u64 <= line_bytes_max(bytes.len() as u64));
            assert_eq!(parse(line.as_bytes()), Ok(Record { key: b"k".into(), value: bytes.into() }));
            let record = parse(written(bytes, b"v").as_bytes()).expect("read back");
            assert_eq!((record.key.as_slice(), record.value.as_slice()), (bytes, &b"v"[..]));
        }
    }

    #[test]
    fn record_is_base64_only_where_it_is_no_text() {
        assert_eq!(written(b"a", b"b"), "{\"key\":\"a\",\"value\":\"b\"}\n");
        assert_eq!(written(b"a", b"\xff"), "{\"key\":\"a\",\"value_base64\":\"/w==\"}\n");
        assert_eq!(written(b"\xff", b"b"), "{\"key_base64\":\"/w==\",\"value\":\"b\"}\n");
    }

    #[test]
    fn record_that_is_wrong_is_refused_with_a_reason() {
        let reason = |line: &str| parse(line.as_bytes()).expect_err(line);
        assert!(reason("hello").contains("no JSON object"));
        assert!(reason("[\"a\",null,\"b\",null]").contains("no JSON object"));
        assert!(reason("{\"key\":\"a\"}").contains("\"value\" is missing"));
        assert!(reason("{\"value\":\"a\"}").contains("\"key\" is missing"));
        assert!(reason("{\"key\":\"a\",\"key_base64\":\"YQ==\",\"value\":\"b\"}").contains("both \"key\""));
        assert!(reason("{\"key\":\"a\",\"value\":\"b\",\"value_base64\":\"\"}").contains("both \"value\""));
        assert!(reason("{\"key\":\"a\",\"value_base64\":\"!\"}").contains("\"value_base64\" is no base64"));
        assert!(reason("{\"key\":\"a\",\"value_base64\":\"YQ\"}").contains("base64"));
        assert!(reason("{\"key\":\"a\",\"value\":\"b\",\"expires\":1}").contains("expires"));
        assert!(reason("{\"key\":\"a\",\"value\":7}").contains("at column"));
        assert!(reason("{\"key\":\"a\",\"value\":\"b\"} x").contains("trailing"));
        assert!(reason("{\"key\":\"a\",\"value\":\"b").contains("at column"));
        assert!(parse(b"{\"key\":\"\xff\",\"value\":\"b\"}").is_err());
    }
}
