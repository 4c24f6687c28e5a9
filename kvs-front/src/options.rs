//! Options that both servers take. They are passed on as they were given.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, CommandFactory, Parser, ValueEnum};
use kvs_core::instance::{ByteSize, InstanceName, ParseError, format_duration, parse_duration};
use kvs_core::limits::{
    CAPACITY_BYTES_MAX, CAPACITY_BYTES_MIN, CONNECTIONS_MAX_DEFAULT, CONNECTIONS_MAX_LIMIT, HANG_TIMEOUT_MAX,
    HANG_TIMEOUT_MIN, VALUE_BYTES_MAX_DEFAULT, VALUE_BYTES_MAX_LIMIT, WORKER_THREADS_MAX,
};

use crate::log_output::LogOutput;

/// Exit status of wrong usage.
const EXIT_USAGE: i32 = 64;

/// When an acknowledged write is on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// Before the answer.
    Always,
    /// At most so long after it.
    Interval(Duration),
    /// When the kernel likes.
    Os,
}

impl FromStr for Durability {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "always" => Ok(Self::Always),
            "os" => Ok(Self::Os),
            _ => match text.strip_prefix("interval=").map(parse_duration) {
                Some(Ok(duration)) if !duration.is_zero() => Ok(Self::Interval(duration)),
                Some(Err(error)) => Err(error.to_string()),
                _ => Err("write always, interval=DURATION (such as interval=1s) or os".into()),
            },
        }
    }
}

impl std::fmt::Display for Durability {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Always => formatter.write_str("always"),
            Self::Interval(duration) => write!(formatter, "interval={}", format_duration(*duration)),
            Self::Os => formatter.write_str("os"),
        }
    }
}

/// Whether there is an operator console on standard input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ConsoleMode {
    /// Only when it is a terminal.
    Auto,
    /// Yes.
    On,
    /// No.
    Off,
}

impl std::fmt::Display for ConsoleMode {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Auto => "auto",
            Self::On => "on",
            Self::Off => "off",
        })
    }
}

/// Whether a second data server stands by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StandbyMode {
    /// Yes.
    On,
    /// No.
    Off,
}

impl std::fmt::Display for StandbyMode {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::On => "on",
            Self::Off => "off",
        })
    }
}

/// Options of `kvs-front`, with the same meaning for `kvs-data` where they apply.
#[derive(Debug, Clone, Args)]
pub struct ServerOptions {
    /// Instance name; instances run side by side
    ///
    /// Letters, digits, '.', '_' and '-', up to 64. The segment is /dev/shm/kvs-NAME.
    #[arg(
        long,
        env = "KVS_NAME",
        default_value = "kvs",
        value_name = "NAME",
        help_heading = "Instance",
        allow_hyphen_values = true
    )]
    pub name: InstanceName,

    /// TCP address to listen on [default: 127.0.0.1:9999, or the next free port]
    ///
    /// An address or a name with a port. With one given, a port that is taken is an error; port 0 takes any free one. The
    /// ready line tells which. There is no authentication: listen on other addresses in trusted networks only.
    #[arg(long, env = "KVS_LISTEN", value_name = "ADDR", help_heading = "Clients", value_parser = parse_address)]
    pub listen: Option<SocketAddr>,

    /// Unix socket for local clients [default: $XDG_RUNTIME_DIR/kvs-NAME.sock or /tmp/kvs-UID/NAME.sock]
    ///
    /// Made with mode 0600; only this user and root get in.
    #[arg(long, env = "KVS_UNIX", value_name = "PATH", help_heading = "Clients")]
    pub unix: Option<PathBuf>,

    /// Most connections at a time; one more is refused with an error
    ///
    /// 1 to 65536. Each takes a descriptor in both servers.
    #[arg(long, env = "KVS_MAX_CONNECTIONS", default_value_t = CONNECTIONS_MAX_DEFAULT, value_name = "N", help_heading = "Clients",
        allow_negative_numbers = true,
        value_parser = clap::value_parser!(u32).range(1..=i64::from(CONNECTIONS_MAX_LIMIT)))]
    pub max_connections: u32,

    /// Largest value
    ///
    /// 0 to 64MiB, such as 512KiB. A larger value gets an error that names this limit; the connection stays usable.
    #[arg(long, env = "KVS_MAX_VALUE", default_value_t = ByteSize(VALUE_BYTES_MAX_DEFAULT), value_name = "SIZE", help_heading = "Clients",
        allow_negative_numbers = true,
        value_parser = parse_max_value)]
    pub max_value: ByteSize,

    /// Most memory the segment may take [default: 1GiB, or what /dev/shm holds where that is less]
    ///
    /// 16MiB to 1TiB, rounded down to 2MiB; a number is bytes, units are KiB, MiB, GiB and TiB. Memory is taken as data grows,
    /// not at start; when it is used up, writes get "store full". A segment that is there already keeps the capacity it was
    /// made with.
    #[arg(long, env = "KVS_CAPACITY", value_name = "SIZE", help_heading = "Data",
        allow_negative_numbers = true,
        value_parser = parse_capacity)]
    pub capacity: Option<ByteSize>,

    /// Backup file [default: $XDG_STATE_HOME/kvs/NAME.backup or ~/.local/state/kvs/NAME.backup]
    ///
    /// A complete copy of the data at every moment, up to --durability; it is loaded when the segment is gone, as after a restart
    /// of the machine. Copying it is a backup, and a copy given here is restored.
    #[arg(long, env = "KVS_BACKUP", value_name = "FILE", help_heading = "Data")]
    pub backup: Option<PathBuf>,

    /// When an acknowledged write is on disk: always, interval=DURATION or os
    ///
    /// always: before it is acknowledged; interval: so long after at most, such as 250ms, 1s or 2m; os: when the kernel likes. In
    /// every mode the write survives the death of any or all of the processes; this is about power cuts.
    #[arg(
        long,
        env = "KVS_DURABILITY",
        default_value = "interval=1s",
        value_name = "MODE",
        help_heading = "Data"
    )]
    pub durability: Durability,

    /// Worker threads [default: number of cores]
    ///
    /// 1 to 62. More than there are cores seldom helps: a worker never waits for a client.
    #[arg(long, env = "KVS_WORKERS", value_name = "N", help_heading = "Running",
        allow_negative_numbers = true,
        value_parser = clap::value_parser!(u16).range(1..=WORKER_THREADS_MAX as i64))]
    pub workers: Option<u16>,

    /// How long a server may stand still before the other one kills and replaces it
    ///
    /// A duration such as 500ms or 5s, from 100ms to 1h; 0s: it is never taken for hung. A server that dies is replaced at
    /// once in any case.
    #[arg(
        long,
        env = "KVS_HANG_TIMEOUT",
        default_value = "5s",
        value_name = "DURATION",
        help_heading = "Running",
        allow_hyphen_values = true,
        value_parser = parse_hang_timeout
    )]
    pub hang_timeout: Duration,

    /// A second data server that stands by
    ///
    /// It has every client's socket, takes over within a millisecond when the one that serves dies, and keeps the connections even if the
    /// front server dies at the same instant. Without it a new data server is started first.
    #[arg(
        long,
        env = "KVS_STANDBY",
        value_enum,
        default_value = "on",
        value_name = "MODE",
        help_heading = "Running",
        hide_possible_values = true
    )]
    pub standby: StandbyMode,

    /// Operator console on standard input
    ///
    /// auto: only when it is a terminal. The end of input never stops the server.
    #[arg(
        long,
        env = "KVS_CONSOLE",
        value_enum,
        default_value = "auto",
        value_name = "WHEN",
        help_heading = "Running",
        hide_possible_values = true
    )]
    pub console: ConsoleMode,

    /// What is logged to standard error: error, warn, info, debug, or a filter of env_logger
    ///
    /// A filter names crates or modules, such as warn,kvs_core=debug.
    #[arg(long, env = "KVS_LOG", default_value = "info", value_name = "LEVEL", help_heading = "Running")]
    pub log_level: String,
}

fn parse_address(text: &str) -> Result<SocketAddr, String> {
    let found = text
        .to_socket_addrs()
        .map_err(|error| format!("{error}; write an address such as 127.0.0.1:9999"))?;
    let addresses: Vec<SocketAddr> = found.collect();
    // A name with both kinds of address: clients that don't say more mean the older one.
    let preferred = addresses.iter().find(|address| address.is_ipv4()).or(addresses.first());
    preferred.copied().ok_or_else(|| "no address has this name".into())
}

fn parse_capacity(text: &str) -> Result<ByteSize, String> {
    in_range(text, CAPACITY_BYTES_MIN, CAPACITY_BYTES_MAX)
}

fn parse_max_value(text: &str) -> Result<ByteSize, String> {
    in_range(text, 0, VALUE_BYTES_MAX_LIMIT)
}

fn parse_hang_timeout(text: &str) -> Result<Duration, String> {
    let timeout = parse_duration(text).map_err(|error| error.to_string())?;
    if timeout.is_zero() || (HANG_TIMEOUT_MIN..=HANG_TIMEOUT_MAX).contains(&timeout) {
        return Ok(timeout);
    }
    let [least, most] = [HANG_TIMEOUT_MIN, HANG_TIMEOUT_MAX].map(format_duration);
    Err(format!("{} is out of range: choose between {least} and {most}, or 0s", format_duration(timeout)))
}

fn in_range(text: &str, least: u64, most: u64) -> Result<ByteSize, String> {
    let size: ByteSize = text.parse().map_err(|error: ParseError| error.to_string())?;
    if (least..=most).contains(&size.0) {
        return Ok(size);
    }
    Err(format!("{size} is out of range: choose between {} and {}", ByteSize(least), ByteSize(most)))
}

impl ServerOptions {
    /// Where the unix socket is, as an absolute path.
    pub fn unix_path(&self) -> PathBuf {
        let path = self.unix.clone().unwrap_or_else(|| self.name.default_unix_path());
        std::path::absolute(&path).unwrap_or(path)
    }

    /// Where the backup file is, as an absolute path.
    pub fn backup_path(&self) -> PathBuf {
        let path = self.backup.clone().unwrap_or_else(|| self.name.default_backup_path());
        std::path::absolute(&path).unwrap_or(path)
    }

    /// Worker threads to start.
    pub fn worker_count(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        self.workers.map_or_else(cores, usize::from).clamp(1, WORKER_THREADS_MAX)
    }

    /// Keeps to the number of workers that are meant now.
    pub fn fix_worker_count(&mut self) {
        self.workers = u16::try_from(self.worker_count()).ok();
    }

    /// The same options as arguments.
    pub fn to_arguments(&self) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = Vec::new();
        let mut add = |name: &str, value: OsString| arguments.extend([OsString::from(name), value]);
        add("--name", self.name.to_string().into());
        add("--max-connections", self.max_connections.to_string().into());
        add("--max-value", self.max_value.to_string().into());
        add("--durability", self.durability.to_string().into());
        add("--log-level", self.log_level.clone().into());
        add("--console", self.console.to_string().into());
        add("--hang-timeout", format_duration(self.hang_timeout).into());
        add("--standby", self.standby.to_string().into());
        if let Some(capacity) = self.capacity {
            add("--capacity", capacity.to_string().into());
        }
        if let Some(workers) = self.workers {
            add("--workers", workers.to_string().into());
        }
        if let Some(listen) = self.listen {
            add("--listen", listen.to_string().into());
        }
        if let Some(unix) = &self.unix {
            add("--unix", unix.clone().into());
        }
        if let Some(backup) = &self.backup {
            add("--backup", backup.clone().into());
        }
        arguments
    }
}

/// Parses the command line; help and version end with 0, wrong usage with 64.
pub fn parse_or_exit<P: Parser + CommandFactory>() -> P {
    P::try_parse().unwrap_or_else(|error| {
        let status = if error.use_stderr() { EXIT_USAGE } else { 0 };
        // Nobody is left to be told when this fails too.
        let _ = error.print();
        std::process::exit(status)
    })
}

/// Starts logging to standard error as `level` says.
pub fn start_logging(level: &str) {
    let target = match LogOutput::new() {
        Ok(output) => env_logger::Target::Pipe(Box::new(output)),
        Err(_) => env_logger::Target::Stderr,
    };
    let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
        || std::env::var_os("TERM").is_none_or(|terminal| terminal == "dumb")
        || !std::io::stderr().is_terminal();
    env_logger::Builder::new()
        .parse_filters(level)
        .format_timestamp_millis()
        .format_target(false)
        .target(target)
        .write_style(if plain { env_logger::WriteStyle::Never } else { env_logger::WriteStyle::Always })
        .init();
}

#[cfg(test)]
mod tests {
    use super::*;

    use kvs_core::limits::HANG_TIMEOUT_DEFAULT;

    #[derive(Parser)]
    struct Only {
        #[command(flatten)]
        server: ServerOptions,
    }

    fn parse(arguments: &[&str]) -> Result<ServerOptions, clap::Error> {
        Only::try_parse_from([&["x"], arguments].concat()).map(|only| only.server)
    }

    #[test]
    fn options_survive_being_passed_on() {
        let given = parse(&[
            "--name",
            "a",
            "--listen",
            "127.0.0.1:0",
            "--unix",
            "/tmp/x.sock",
            "--capacity",
            "64MiB",
            "--durability",
            "interval=250ms",
            "--workers",
            "3",
            "--max-value",
            "1MiB",
            "--max-connections",
            "7",
            "--backup",
            "/tmp/b",
            "--hang-timeout",
            "750ms",
        ])
        .expect("sound");
        let mut command = vec![OsString::from("x")];
        command.extend(given.to_arguments());
        let again = Only::try_parse_from(command).expect("sound").server;
        assert_eq!(again.to_arguments(), given.to_arguments());
        assert_eq!(again.durability, Durability::Interval(Duration::from_millis(250)));
        assert_eq!(again.hang_timeout, Duration::from_millis(750));
        assert_eq!(parse(&[]).expect("sound").hang_timeout, HANG_TIMEOUT_DEFAULT);
        assert_eq!(parse(&["--hang-timeout", "0s"]).expect("never").hang_timeout, Duration::ZERO);
    }

    #[test]
    fn options_impossible_ones_are_refused() {
        for bad in [
            ["--name", "a/b"],
            ["--capacity", "1MiB"],
            ["--capacity", "lots"],
            ["--max-value", "65MiB"],
            ["--workers", "0"],
            ["--workers", "63"],
            ["--max-connections", "0"],
            ["--durability", "never"],
            ["--durability", "interval=0s"],
            ["--listen", "9999"],
            ["--listen", "-"],
            ["--console", "maybe"],
            ["--capacity", "-1"],
            ["--workers", "-1"],
            ["--name", "-dash"],
            ["--name", ""],
            ["--hang-timeout", "99ms"],
            ["--hang-timeout", "2h"],
            ["--hang-timeout", "5"],
            ["--hang-timeout", "-1s"],
        ] {
            let message = parse(&bad).expect_err(bad[1]).to_string();
            assert!(message.contains(bad[0]), "{bad:?}: {message}");
        }
    }
}
