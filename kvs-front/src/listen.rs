//! The listening sockets of a store that starts: TCP, the unix socket for local clients, and the operators'.
//!
//! They listen as soon as they are open, and clients wait in the kernel's queue until the data server is ready. The clients'
//! don't wait in `accept`, the operators' one does.

use std::io::{ErrorKind, IsTerminal};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use kvs_core::instance::{console_path, private_directory};
use kvs_front::estate::Estate;
use kvs_front::options::{ConsoleMode, ServerOptions};
use kvs_front::socket_file::SocketFile;
use rustix::net::sockopt;

use crate::stored::Stored;

/// First port tried when no address is given.
const PORT_FIRST: u16 = 9999;
/// Ports tried when no address is given.
const PORTS_MAX: u16 = 1000;
/// Connections the kernel keeps until they are accepted.
const BACKLOG: i32 = 4096;
/// How long a client may be silent before the kernel asks whether its machine still lives.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(120);
/// How long a server that was killed may keep its port.
const DYING_PATIENCE: Duration = Duration::from_millis(500);
const DYING_PAUSE: Duration = Duration::from_millis(5);

/// Opens all of them, but for those that were kept while no process of the store lived, and the operator's input.
///
/// # Errors
/// Which one can't be had, and why. Nothing is left of the others then.
pub fn open(options: &ServerOptions, stored: &mut Stored) -> anyhow::Result<Estate> {
    let unix_path = options.unix_path();
    let console_path = console_path(&unix_path);
    if console_path == unix_path {
        bail!(
            "--unix {} is the name of the operator's socket; choose one that does not end in .console",
            unix_path.display()
        );
    }
    if options.unix.is_none() && unix_path.parent() == Some(&private_directory()) {
        make_private_directory(&private_directory())?;
    }
    let input = console_input(options.console).context("can't keep standard input for the console")?;
    let unix = stored.unix(&unix_path).map_or_else(|| SocketFile::listen(&unix_path), Ok);
    let (unix, unix_file) = unix?;
    let opened = open_others(options, &console_path, stored).inspect_err(|_| unix_file.remove());
    let (console, console_file, tcp) = opened?;
    Ok(Estate { tcp, unix, console, input, unix_file, console_file })
}

fn open_others(
    options: &ServerOptions,
    console_path: &Path,
    stored: &mut Stored,
) -> anyhow::Result<(UnixListener, SocketFile, TcpListener)> {
    let console = stored.console(console_path).map_or_else(|| SocketFile::listen(console_path), Ok);
    let (console, file) = console?;
    let opened = console.set_nonblocking(false).context("can't listen for the operator");
    let mut listen = || match stored.tcp(options.listen) {
        Some(listener) => prepare_tcp(listener),
        None => listen_tcp(options.listen),
    };
    let tcp = opened.and_then(|()| listen()).inspect_err(|_| file.remove())?;
    Ok((console, file, tcp))
}

/// Where the operator types, if there is to be a console on standard input.
fn console_input(mode: ConsoleMode) -> rustix::io::Result<Option<OwnedFd>> {
    let wanted = match mode {
        ConsoleMode::On => true,
        ConsoleMode::Off => false,
        ConsoleMode::Auto => std::io::stdin().is_terminal(),
    };
    wanted.then(|| rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)).transpose()
}

fn listen_tcp(wanted: Option<SocketAddr>) -> anyhow::Result<TcpListener> {
    let listener = match wanted {
        Some(address) => bind(address).with_context(|| {
            format!("can't listen on {address}; choose another --listen, or none for the first free port")
        })?,
        None => first_free_port(PORT_FIRST)?,
    };
    prepare_tcp(listener)
}

/// Makes a bound socket what the store needs.
fn prepare_tcp(listener: TcpListener) -> anyhow::Result<TcpListener> {
    rustix::net::listen(&listener, BACKLOG).context("can't listen")?;
    listener.set_nonblocking(true).context("can't listen")?;
    set_options(&listener).context("can't set the options of the TCP socket")?;
    Ok(listener)
}

/// Binds; waits a moment for a server that was killed and is just being taken apart.
fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    let until = Instant::now() + DYING_PATIENCE;
    loop {
        match TcpListener::bind(address) {
            Err(error) if error.kind() == ErrorKind::AddrInUse && Instant::now() < until => {
                std::thread::sleep(DYING_PAUSE);
            }
            bound => return bound,
        }
    }
}

fn first_free_port(first: u16) -> anyhow::Result<TcpListener> {
    let last = first.saturating_add(PORTS_MAX - 1);
    for port in first..=last {
        match TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
            Ok(listener) => return Ok(listener),
            Err(error) if error.kind() == ErrorKind::AddrInUse => {}
            Err(error) => return Err(error).context(format!("can't listen on 127.0.0.1:{port}")),
        }
    }
    bail!("no port from {first} to {last} is free; give one with --listen")
}

/// Sets what accepted sockets inherit, so that none of it costs a call for each of them.
fn set_options(listener: &TcpListener) -> Result<(), rustix::io::Errno> {
    // Answers are sent whole; waiting for more to send would only delay them.
    sockopt::set_tcp_nodelay(listener, true)?;
    // A client whose machine is gone gives its place free some day.
    sockopt::set_socket_keepalive(listener, true)?;
    sockopt::set_tcp_keepidle(listener, KEEPALIVE_IDLE)?;
    // Urgent data is data: left out of the stream, it would make the kernel's counters say something else than the stream.
    sockopt::set_socket_oobinline(listener, true)
}

/// Where there is no runtime directory of the system, sockets go to one of ours.
fn make_private_directory(directory: &Path) -> anyhow::Result<()> {
    match std::fs::DirBuilder::new().mode(0o700).create(directory) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error).context(format!("can't make {}", directory.display())),
    }
    let meta = std::fs::symlink_metadata(directory)
        .with_context(|| format!("can't look at {}", directory.display()))?;
    let own = rustix::process::geteuid().as_raw();
    if !meta.is_dir() || meta.uid() != own || meta.mode() & 0o077 != 0 {
        bail!(
            "{} is not a directory of this user alone (mode 0700); remove it, or choose another place with --unix",
            directory.display()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn listen_without_an_address_takes_the_first_free_port() {
        let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
        let first = taken.local_addr().expect("its address").port();
        let Ok(found) = first_free_port(first) else {
            assert!(first > u16::MAX - PORTS_MAX, "the last ports may all be taken");
            return;
        };
        assert!(found.local_addr().expect("its address").port() > first);
    }

    #[test]
    fn listen_with_a_taken_address_is_refused_by_name() {
        let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = taken.local_addr().expect("its address");
        let refused = listen_tcp(Some(address)).expect_err("taken");
        assert!(format!("{refused:#}").contains(&address.to_string()));
    }

    #[test]
    fn listen_options_are_inherited_by_accepted_sockets() {
        let listener = listen_tcp(Some(([127, 0, 0, 1], 0).into())).expect("a port");
        let client = TcpStream::connect(listener.local_addr().expect("its address")).expect("connected");
        let (accepted, _) = listener.accept().expect("a client waits");
        assert_eq!(sockopt::tcp_nodelay(&accepted), Ok(true));
        assert_eq!(sockopt::socket_keepalive(&accepted), Ok(true));
        assert_eq!(sockopt::tcp_keepidle(&accepted), Ok(KEEPALIVE_IDLE));
        assert_eq!(sockopt::socket_oobinline(&accepted), Ok(true));
        drop(client);
    }

    #[test]
    fn listen_directory_of_others_is_refused() {
        let parent = tempfile::tempdir().expect("a directory");
        let directory = parent.path().join("kvs-0");
        make_private_directory(&directory).expect("made");
        make_private_directory(&directory).expect("there already");
        std::fs::set_permissions(&directory, std::fs::Permissions::from_mode(0o750)).expect("mode");
        let refused = make_private_directory(&directory).expect_err("others may look in");
        assert!(refused.to_string().contains("0700"));
    }
}
