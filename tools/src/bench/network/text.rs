//! How Redis and memcached are talked to: in lines of text with values among them.
//!
//! Redis is asked in its usual protocol (RESP 2, arrays of bulk strings), memcached in its meta commands, which are its shortest.

use std::os::fd::BorrowedFd;

use super::protocol::{Answer, Body, Protocol, Template, first_key};
use crate::bench::workload::Workload;

/// Longest line of an answer.
const LINE_BYTES_MAX: usize = 1024;
const LINE_END: &[u8] = b"\r\n";

/// Lines of text.
pub struct Text {
    read: Template,
    write: Template,
    /// The line before a value.
    value_line: Vec<u8>,
    value_bytes: usize,
    stored: &'static [u8],
    missing: &'static [u8],
}

impl Text {
    /// Redis, with keys and values as long as the workload says.
    pub fn redis(workload: &Workload) -> Self {
        let (key_bytes, value_bytes) = (workload.key_bytes, workload.value_bytes);
        let key_line = format!("${key_bytes}\r\n");
        Self {
            read: template(&format!("*2\r\n$3\r\nGET\r\n{key_line}"), "\r\n", workload),
            write: template(
                &format!("*3\r\n$3\r\nSET\r\n{key_line}"),
                &format!("\r\n${value_bytes}\r\n"),
                workload,
            ),
            value_line: format!("${value_bytes}\r\n").into_bytes(),
            value_bytes,
            stored: b"+OK\r\n",
            missing: b"$-1\r\n",
        }
    }

    /// memcached, with keys and values as long as the workload says.
    pub fn memcached(workload: &Workload) -> Self {
        let value_bytes = workload.value_bytes;
        Self {
            read: template("mg ", " v\r\n", workload),
            write: template("ms ", &format!(" {value_bytes}\r\n"), workload),
            value_line: format!("VA {value_bytes}\r\n").into_bytes(),
            value_bytes,
            stored: b"HD\r\n",
            missing: b"EN\r\n",
        }
    }

    /// Anything but the answers that are expected.
    #[cold]
    fn unexpected(&self, input: &[u8]) -> Result<Option<Answer<'static>>, String> {
        let Some(end) = input.windows(2).take(LINE_BYTES_MAX).position(|pair| pair == LINE_END) else {
            return if input.len() > LINE_BYTES_MAX { Err("its answer is no line".into()) } else { Ok(None) };
        };
        let line = &input[..end + LINE_END.len()];
        if line == self.missing {
            return Ok(Some(Answer { length: line.len(), body: Body::Missing }));
        }
        Err(format!("it answers: {}", String::from_utf8_lossy(&input[..end])))
    }
}

fn template(before: &str, behind: &str, workload: &Workload) -> Template {
    let bytes = [before.as_bytes(), &first_key(workload), behind.as_bytes()].concat();
    Template::new(bytes, before.len(), workload)
}

impl Protocol for Text {
    fn greet(&self, _socket: BorrowedFd<'_>) -> anyhow::Result<()> {
        Ok(())
    }

    #[inline]
    fn ask_read(&self, output: &mut Vec<u8>, _number: u8, index: u64) {
        self.read.append(output, index);
    }

    #[inline]
    fn ask_write(&self, output: &mut Vec<u8>, _number: u8, index: u64, value: &[u8]) {
        self.write.append(output, index);
        output.extend_from_slice(value);
        output.extend_from_slice(LINE_END);
    }

    #[inline]
    fn answer<'i>(&self, input: &'i [u8], _number: u8) -> Result<Option<Answer<'i>>, String> {
        if input.starts_with(&self.value_line) {
            let (from, to) = (self.value_line.len(), self.value_line.len() + self.value_bytes);
            return match input.get(to..to + LINE_END.len()) {
                Some(LINE_END) => {
                    Ok(Some(Answer { length: to + LINE_END.len(), body: Body::Value(&input[from..to]) }))
                }
                Some(_) => Err("a value is longer than it says".into()),
                None => Ok(None),
            };
        }
        if input.starts_with(self.stored) {
            return Ok(Some(Answer { length: self.stored.len(), body: Body::Stored }));
        }
        self.unexpected(input)
    }
}
