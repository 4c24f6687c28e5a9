//! Which store is meant, and how to reach it.
//!
//! An instance is found by its name through its segment, which says where its sockets are, wherever `--unix` put them. Where
//! the segment can't tell, the place that follows from the name is tried.

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{anyhow, bail};
use clap::CommandFactory as _;
use clap::error::ErrorKind;
use kvs_client::{Client, ConnectOptions, Error};
use kvs_core::instance::{InstanceName, private_directory};
use kvs_core::segment::{SegmentError, SegmentView, text_of};

use crate::cli::{Cli, TargetOptions};

/// Instance that is meant when nothing says which.
const NAME_DEFAULT: &str = "kvs";
/// The environment variable with the name of the instance.
const NAME_VARIABLE: &str = "KVS_NAME";
/// What this program calls itself to the store.
const CLIENT_NAME: &str = "kvs-tools";

/// Which store is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// An instance on this machine.
    Named(InstanceName),
    /// What listens on a TCP address.
    Server(String),
    /// What listens on a unix socket.
    Unix(PathBuf),
}

impl std::fmt::Display for Target {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Named(name) => write!(formatter, "instance `{name}`"),
            Self::Server(address) => write!(formatter, "the store on {address}"),
            Self::Unix(path) => write!(formatter, "the store on {}", path.display()),
        }
    }
}

impl Target {
    /// What the command line says, else the environment, else the default.
    pub fn from_options(options: TargetOptions) -> Result<Self, clap::Error> {
        match (options.name, options.server, options.unix) {
            (Some(name), None, None) => Ok(Self::Named(name)),
            (None, Some(address), None) => Ok(Self::Server(address)),
            (None, None, Some(path)) => Ok(Self::Unix(path)),
            (None, None, None) => name_from_environment().map(Self::Named),
            _ => {
                let message = "--name, --server and --unix exclude each other; give one of them";
                Err(usage(ErrorKind::ArgumentConflict, message))
            }
        }
    }

    /// A client of the store.
    pub fn connect(&self) -> anyhow::Result<Client> {
        let (address, segment) = match self {
            Self::Server(address) => (address.clone(), None),
            Self::Unix(path) => (unix_address(path)?, None),
            Self::Named(name) => {
                let found = Found::by_name(name)?;
                (unix_address(&found.unix_path)?, found.segment_error)
            }
        };
        ConnectOptions::new().name(CLIENT_NAME).connect(&address).map_err(|error| match (self, error) {
            (Self::Named(name), Error::Connect { address, source }) if is_nobody(&source) => {
                no_instance(name, segment.as_ref(), &address, &source)
            }
            (_, error) => error.into(),
        })
    }

    /// Connects to a socket file of this store: `which` makes its path from that of the clients' socket.
    pub fn connect_local<S>(
        &self,
        which: impl Fn(&Path) -> PathBuf,
        connect: impl Fn(&Path) -> io::Result<S>,
    ) -> anyhow::Result<S> {
        let (unix_path, segment) = match self {
            Self::Server(address) => bail!(
                "the console of a store can be reached on its own machine only, not over {address}; use --name or --unix there"
            ),
            Self::Unix(path) => (path.clone(), None),
            Self::Named(name) => {
                let found = Found::by_name(name)?;
                (found.unix_path, found.segment_error)
            }
        };
        let path = which(&unix_path);
        let shown = path.display().to_string();
        connect(&path).map_err(|source| match self {
            Self::Named(name) if is_nobody(&source) => no_instance(name, segment.as_ref(), &shown, &source),
            _ => anyhow!("can't connect to the console {shown}: {source}; is the server running there?"),
        })
    }

    /// The name, for what needs no running server but a name.
    pub fn name_for(&self, command: &str) -> Result<&InstanceName, clap::Error> {
        let message = || format!("{command} works on the segment of an instance; give its --name instead");
        match self {
            Self::Named(name) => Ok(name),
            _ => Err(usage(ErrorKind::ArgumentConflict, &message())),
        }
    }
}

fn name_from_environment() -> Result<InstanceName, clap::Error> {
    let given = std::env::var_os(NAME_VARIABLE).filter(|name| !name.is_empty());
    let name = given.as_deref().unwrap_or(NAME_DEFAULT.as_ref()).to_string_lossy();
    name.parse().map_err(|error| usage(ErrorKind::ValueValidation, &format!("{NAME_VARIABLE}: {error}")))
}

/// Wrong usage, found later than by the definition of the command line.
pub fn usage(kind: ErrorKind, message: &str) -> clap::Error {
    Cli::command().error(kind, message)
}

/// Where an instance listens, as far as its segment tells.
struct Found {
    unix_path: PathBuf,
    segment_error: Option<SegmentError>,
}

impl Found {
    fn by_name(name: &InstanceName) -> anyhow::Result<Self> {
        let path =
            SegmentView::open(&name.segment_path()).and_then(|view| Ok(text_of(&view.header()?.unix_path)));
        Ok(match path {
            Ok(text) if text.is_empty() => Self { unix_path: default_path(name)?, segment_error: None },
            Ok(text) => Self { unix_path: text.into(), segment_error: None },
            Err(error) => Self { unix_path: default_path(name)?, segment_error: Some(error) },
        })
    }
}

/// Where the name alone says that the socket is. Anybody can make a directory in `/tmp`; what is in another user's is no store of
/// this one.
fn default_path(name: &InstanceName) -> anyhow::Result<PathBuf> {
    let (path, private) = (name.default_unix_path(), private_directory());
    let own = rustix::process::geteuid().as_raw();
    match std::fs::symlink_metadata(&private) {
        Ok(found) if path.starts_with(&private) && (!found.is_dir() || found.uid() != own) => bail!(
            "{} is not a directory of user {own}, so no store in it is trusted; remove it, or give --unix",
            private.display()
        ),
        _ => Ok(path),
    }
}

fn unix_address(path: &Path) -> anyhow::Result<String> {
    match path.to_str() {
        Some(text) => Ok(format!("unix:{text}")),
        None => bail!("the socket path {} is not UTF-8; use another --unix", path.display()),
    }
}

/// Whether the system says that nobody listens there.
fn is_nobody(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

fn no_instance(
    name: &InstanceName,
    segment: Option<&SegmentError>,
    socket: &str,
    source: &io::Error,
) -> anyhow::Error {
    let why = match segment {
        Some(SegmentError::Missing { path }) => format!("there is no {}", path.display()),
        Some(error) => error.to_string(),
        None => format!("{socket}: {source}"),
    };
    anyhow!(
        "no instance named `{name}` runs on this machine ({why}); start it with `kvs-front --name {name}`"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn target_given_twice_is_wrong_usage() {
        let options =
            |name: Option<&str>, server: Option<&str>, unix: Option<&str>| -> Result<Target, clap::Error> {
                Target::from_options(TargetOptions {
                    name: name.map(|name| name.parse().expect("a name")),
                    server: server.map(str::to_owned),
                    unix: unix.map(PathBuf::from),
                })
            };
        assert!(options(Some("a"), Some("b:1"), None).is_err());
        assert!(options(None, Some("b:1"), Some("/c")).is_err());
        assert_eq!(options(None, Some("b:1"), None).ok(), Some(Target::Server("b:1".into())));
        assert_eq!(options(None, None, Some("/c")).ok(), Some(Target::Unix("/c".into())));
    }
}
