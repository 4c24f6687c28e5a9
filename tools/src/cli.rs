//! The command line: options, commands and their help. Completions and manual pages are made from this definition.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use kvs_core::instance::InstanceName;

use crate::bench::BenchOptions;

const ABOUT: &str = "\
The command-line tool of kvs: everything an operator or a script needs

Talks to the instance named `kvs` on this machine unless --name, --server or --unix say otherwise. \
Keys and values are any bytes.

Exit status: 0 done, 1 failed, 2 the answer is no (no such key, exists already), 64 wrong usage.";

const EXAMPLES: &str = "\
Examples:
  kvs-tools set greeting hello
  kvs-tools get greeting
  kvs-tools --name shop incr visits 10
  kvs-tools --server 10.0.0.7:9999 list user:
  kvs-tools export - | gzip >kvs.jsonl.gz
  kvs-tools --json stats | jq .entries";

/// The command-line tool of kvs: everything an operator or a script needs
#[derive(Debug, Parser)]
#[command(name = "kvs-tools", version, long_about = ABOUT, after_help = EXAMPLES)]
pub struct Cli {
    /// Which store.
    #[command(flatten)]
    pub target: TargetOptions,

    /// Print one JSON document instead of text
    ///
    /// Keys and values that are not UTF-8 appear as "key_base64" and "value_base64".
    #[arg(long, global = true, help_heading = "Output")]
    pub json: bool,

    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// A server of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Server {
    /// The data server, which serves requests
    Data,
    /// The front server, which accepts clients
    Front,
}

/// Which store is meant. The three exclude each other, wherever on the command line they are given.
#[derive(Debug, Clone, Default, Args)]
pub struct TargetOptions {
    /// Instance on this machine [env: KVS_NAME] [default: kvs]
    ///
    /// It is found wherever its sockets are. KVS_NAME counts only when none of --name, --server and --unix is given.
    #[arg(long, global = true, value_name = "NAME", help_heading = "Store", allow_hyphen_values = true)]
    pub name: Option<InstanceName>,

    /// Store that listens on this TCP address, such as 127.0.0.1:9999
    #[arg(long, global = true, value_name = "ADDR", help_heading = "Store")]
    pub server: Option<String>,

    /// Store that listens on this unix socket
    #[arg(long, global = true, value_name = "PATH", help_heading = "Store")]
    pub unix: Option<PathBuf>,
}

/// What of the segment is wanted.
#[derive(Debug, Args)]
pub struct InspectOptions {
    /// Dump every key and value
    #[arg(long, conflicts_with_all = ["key", "shard"])]
    pub entries: bool,
    /// Show where one key is, and its value; exit status 2 when there is no such key
    #[arg(long, value_name = "KEY", conflicts_with = "shard", allow_hyphen_values = true)]
    pub key: Option<OsString>,
    /// Show one shard in detail
    #[arg(long, value_name = "N")]
    pub shard: Option<u64>,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Print the value of a key
    ///
    /// The value is written byte for byte; a line end is added on a terminal only. Exit status 2 when there is no such key.
    #[command(after_help = "Example:\n  kvs-tools get picture >picture.png")]
    Get {
        /// The key, any bytes
        #[arg(allow_negative_numbers = true)]
        key: OsString,
    },

    /// Store a value under a key
    ///
    /// With --if-absent a value that is there stays, and the exit status is 2.
    #[command(
        after_help = "Examples:\n  kvs-tools set greeting hello\n  kvs-tools set picture - <picture.png\n  \
                      kvs-tools set --if-absent lock \"$$\"\n  kvs-tools set option -- --verbose"
    )]
    Set {
        /// The key, any bytes
        #[arg(allow_negative_numbers = true)]
        key: OsString,
        /// The value, any bytes; `-` reads it from standard input
        #[arg(allow_negative_numbers = true)]
        value: OsString,
        /// Store only when there is no such key; exit status 2 when there is
        #[arg(long)]
        if_absent: bool,
    },

    /// Remove keys
    ///
    /// Exit status 2 when none of them existed.
    Del {
        /// The keys, any bytes
        #[arg(required = true, value_name = "KEY", allow_negative_numbers = true)]
        keys: Vec<OsString>,
    },

    /// Add to a decimal value and print the sum
    ///
    /// A missing key counts as 0. A value that is no decimal number of 64 bits is an error, and stays.
    #[command(after_help = "Examples:\n  kvs-tools incr visits\n  kvs-tools incr stock -3")]
    Incr {
        /// The key, any bytes
        #[arg(allow_negative_numbers = true)]
        key: OsString,
        /// What to add
        #[arg(default_value_t = 1, allow_negative_numbers = true)]
        by: i64,
    },

    /// Print keys, one a line, in no order
    ///
    /// On a terminal, bytes that are not text are shown escaped; elsewhere keys are written as they are. Use --json for keys that
    /// may contain line ends.
    #[command(after_help = "Example:\n  kvs-tools list user: | sort | head")]
    List {
        /// What the keys begin with
        #[arg(default_value = "", hide_default_value = true, allow_negative_numbers = true)]
        prefix: OsString,
    },

    /// Print the counters of a running store
    Stats,

    /// Look into the segment of an instance itself, server running or not
    ///
    /// Header, memory by size class, shards, workers with pending intents, connections. Nothing is changed.
    #[command(
        after_help = "Examples:\n  kvs-tools inspect\n  kvs-tools inspect --key greeting\n  kvs-tools inspect --shard 3"
    )]
    Inspect(InspectOptions),

    /// Verify every invariant of a segment, or every record of a backup file
    ///
    /// Lists what is wrong, with exit status 1. A segment may be served or not, and is not changed: what a killed data server had
    /// decided is completed in a private copy. Of a backup file, it tells which file of its line it is, its records, entries, bytes, and
    /// how much is known to be synced; one that a running store writes may end in a batch on its way. An end that a power cut tore is
    /// told, and is no fault.
    #[command(
        after_help = "Examples:\n  kvs-tools check\n  kvs-tools check --backup ~/.local/state/kvs/kvs.backup\n  \
                      kvs-tools check --backup damaged.backup --salvage saved.backup"
    )]
    Check {
        /// Verify every record of this backup file instead
        #[arg(long, value_name = "FILE")]
        backup: Option<PathBuf>,
        /// Write all sound records of the backup file to this new file, and tell what is missing
        ///
        /// It must not exist yet. Load it with `kvs-front --backup FILE`.
        #[arg(long, value_name = "FILE", requires = "backup")]
        salvage: Option<PathBuf>,
    },

    /// Write all keys and values to a file, as lines of JSON
    ///
    /// A line is {"key":…,"value":…}; what is not UTF-8 is in base64 under "key_base64" or "value_base64". The file gets its
    /// name when it is complete. What changes meanwhile may be in it or not.
    #[command(
        after_help = "Examples:\n  kvs-tools export backup.jsonl\n  kvs-tools export - | gzip >backup.gz"
    )]
    Export {
        /// The file; `-` writes to standard output
        file: PathBuf,
    },

    /// Store all keys and values of a file that `export` wrote
    ///
    /// Keys that are there get the file's value; others stay.
    #[command(
        after_help = "Examples:\n  kvs-tools import backup.jsonl\n  gunzip <backup.gz | kvs-tools import -\n  \
                      kvs-tools --name old export - | kvs-tools --name new import -"
    )]
    Import {
        /// The file; `-` reads standard input
        file: PathBuf,
    },

    /// Measure kvs side by side with Redis, memcached and the limit of the machine
    ///
    /// Starts each server for itself, in a temporary directory, and ends it; what isn't installed is left out and said so. All get
    /// the same load from the same code, in turn and in several rounds. Shown are the median of the rounds, their least and most, how
    /// many times as fast kvs is, and how long requests took. null-tcp and null-unix are kvs's server without its table: the limit.
    ///
    /// With --server or --unix a store that runs already is measured; keys such as 0000000000000042 are written there.
    #[command(
        after_help = "Examples:\n  kvs-tools bench\n  kvs-tools bench --scenario tcp-pipeline-16,unix\n  \
                      kvs-tools bench --scenario all --output bench-run\n  \
                      kvs-tools bench --pipeline 8 --value-bytes 1KiB --distribution zipfian --targets kvs-tcp,redis-tcp\n  \
                      kvs-tools bench --rate 50000 --picture latency.svg\n  \
                      kvs-tools --server 10.0.0.7:9999 bench --targets kvs-tcp --keys 1000"
    )]
    Bench(Box<BenchOptions>),

    /// The operator console of a running instance on this machine
    ///
    /// Without a command, lines are read from standard input until its end or `exit`. `help` lists the commands.
    #[command(after_help = "Examples:\n  kvs-tools console\n  kvs-tools console clients")]
    Console {
        /// A single command
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },

    /// Exchange a server of a running instance for the program that is on disk now
    ///
    /// For an upgrade: put the new programs in the place of the old ones, then exchange `front`, then `data`. The new
    /// program is tried first; when it does not start, nothing happens. Returns when the next server serves.
    ///
    /// A data server whose segment has another layout than the new program knows can't be exchanged so: the store ends in
    /// order, both servers start anew, and the backup file is loaded. No data is lost, but connections end.
    #[command(after_help = "Examples:\n  kvs-tools restart front\n  kvs-tools --name shop restart data")]
    Restart {
        /// Which one
        #[arg(value_name = "SERVER")]
        which: Server,
    },

    /// End a running instance in order
    ///
    /// Returns when its servers are gone. The segment stays for an instant restart; `purge` removes it.
    Quit,

    /// Remove the segment of an instance that is not running, with all data in it
    Purge,

    /// Print a completion script for a shell
    #[command(
        after_help = "Example:\n  kvs-tools completions bash >~/.local/share/bash-completion/completions/kvs-tools"
    )]
    Completions {
        /// The shell
        shell: Shell,
    },

    /// Print the manual page, or write all pages into a directory
    #[command(after_help = "Example:\n  kvs-tools man ~/.local/share/man/man1")]
    Man {
        /// Directory for the pages of all commands
        #[arg(value_name = "DIR")]
        directory: Option<PathBuf>,
    },
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn cli_definition_has_no_contradictions() {
        Cli::command().debug_assert();
    }

    #[test]
    fn cli_numbers_are_no_options() {
        let cli = Cli::try_parse_from(["kvs-tools", "incr", "-7", "-3", "--json"]).expect("parsed");
        assert!(cli.json);
        assert!(matches!(cli.command, Command::Incr { key, by: -3 } if key == "-7"));
        let cli = Cli::try_parse_from(["kvs-tools", "set", "k", "-", "--if-absent"]).expect("parsed");
        assert!(matches!(cli.command, Command::Set { value, if_absent: true, .. } if value == "-"));
    }

    #[test]
    fn cli_console_takes_the_rest_as_it_is() {
        let cli = Cli::try_parse_from(["kvs-tools", "console", "stats", "--json"]).expect("parsed");
        assert!(!cli.json);
        assert!(matches!(cli.command, Command::Console { command } if command == ["stats", "--json"]));
    }
}
