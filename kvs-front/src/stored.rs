//! What systemd kept while no process of the store lived: the listening sockets and the clients' ones, by their names.
//!
//! | name | what it is |
//! |---|---|
//! | `tcp`, `unix`, `console` | the listening sockets |
//! | `client-NUMBER-tcp`, `client-NUMBER-unix` | a client: the number of its connection and how it came |

use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;

use kvs_core::control::Transport;
use kvs_core::sys::activation;
use kvs_front::estate::Estate;
use kvs_front::socket_file::SocketFile;

use crate::clients::{Client, Number};
use crate::notify::DescriptorStore;

const TCP: &str = "tcp";
const UNIX: &str = "unix";
const CONSOLE: &str = "console";

/// What was kept.
#[derive(Default)]
pub struct Stored {
    tcp: Option<TcpListener>,
    unix: Option<UnixListener>,
    console: Option<UnixListener>,
    /// The clients.
    pub clients: Vec<(Number, Client)>,
}

impl Stored {
    /// Takes what this process was given at its start.
    pub fn take() -> Self {
        let mut stored = Self::default();
        for (name, descriptor) in activation::take() {
            match name.as_str() {
                TCP => stored.tcp = Some(descriptor.into()),
                UNIX => stored.unix = Some(descriptor.into()),
                CONSOLE => stored.console = Some(descriptor.into()),
                name => match parse_client(name) {
                    Some((number, transport)) => {
                        let client = Client { transport, socket: Arc::new(descriptor) };
                        stored.clients.push((number, client));
                    }
                    None => log::warn!("systemd kept {name:?}, which is nothing of kvs; closed"),
                },
            }
        }
        stored
    }

    /// The TCP socket, if it listens where this store is to listen.
    pub fn tcp(&mut self, wanted: Option<SocketAddr>) -> Option<TcpListener> {
        let fits = |found: SocketAddr| match wanted {
            None => true,
            Some(wanted) => found == wanted || (wanted.port() == 0 && found.ip() == wanted.ip()),
        };
        self.tcp.take().filter(|socket| socket.local_addr().is_ok_and(fits))
    }

    /// The socket for local clients at `path`, with its file.
    pub fn unix(&mut self, path: &Path) -> Option<(UnixListener, SocketFile)> {
        let socket = self.unix.take()?;
        SocketFile::found(&socket, path).map(|file| (socket, file))
    }

    /// The socket for operators at `path`, with its file.
    pub fn console(&mut self, path: &Path) -> Option<(UnixListener, SocketFile)> {
        let socket = self.console.take()?;
        SocketFile::found(&socket, path).map(|file| (socket, file))
    }
}

/// Has the listening sockets kept, in the place of what was kept of them before.
pub fn keep_estate(store: &DescriptorStore, estate: &Estate) {
    let duplicates = [
        (TCP, estate.tcp.try_clone().map(OwnedFd::from)),
        (UNIX, estate.unix.try_clone().map(OwnedFd::from)),
        (CONSOLE, estate.console.try_clone().map(OwnedFd::from)),
    ];
    for (name, duplicate) in duplicates {
        match duplicate {
            Ok(socket) => store.keep(name.to_owned(), Arc::new(socket)),
            Err(error) => log::debug!("the socket {name} is not kept by systemd: {error}"),
        }
    }
}

/// Has the listening sockets let go.
pub fn let_go_estate(store: &DescriptorStore) {
    [TCP, UNIX, CONSOLE].into_iter().for_each(|name| store.let_go(name.to_owned()));
}

/// The name under which a client is kept.
pub fn client_name(number: Number, transport: Transport) -> String {
    let transport = match transport {
        Transport::Tcp => TCP,
        Transport::Unix => UNIX,
    };
    format!("client-{number}-{transport}")
}

fn parse_client(name: &str) -> Option<(Number, Transport)> {
    let (number, transport) = name.strip_prefix("client-")?.split_once('-')?;
    let transport = match transport {
        TCP => Transport::Tcp,
        UNIX => Transport::Unix,
        _ => return None,
    };
    Some((number.parse().ok()?, transport))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_clients_are_found_by_their_names() {
        for (number, transport) in [(0, Transport::Tcp), (u64::MAX, Transport::Unix)] {
            assert_eq!(parse_client(&client_name(number, transport)), Some((number, transport)));
        }
        for odd in ["", "client-", "client-1", "client-x-tcp", "client-1-tcp-2", "client--1-unix"] {
            assert_eq!(parse_client(odd), None, "{odd:?}");
        }
    }

    #[test]
    fn stored_socket_that_listens_elsewhere_is_not_taken() {
        let listening = || Stored { tcp: TcpListener::bind("127.0.0.1:0").ok(), ..Stored::default() };
        assert!(listening().tcp(None).is_some());
        assert!(listening().tcp(Some(([127, 0, 0, 1], 0).into())).is_some());
        assert!(listening().tcp(Some(([127, 0, 0, 2], 0).into())).is_none());
        assert!(listening().tcp(Some(([127, 0, 0, 1], 1).into())).is_none());
    }
}
