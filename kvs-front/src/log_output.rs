//! Standard error, for which nobody waits: a terminal that was halted, or a reader that went to sleep, must not halt a server.
//!
//! A line that finds no room within [`PATIENCE`] is left out, and so are those that follow until there is room again; then
//! one line says how many are missing. A crash loses nothing that was written.

use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// How long a line may wait for room.
const PATIENCE: Duration = Duration::from_millis(200);
/// A pipe with room has room for so much.
const PIECE_BYTES: usize = 4096;

/// The output.
pub struct LogOutput {
    output: OwnedFd,
    missing: u64,
}

impl LogOutput {
    /// To standard error.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new() -> io::Result<Self> {
        Ok(Self::to(rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stderr(), 3)?))
    }

    fn to(output: OwnedFd) -> Self {
        Self { output, missing: 0 }
    }

    fn has_room(&self, patience: Duration) -> bool {
        let timeout = Timespec { tv_sec: 0, tv_nsec: patience.subsec_nanos().into() };
        let mut sockets = [PollFd::new(&self.output, PollFlags::OUT)];
        // What can't be waited for, such as a file, always has room.
        poll(&mut sockets, Some(&timeout)).is_ok_and(|ready| ready > 0)
    }

    fn write_line(&mut self, line: &[u8], patience: Duration) {
        for piece in line.chunks(PIECE_BYTES) {
            // Nobody may be left to read it.
            if !self.has_room(patience) || rustix::io::write(&self.output, piece).is_err() {
                self.missing += 1;
                return;
            }
        }
    }
}

impl Write for LogOutput {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.missing > 0 {
            if !self.has_room(Duration::ZERO) {
                self.missing += 1;
                return Ok(line.len());
            }
            let told = format!("({} lines are missing here: nobody read them)\n", self.missing);
            self.missing = 0;
            self.write_line(told.as_bytes(), Duration::ZERO);
        }
        self.write_line(line, PATIENCE);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for LogOutput {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.output.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn log_output_that_nobody_reads_halts_nobody_and_says_what_is_missing() {
        let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
        let mut output = LogOutput::to(writer);
        let line = [b"x".repeat(999), b"\n".to_vec()].concat();
        for _ in 0..2_000 {
            output.write_all(&line).expect("never fails");
        }
        let missing = output.missing;
        assert!(missing > 1_000, "a pipe holds 64 KiB");
        let mut reader = std::fs::File::from(reader);
        let mut read = vec![0; (2_000 - missing as usize) * line.len()];
        reader.read_exact(&mut read).expect("what there was room for");
        output.write_all(b"after\n").expect("never fails");
        drop(output);
        let mut rest = String::new();
        reader.read_to_string(&mut rest).expect("text");
        assert_eq!(rest, format!("({missing} lines are missing here: nobody read them)\nafter\n"));
    }
}
