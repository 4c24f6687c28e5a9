//! Names, paths, sizes and durations as a user writes them.
//!
//! Everything that belongs to an instance follows from its name; nothing here touches the file system.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use crate::limits::NAME_BYTES_MAX;

/// Name of an instance: letters, digits, `.`, `_` and `-`, not beginning with `.` or `-`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct InstanceName(String);

/// Why a text is no name, size or duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParseError {
    /// Not a name.
    #[error(
        "{0:?} can't name an instance: use 1 to {NAME_BYTES_MAX} letters, digits, '.', '_' or '-', \
         and neither '.' nor '-' at the beginning"
    )]
    Name(String),
    /// Not a size.
    #[error("{0:?} is no size: write a number with B, KiB, MiB, GiB or TiB, such as 512MiB")]
    Size(String),
    /// Not a duration.
    #[error("{0:?} is no duration: write a number with us, ms, s, m or h, such as 500ms")]
    Duration(String),
}

impl FromStr for InstanceName {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        let sound = (1..=NAME_BYTES_MAX).contains(&text.len())
            && text.bytes().all(allowed)
            && !text.starts_with(['.', '-']);
        if sound { Ok(Self(text.to_owned())) } else { Err(ParseError::Name(text.to_owned())) }
    }
}

impl fmt::Display for InstanceName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl InstanceName {
    /// Where its segment is.
    pub fn segment_path(&self) -> PathBuf {
        PathBuf::from(format!("/dev/shm/kvs-{}", self.0))
    }

    /// Where its unix socket is unless told otherwise.
    pub fn default_unix_path(&self) -> PathBuf {
        match directory_from("XDG_RUNTIME_DIR") {
            Some(directory) => directory.join(format!("kvs-{}.sock", self.0)),
            None => private_directory().join(format!("{}.sock", self.0)),
        }
    }

    /// Where its backup file is unless told otherwise.
    pub fn default_backup_path(&self) -> PathBuf {
        let state = match (directory_from("XDG_STATE_HOME"), directory_from("HOME")) {
            (Some(state), _) => state,
            (None, Some(home)) => home.join(".local/state"),
            (None, None) => PathBuf::from("/var/lib"),
        };
        state.join("kvs").join(format!("{}.backup", self.0))
    }
}

/// A directory that the environment names; a relative one is none, as the specification of those variables wants it.
fn directory_from(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable).map(PathBuf::from).filter(|directory| directory.is_absolute())
}

/// Directory for sockets where the system gives no runtime directory; to be made with mode 0700.
pub fn private_directory() -> PathBuf {
    PathBuf::from(format!("/tmp/kvs-{}", rustix::process::geteuid().as_raw()))
}

/// The operator's socket that goes with the clients' unix socket.
pub fn console_path(unix_path: &Path) -> PathBuf {
    unix_path.with_extension("console")
}

/// A number of bytes with a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

const BINARY_UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];

impl FromStr for ByteSize {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let error = || ParseError::Size(text.to_owned());
        let (number, unit) = split_unit(text).ok_or_else(error)?;
        let factor: u64 = match unit {
            "" | "B" => 1,
            "KiB" | "K" | "k" => 1 << 10,
            "MiB" | "M" => 1 << 20,
            "GiB" | "G" => 1 << 30,
            "TiB" | "T" => 1 << 40,
            "kB" | "KB" => 1_000,
            "MB" => 1_000_000,
            "GB" => 1_000_000_000,
            "TB" => 1_000_000_000_000,
            _ => return Err(error()),
        };
        number.checked_mul(factor).map(ByteSize).ok_or_else(error)
    }
}

impl fmt::Display for ByteSize {
    /// Exact: the largest unit that divides it.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut power = 0;
        while power + 1 < BINARY_UNITS.len() && self.0 != 0 && self.0.is_multiple_of(1024 << (10 * power)) {
            power += 1;
        }
        write!(formatter, "{}{}", self.0 >> (10 * power), BINARY_UNITS[power])
    }
}

impl ByteSize {
    /// Rounded to three digits, for people.
    pub fn rounded(self) -> String {
        let (mut value, mut power) = (self.0 as f64, 0);
        while value >= 1000.0 && power + 1 < BINARY_UNITS.len() {
            value /= 1024.0;
            power += 1;
        }
        let digits = if power == 0 || value >= 100.0 {
            0
        } else if value >= 10.0 {
            1
        } else {
            2
        };
        format!("{value:.digits$} {}", BINARY_UNITS[power])
    }
}

/// Reads a duration such as `500ms`.
///
/// # Errors
/// [`ParseError::Duration`].
pub fn parse_duration(text: &str) -> Result<Duration, ParseError> {
    let error = || ParseError::Duration(text.to_owned());
    let (number, unit) = split_unit(text).ok_or_else(error)?;
    let microseconds: u64 = match unit {
        "us" => 1,
        "ms" => 1_000,
        "s" => 1_000_000,
        "m" | "min" => 60_000_000,
        "h" => 3_600_000_000,
        _ => return Err(error()),
    };
    number.checked_mul(microseconds).map(Duration::from_micros).ok_or_else(error)
}

/// Writes a duration as [`parse_duration`] reads it, in the largest unit that divides it.
pub fn format_duration(duration: Duration) -> String {
    let microseconds = duration.as_micros();
    let units = [("h", 3_600_000_000), ("m", 60_000_000), ("s", 1_000_000), ("ms", 1_000), ("us", 1)];
    let divides = |factor: u128| microseconds > 0 && microseconds.is_multiple_of(factor);
    let (unit, factor) = units.into_iter().find(|(_, factor)| divides(*factor)).unwrap_or(("s", 1));
    format!("{}{unit}", microseconds / factor)
}

fn split_unit(text: &str) -> Option<(u64, &str)> {
    let text = text.trim();
    let end = text.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(text.len());
    Some((text[..end].parse().ok()?, text[end..].trim_start()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instance_names_that_could_leave_their_directory_are_refused() {
        for bad in ["", ".", "..", "a/b", "-x", ".x", "a b", "é", "a\0b", &"x".repeat(65)] {
            assert!(bad.parse::<InstanceName>().is_err(), "{bad:?}");
        }
        for good in ["kvs", "a", "test-1.2_3", &"x".repeat(64)] {
            assert!(good.parse::<InstanceName>().is_ok(), "{good:?}");
        }
        let name: InstanceName = "shop".parse().expect("a name");
        assert_eq!(name.segment_path(), Path::new("/dev/shm/kvs-shop"));
        assert_eq!(console_path(Path::new("/run/kvs-shop.sock")), Path::new("/run/kvs-shop.console"));
    }

    #[test]
    fn byte_sizes_are_read_and_written() {
        for (text, bytes) in [
            ("0", 0),
            ("17", 17),
            ("1KiB", 1024),
            ("512 MiB", 512 << 20),
            ("1GB", 1_000_000_000),
            ("3TiB", 3 << 40),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for bad in ["", "GiB", "-1", "1.5GiB", "1XB", "99999999999999999999", "99999999TiB", "1 2"] {
            assert!(bad.parse::<ByteSize>().is_err(), "{bad:?}");
        }
        assert_eq!(ByteSize(1 << 30).to_string(), "1GiB");
        assert_eq!(ByteSize(1536).to_string(), "1536B");
        assert_eq!(ByteSize(0).to_string(), "0B");
        assert_eq!(ByteSize(1536).rounded(), "1.50 KiB");
        assert_eq!(ByteSize(770_281_472).rounded(), "735 MiB");
    }

    #[test]
    fn durations_are_read() {
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("1s"), Ok(Duration::from_secs(1)));
        for (duration, text) in
            [(90_000_000, "90s"), (250_000, "250ms"), (7, "7us"), (0, "0s"), (7_200_000_000, "2h")]
        {
            let duration = Duration::from_micros(duration);
            assert_eq!((format_duration(duration).as_str(), parse_duration(text)), (text, Ok(duration)));
        }
        for bad in ["", "1", "s", "1.5s", "-1s", "1d", "999999999999999999h"] {
            assert!(parse_duration(bad).is_err(), "{bad:?}");
        }
    }
}
