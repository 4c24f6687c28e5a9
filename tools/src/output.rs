//! What commands say: bytes, text or one JSON document on standard output, and one line on standard error.
//!
//! Nothing that came from elsewhere (a key, a server's message) moves a terminal's cursor from standard error.

use std::fmt;
use std::io::{self, BufWriter, IsTerminal as _, StdoutLock, Write};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value};

/// How a command shows its result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// For people and shell scripts.
    Text,
    /// One JSON document.
    Json,
}

/// How a command that did not fail ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Done.
    Done,
    /// The answer is no.
    No,
}

/// Whoever read standard output has stopped; there is nobody to write for, and nothing to complain about.
#[derive(Debug)]
pub struct NobodyReads;

impl fmt::Display for NobodyReads {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("standard output was closed by its reader")
    }
}

impl std::error::Error for NobodyReads {}

/// An error of writing to standard output.
pub fn write_error(error: io::Error) -> anyhow::Error {
    if error.kind() == io::ErrorKind::BrokenPipe {
        anyhow::Error::new(NobodyReads)
    } else {
        anyhow::Error::new(error).context("can't write to standard output")
    }
}

/// Standard output, for many small pieces; [`finish`](Printer::finish) it.
pub struct Printer(BufWriter<StdoutLock<'static>>);

impl Printer {
    /// Standard output.
    pub fn new() -> Self {
        Self(BufWriter::with_capacity(64 << 10, io::stdout().lock()))
    }

    /// Writes bytes as they are.
    pub fn bytes(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        self.0.write_all(bytes).map_err(write_error)
    }

    /// Writes a JSON value.
    pub fn json(&mut self, value: &Value) -> anyhow::Result<()> {
        serde_json::to_writer(&mut self.0, value).map_err(|error| write_error(error.into()))
    }

    /// Hands over what is still here.
    pub fn finish(mut self) -> anyhow::Result<()> {
        self.0.flush().map_err(write_error)
    }
}

/// Prints bytes as they are.
pub fn print(bytes: &[u8]) -> anyhow::Result<()> {
    let mut printer = Printer::new();
    printer.bytes(bytes)?;
    printer.finish()
}

/// Prints a line.
pub fn print_line(line: impl fmt::Display) -> anyhow::Result<()> {
    print(format!("{line}\n").as_bytes())
}

/// Prints the JSON document of the command.
pub fn print_json(value: &Value) -> anyhow::Result<()> {
    print_line(value)
}

/// Whether standard output is a terminal.
pub fn on_terminal() -> bool {
    io::stdout().is_terminal()
}

/// Tells on standard error, in one line, what is wrong.
pub fn complain(message: &str) {
    tell(&format!("kvs-tools: {}", for_people(message.trim_end().as_bytes())));
}

/// Tells something on standard error.
pub fn tell(line: &str) {
    // Nobody may be left to read it.
    let _ = writeln!(io::stderr(), "{line}");
}

/// Bytes as one line of text that is safe on a terminal: what is no text, and what would move the cursor, is escaped.
pub fn for_people(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for letter in chunk.valid().chars() {
            if letter.is_control() {
                text.extend(letter.escape_default());
            } else {
                text.push(letter);
            }
        }
        for byte in chunk.invalid() {
            text.push_str(&format!("\\x{byte:02x}"));
        }
    }
    text
}

/// Puts bytes into an object: as `name` when they are UTF-8, else as `name_base64`.
pub fn put_bytes(object: &mut Map<String, Value>, name: &str, bytes: &[u8]) {
    match std::str::from_utf8(bytes) {
        Ok(text) => object.insert(name.to_owned(), text.into()),
        Err(_) => object.insert(format!("{name}_base64"), STANDARD.encode(bytes).into()),
    };
}

/// An object that begins with a key.
pub fn object_of_key(key: &[u8]) -> Map<String, Value> {
    let mut object = Map::new();
    put_bytes(&mut object, "key", key);
    object
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_for_people_moves_no_cursor() {
        assert_eq!(for_people("grün".as_bytes()), "grün");
        assert_eq!(for_people(b"a\x1b[2J\nb\xff\x00"), "a\\u{1b}[2J\\nb\\xff\\u{0}");
    }

    #[test]
    fn output_json_has_bytes_as_text_or_base64() {
        assert_eq!(Value::Object(object_of_key(b"a\"b")).to_string(), r#"{"key":"a\"b"}"#);
        assert_eq!(Value::Object(object_of_key(b"\xff\0")).to_string(), r#"{"key_base64":"/wA="}"#);
    }
}
