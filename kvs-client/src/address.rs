//! Where a server is, and a socket to it.

use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::Error;

/// A connection attempt is given at least this long.
const CONNECT_MIN: Duration = Duration::from_millis(1);

/// Where a server is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// Host and port.
    Tcp(String),
    /// A socket file.
    Unix(PathBuf),
}

impl Address {
    /// Reads `HOST:PORT`, `unix:PATH`, or a path with a slash.
    pub fn parse(text: &str) -> Result<Self, Error> {
        if let Some(path) = text.strip_prefix("unix:") {
            return Ok(Self::Unix(path.into()));
        }
        if text.contains('/') {
            return Ok(Self::Unix(text.into()));
        }
        match text.rsplit_once(':') {
            Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => {
                Ok(Self::Tcp(text.to_owned()))
            }
            _ => Err(Error::Address { address: text.to_owned(), reason: "it has no port".into() }),
        }
    }

    /// Connects, by `deadline` if there is one.
    pub fn connect(&self, deadline: Option<Instant>) -> io::Result<OwnedFd> {
        match self {
            Self::Unix(path) => Ok(UnixStream::connect(path)?.into()),
            Self::Tcp(address) => {
                let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
                for address in address.to_socket_addrs()? {
                    let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
                    let connected = match left {
                        Some(left) => TcpStream::connect_timeout(&address, left.max(CONNECT_MIN)),
                        None => TcpStream::connect(address),
                    };
                    match connected {
                        // Where nobody listens, on a port that the kernel gives to clients, a socket may meet itself.
                        Ok(stream) if stream.local_addr()? == stream.peer_addr()? => {
                            last = io::ErrorKind::ConnectionRefused.into();
                        }
                        Ok(stream) => {
                            stream.set_nodelay(true)?;
                            return Ok(stream.into());
                        }
                        Err(error) => last = error,
                    }
                }
                Err(last)
            }
        }
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(address) => formatter.write_str(address),
            Self::Unix(path) => write!(formatter, "{}", path.display()),
        }
    }
}
