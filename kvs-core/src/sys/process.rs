//! Who a process is, beyond a pid that may be reused.
//!
//! A [`ProcessIdentity`] is a pid with the time the process started, in clock ticks since boot. No two processes
//! share both within one boot, so what is written down about a dead process is never taken for a living one. With
//! [`boot_id`] beside it, it stays true over a restart of the machine.
//!
//! Everything here is read from `/proc` and trusted for nothing but identity: odd contents give an error, never a
//! panic. No lock; a crash in here has nothing to leave behind.

use std::fs;
use std::io;

use serde::{Deserialize, Serialize};

/// A process, told apart from every other one since the machine was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// The process id; it may be reused once the process is dead.
    pub pid: u32,
    /// When it started, in clock ticks since boot (field 22 of `/proc/PID/stat`).
    pub start_time: u64,
}

impl std::fmt::Display for ProcessIdentity {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}", self.pid)
    }
}

impl ProcessIdentity {
    /// The calling process.
    ///
    /// # Errors
    /// When `/proc` is not mounted or cannot be read.
    pub fn current() -> io::Result<Self> {
        Self::of(std::process::id())
    }

    /// The process that has `pid` now, alive or waiting to be reaped.
    ///
    /// # Errors
    /// `NotFound` when there is none; else what reading `/proc` says.
    pub fn of(pid: u32) -> io::Result<Self> {
        let stat = Stat::read(pid)?;
        Ok(Self { pid, start_time: stat.start_time })
    }

    /// Whether that very process still has a running thread. `false` for one that has only to be reaped, and for
    /// a later process with the same pid. When `/proc` cannot be read the answer is `true`: whoever is not known
    /// to be dead is treated as living.
    pub fn is_alive(&self) -> bool {
        match Stat::read(self.pid) {
            Ok(stat) => stat.start_time == self.start_time && stat.is_running(),
            Err(error) => !is_gone(&error),
        }
    }
}

/// Whether the process that has `pid` now stands still, stopped by a signal. No when that can't be known.
pub fn is_stopped(pid: u32) -> bool {
    Stat::read(pid).is_ok_and(|stat| stat.state == b'T')
}

/// Whether the first thread of the process that has `pid` now is ending, or has ended. No when that can't be known.
pub fn is_ending(pid: u32) -> bool {
    Stat::read(pid).is_ok_and(|stat| stat.flags & EXITING != 0)
}

/// Whether the process that has `pid` now has a running thread. No when that can't be known.
pub fn is_running(pid: u32) -> bool {
    Stat::read(pid).is_ok_and(|stat| stat.is_running())
}

/// How many descriptors the process that has `pid` now has open; None when that can't be known.
pub fn open_descriptors(pid: u32) -> Option<u64> {
    let path = format!("/proc/{pid}/fd");
    // Since Linux 6.2 the size says it, without a look at each of them.
    match fs::metadata(&path).ok()?.len() {
        0 => fs::read_dir(&path).ok().map(|entries| entries.count() as u64),
        count => Some(count),
    }
}

/// `NotFound` when opening `/proc/PID/stat`, ESRCH when the process went between opening and reading.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// What is needed of `/proc/PID/stat`.
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    state: u8,
    flags: u64,
    threads: u64,
    start_time: u64,
}

/// Flag of a thread that is ending (`PF_EXITING`, include/linux/sched.h).
const EXITING: u64 = 0x4;

impl Stat {
    fn read(pid: u32) -> io::Result<Self> {
        let bytes = fs::read(format!("/proc/{pid}/stat"))?;
        Self::parse(&bytes).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/stat has an unknown form"))
        })
    }

    /// The second field, the program's name, is whatever the program likes: spaces, parentheses, line ends. No
    /// later field contains a parenthesis, so the last one ends the name.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let name_end = bytes.iter().rposition(|byte| *byte == b')')?;
        let rest = std::str::from_utf8(bytes.get(name_end + 1..)?).ok()?;
        let mut fields = rest.split_ascii_whitespace();
        // Fields count from 1, and the next is the third.
        let state = *fields.next()?.as_bytes().first()?;
        let flags = fields.nth(9 - 4)?.parse().ok()?;
        let threads = fields.nth(20 - 10)?.parse().ok()?;
        let start_time = fields.nth(22 - 21)?.parse().ok()?;
        Some(Self { state, flags, threads, start_time })
    }

    /// A process whose first thread ended is a zombie (`Z`) already, though other threads may run on.
    fn is_running(&self) -> bool {
        !matches!(self.state, b'Z' | b'X' | b'x') || self.threads > 1
    }
}

/// Random identity of the running boot of the machine.
///
/// # Errors
/// When `/proc/sys/kernel/random/boot_id` cannot be read or is no UUID.
pub fn boot_id() -> io::Result<[u8; 16]> {
    let path = "/proc/sys/kernel/random/boot_id";
    parse_uuid(&fs::read_to_string(path)?)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("{path} holds no UUID")))
}

fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    let digits: Vec<u8> = text
        .trim()
        .chars()
        .filter(|character| *character != '-')
        .map(|character| character.to_digit(16).and_then(|digit| u8::try_from(digit).ok()))
        .collect::<Option<_>>()?;
    let (pairs, rest) = digits.as_chunks::<2>();
    if !rest.is_empty() {
        return None;
    }
    let bytes: Vec<u8> = pairs.iter().map(|[high, low]| high << 4 | low).collect();
    bytes.try_into().ok()
}

#[cfg(test)]
mod tests {
    //! Goal: an identity is that of one process only, whatever `/proc` holds. Method: made-up lines, and a child.

    use super::*;

    #[test]
    #[cfg_attr(miri, ignore)]
    fn process_current_is_alive_and_stable() {
        let current = ProcessIdentity::current().expect("/proc");
        assert_eq!(current, ProcessIdentity::current().expect("/proc"));
        assert!(current.is_alive());
    }

    #[test]
    #[cfg_attr(miri, ignore)]
    fn process_with_reused_pid_is_not_alive() {
        let mut other = ProcessIdentity::current().expect("/proc");
        other.start_time += 1;
        assert!(!other.is_alive());
    }

    #[test]
    #[cfg_attr(miri, ignore)]
    fn process_killed_is_dead_before_and_after_it_is_reaped() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("sleep");
        let identity = ProcessIdentity::of(child.id()).expect("a running child");
        assert!(identity.is_alive());
        child.kill().expect("kill");
        while identity.is_alive() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert_eq!(ProcessIdentity::of(child.id()).expect("a zombie"), identity);
        child.wait().expect("wait");
        assert!(!identity.is_alive());
    }

    #[test]
    fn stat_name_with_parentheses_and_spaces_is_skipped() {
        let line = b"7 (a) S (b\n) R 1 7 7 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 3 0 987654 1 2\n";
        assert_eq!(
            Stat::parse(line),
            Some(Stat { state: b'R', flags: 4_194_304, threads: 3, start_time: 987_654 })
        );
    }

    #[test]
    fn stat_odd_contents_are_refused() {
        for odd in [&b""[..], b")", b"7 (x)", b"7 (x) R 1", b"7 (x) \xff\xfe", b"7 x R 1 2 3"] {
            assert_eq!(Stat::parse(odd), None);
        }
    }

    #[test]
    fn uuid_of_wrong_length_or_alphabet_is_refused() {
        assert!(parse_uuid("01234567-89ab-cdef-0123-456789abcdef\n").is_some_and(|id| id[1] == 0x23));
        for odd in ["", "0", "g1234567-89ab-cdef-0123-456789abcdef", "01234567-89ab-cdef-0123-456789abcdef00"]
        {
            assert_eq!(parse_uuid(odd), None);
        }
    }

    #[test]
    fn descriptors_are_counted_while_they_are_open() {
        let own = std::process::id();
        // Other tests of this process open files meanwhile: only many of them say something.
        let before = open_descriptors(own).expect("one's own");
        let files: Vec<_> = (0..200).map(|_| fs::File::open("/dev/null").expect("there")).collect();
        let with = open_descriptors(own).expect("one's own");
        assert!(with + 100 > before + files.len() as u64, "{before}, then {with}");
        assert_eq!(open_descriptors(0), None);
    }
}
