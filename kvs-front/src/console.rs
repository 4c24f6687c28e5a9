//! The operator's lines, from the terminal and from the console socket.
//!
//! On the socket a command is a line; the answer is `ok N` or `error N` on a line, and N bytes of text. One connection can
//! ask many things; it ends with the store.
//!
//! Bounds: a line has an end, operators are few, and one who doesn't read is let go. No lock; each operator has a thread of
//! its own, since commands wait for the data server.

use std::io::{IsTerminal, Read as _, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::accept;
use crate::front::Front;
use crate::operator::{self, Answer, Then};

/// Longest command, in bytes.
const COMMAND_BYTES_MAX: usize = 1024;
/// Operators at a time.
const OPERATORS_MAX: usize = 16;
/// How long an operator may be silent.
const SILENCE_MAX: Duration = Duration::from_secs(3600);
/// How long an operator may take to read.
const READ_PATIENCE: Duration = Duration::from_secs(10);
/// Pause after the kernel had no descriptor for an operator.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);
/// How often the terminal is looked at while it belongs to another job of the shell.
const BACKGROUND_PAUSE: Duration = Duration::from_millis(500);

/// Starts the console on the terminal, if there is an `input`, and on its socket.
///
/// # Errors
/// When no thread is to be had.
pub fn start(front: &Arc<Front>, socket: UnixListener, input: Option<OwnedFd>) -> anyhow::Result<()> {
    if let Some(input) = input {
        let front = Arc::clone(front);
        let thread =
            thread::Builder::new().name("console".into()).spawn(move || serve_terminal(&front, &input));
        thread.context("can't start the console")?;
    }
    let front = Arc::clone(front);
    let thread =
        thread::Builder::new().name("console-socket".into()).spawn(move || serve_socket(&front, &socket));
    thread.map(|_| ()).context("can't start the console socket")
}

/// Lines cut out of what is read piece by piece.
#[derive(Default)]
struct Lines(Vec<u8>);

/// A line is longer than any command.
#[derive(Debug, PartialEq, Eq)]
struct TooLong;

impl Lines {
    fn add(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// The next whole line.
    fn next(&mut self) -> Result<Option<String>, TooLong> {
        match self.0.iter().position(|byte| *byte == b'\n') {
            Some(end) if end <= COMMAND_BYTES_MAX => {
                let line: Vec<u8> = self.0.drain(..=end).collect();
                Ok(Some(String::from_utf8_lossy(&line).trim().to_owned()))
            }
            None if self.0.len() <= COMMAND_BYTES_MAX => Ok(None),
            _ => Err(TooLong),
        }
    }
}

/// Serves the terminal until its end, which ends nothing else.
fn serve_terminal(front: &Front, input: &OwnedFd) {
    let prompt = if input.is_terminal() && std::io::stderr().is_terminal() { "kvs> " } else { "" };
    let mut lines = Lines::default();
    let mut buffer = [0; COMMAND_BYTES_MAX];
    // Standard output belongs to the ready line; the operator reads the terminal, whichever stream it is.
    if is_foreground(input) {
        show(prompt);
    }
    while let Some(count) = read_terminal(input, &mut buffer) {
        lines.add(&buffer[..count]);
        loop {
            match lines.next() {
                Ok(Some(line)) => {
                    let answer = operator::obey(front, &line);
                    show(&answer.text);
                    answer.then.act(front);
                    if answer.then == Then::Quit {
                        return;
                    }
                    show(prompt);
                }
                Ok(None) => break,
                Err(TooLong) => {
                    lines = Lines::default();
                    show("that line is too long to be a command\n");
                }
            }
        }
    }
}

fn show(text: &str) {
    let mut terminal = std::io::stderr().lock();
    // A terminal that is gone shows nothing.
    let _ = terminal.write_all(text.as_bytes()).and_then(|()| terminal.flush());
}

/// Reads what was typed; None at the end. A process in the background that reads its terminal is stopped, so it waits until
/// the terminal is its own.
fn read_terminal(input: &OwnedFd, buffer: &mut [u8]) -> Option<usize> {
    loop {
        match poll(&mut [PollFd::from_borrowed_fd(input.as_fd(), PollFlags::IN)], None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => return None,
        }
        if !is_foreground(input) {
            thread::sleep(BACKGROUND_PAUSE);
            continue;
        }
        match rustix::io::read(input, &mut *buffer) {
            Ok(0) => return None,
            Ok(count) => return Some(count),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => thread::sleep(BACKGROUND_PAUSE),
            Err(_) => return None,
        }
    }
}

/// Whether `input` is not a terminal that belongs to another job of the shell just now.
fn is_foreground(input: &OwnedFd) -> bool {
    rustix::termios::tcgetpgrp(input).map_or(true, |group| group == rustix::process::getpgrp())
}

fn serve_socket(front: &Arc<Front>, socket: &UnixListener) {
    let operators = Arc::new(AtomicUsize::new(0));
    for operator in socket.incoming() {
        let Ok(operator) = operator else {
            thread::sleep(EXHAUSTED_PAUSE);
            continue;
        };
        let place = Place::take(&operators);
        let (front, operator) = (Arc::clone(front), Operator(operator));
        if !accept::is_ours(operator.0.as_fd()) {
            operator.refuse("this console serves its own user and root only\n");
        } else if place.0.load(Ordering::Relaxed) > OPERATORS_MAX {
            operator.refuse("as many consoles are open as may be; close one\n");
        } else {
            let thread = thread::Builder::new().name("operator".into()).spawn(move || {
                let _place = place;
                if let Err(error) = operator.serve(&front) {
                    log::debug!("console: {error}");
                }
            });
            if let Err(error) = thread {
                log::warn!("can't start a thread for the console: {error}");
            }
        }
    }
}

/// A place among the operators, given back when dropped.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(operators: &Arc<AtomicUsize>) -> Self {
        operators.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(operators))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

struct Operator(UnixStream);

impl Operator {
    fn serve(mut self, front: &Front) -> std::io::Result<()> {
        self.0.set_read_timeout(Some(SILENCE_MAX))?;
        self.0.set_write_timeout(Some(READ_PATIENCE))?;
        let mut lines = Lines::default();
        let mut buffer = [0; COMMAND_BYTES_MAX];
        loop {
            let count = self.0.read(&mut buffer)?;
            if count == 0 {
                return Ok(());
            }
            lines.add(&buffer[..count]);
            loop {
                match lines.next() {
                    Ok(Some(line)) => self.obey(front, &line)?,
                    Ok(None) => break,
                    Err(TooLong) => {
                        self.refuse("that line is too long to be a command\n");
                        return Ok(());
                    }
                }
            }
        }
    }

    fn obey(&mut self, front: &Front, line: &str) -> std::io::Result<()> {
        let answer = operator::obey(front, line);
        let sent = self.0.write_all(framed(&answer).as_bytes());
        // Told first, since the process may end; done in any case.
        answer.then.act(front);
        sent
    }

    fn refuse(&self, text: &str) {
        let answer = Answer { done: false, text: text.to_owned(), then: Then::Nothing };
        // A short answer fits the socket's buffer; one who is gone needs none.
        let _ = (&self.0).write_all(framed(&answer).as_bytes());
    }
}

fn framed(answer: &Answer) -> String {
    format!("{} {}\n{}", if answer.done { "ok" } else { "error" }, answer.text.len(), answer.text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn console_lines_arrive_in_pieces_and_several_at_once() {
        let mut lines = Lines::default();
        lines.add(b"sta");
        assert_eq!(lines.next(), Ok(None));
        lines.add(b"tus\r\n help \nq");
        assert_eq!(lines.next(), Ok(Some("status".to_owned())));
        assert_eq!(lines.next(), Ok(Some("help".to_owned())));
        assert_eq!(lines.next(), Ok(None));
        lines.add(b"\xff\n");
        assert_eq!(lines.next(), Ok(Some("q\u{fffd}".to_owned())));
    }

    #[test]
    fn console_line_without_end_is_refused() {
        let mut lines = Lines::default();
        lines.add(&[b'x'; COMMAND_BYTES_MAX]);
        assert_eq!(lines.next(), Ok(None));
        lines.add(b"x");
        assert_eq!(lines.next(), Err(TooLong));
        let mut lines = Lines::default();
        lines.add(&[b'x'; COMMAND_BYTES_MAX + 1]);
        lines.add(b"\nquit\n");
        assert_eq!(lines.next(), Err(TooLong), "its rest is not taken for a command");
    }

    #[test]
    fn console_answers_say_how_long_they_are() {
        let answer = Answer { done: true, text: "zwölf\n".to_owned(), then: Then::Nothing };
        assert_eq!(framed(&answer), "ok 7\nzwölf\n");
        let answer = Answer { done: false, text: String::new(), then: Then::Nothing };
        assert_eq!(framed(&answer), "error 0\n");
    }
}
