//! The listening sockets: TCP, the unix socket for local clients, and the operator's.
//!
//! A socket file that another process answers on is never touched; one that nobody answers on and that is ours is what a
//! killed front server left, and is replaced.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use kvs_core::instance::{console_path, private_directory};
use kvs_front::options::ServerOptions;

/// First port tried when no address is given.
const PORT_FIRST: u16 = 9999;
/// Ports tried when no address is given.
const PORTS_MAX: u16 = 1000;
/// Connections the kernel keeps until they are accepted.
const BACKLOG: i32 = 4096;
/// Longest path of a unix socket, in bytes, its final zero left out.
const UNIX_PATH_BYTES_MAX: usize = 107;

/// The listening sockets.
pub struct Listening {
    /// For TCP clients.
    pub tcp: TcpListener,
    /// Where that is.
    pub tcp_address: SocketAddr,
    /// For local clients.
    pub unix: UnixListener,
    /// Where that is.
    pub unix_path: PathBuf,
    /// For the operator.
    pub console: UnixListener,
    /// Where that is.
    pub console_path: PathBuf,
}

impl Listening {
    /// Opens all of them.
    ///
    /// # Errors
    /// Which one can't be had, and why.
    pub fn open(options: &ServerOptions) -> anyhow::Result<Self> {
        let unix_path =
            std::path::absolute(options.unix_path()).context("can't tell where the unix socket is")?;
        if options.unix.is_none() {
            make_private_directory(&unix_path)?;
        }
        let unix = bind_unix(&unix_path)?;
        let console_path = console_path(&unix_path);
        let opened = bind_unix(&console_path).and_then(|console| Ok((console, bind_tcp(options.listen)?)));
        let (console, tcp) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                remove_file(&unix_path);
                return Err(error);
            }
        };
        let tcp_address = tcp.local_addr().context("can't tell the TCP address")?;
        for socket in [rustix::fd::AsFd::as_fd(&tcp), rustix::fd::AsFd::as_fd(&unix)] {
            rustix::net::listen(socket, BACKLOG).context("can't listen")?;
            rustix::io::ioctl_fionbio(socket, true).context("can't listen")?;
        }
        Ok(Self { tcp, tcp_address, unix, unix_path, console, console_path })
    }

    /// Removes the socket files.
    pub fn remove(&self) {
        remove_file(&self.unix_path);
        remove_file(&self.console_path);
    }
}

fn remove_file(path: &Path) {
    match std::fs::remove_file(path) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => log::warn!("can't remove {}: {error}", path.display()),
    }
}

fn bind_tcp(wanted: Option<SocketAddr>) -> anyhow::Result<TcpListener> {
    if let Some(address) = wanted {
        return TcpListener::bind(address).with_context(|| {
            format!("can't listen on {address}; choose another --listen, or none for a free port")
        });
    }
    for port in PORT_FIRST..PORT_FIRST + PORTS_MAX {
        match TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
            Ok(listener) => return Ok(listener),
            Err(error) if error.kind() == ErrorKind::AddrInUse => {}
            Err(error) => return Err(error).context(format!("can't listen on 127.0.0.1:{port}")),
        }
    }
    bail!("no port from {PORT_FIRST} to {} is free; give one with --listen", PORT_FIRST + PORTS_MAX - 1)
}

/// Where there is no runtime directory of the system, sockets go to one of ours.
fn make_private_directory(unix_path: &Path) -> anyhow::Result<()> {
    let directory = private_directory();
    if unix_path.parent() != Some(&directory) {
        return Ok(());
    }
    match std::fs::DirBuilder::new().mode(0o700).create(&directory) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error).context(format!("can't make {}", directory.display())),
    }
    let meta = std::fs::symlink_metadata(&directory)?;
    let own = rustix::process::geteuid().as_raw();
    if !meta.is_dir() || meta.uid() != own || meta.mode() & 0o077 != 0 {
        bail!(
            "{} is not a directory of this user alone (mode 0700); remove it, or choose another place with --unix",
            directory.display()
        );
    }
    Ok(())
}

fn bind_unix(path: &Path) -> anyhow::Result<UnixListener> {
    let length = path.as_os_str().len();
    if length > UNIX_PATH_BYTES_MAX {
        bail!(
            "the socket path {} has {length} bytes, {UNIX_PATH_BYTES_MAX} are possible; choose a shorter --unix",
            path.display()
        );
    }
    match UnixStream::connect(path) {
        Ok(_) => bail!(
            "another front server answers on {}; end it first, or choose another --name or --unix",
            path.display()
        ),
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => remove_stale(path)?,
        Err(error) => {
            return Err(error)
                .context(format!("can't use {} as the socket; choose another --unix", path.display()));
        }
    }
    let listener =
        UnixListener::bind(path).with_context(|| format!("can't make the socket {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
        .with_context(|| format!("can't protect the socket {}", path.display()))?;
    Ok(listener)
}

fn remove_stale(path: &Path) -> anyhow::Result<()> {
    let meta = std::fs::symlink_metadata(path)?;
    if !meta.file_type().is_socket() || meta.uid() != rustix::process::geteuid().as_raw() {
        bail!("{} is there already and is no socket of this user; choose another --unix", path.display());
    }
    std::fs::remove_file(path).with_context(|| format!("can't replace the stale socket {}", path.display()))
}
