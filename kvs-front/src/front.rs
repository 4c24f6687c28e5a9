//! What all threads of the front server see.
//!
//! Locks: each field has its own; none is taken while another is held.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::Context as _;
use crossbeam_channel::Sender;
use kvs_core::control::DataMessage;
use kvs_front::options::ServerOptions;
use rustix::io::Errno;
use rustix::process::{Signal, pidfd_send_signal};

use crate::clients::Clients;
use crate::descriptors::ConnectionLimit;
use crate::link::Link;
use crate::listen::SocketFiles;

/// What the supervisor learns of.
pub enum Event {
    /// The data server of this generation says so; not its answers to the operator.
    Said(u64, DataMessage, Vec<OwnedFd>),
    /// The data server of this generation is dead, or doesn't talk any more.
    Dead(u64),
    /// The data server of this generation has ended and is reaped.
    Ended(u64, Option<ExitStatus>),
    /// The store shall end.
    Quit,
}

/// What all threads of the front server see.
pub struct Front {
    /// What the operator asked for.
    pub options: ServerOptions,
    /// How many clients there may be.
    pub limit: ConnectionLimit,
    /// Where TCP clients connect.
    pub tcp_address: SocketAddr,
    /// Where local clients connect.
    pub unix_path: PathBuf,
    /// All clients.
    pub clients: Clients,
    /// Clients refused so far.
    pub refused: AtomicU64,
    /// To the data server that serves.
    pub link: Link,
    /// To the supervisor.
    pub events: Sender<Event>,
    /// When this process began.
    pub begun: Instant,
    files: Mutex<Option<SocketFiles>>,
    process: Mutex<Option<Arc<OwnedFd>>>,
}

impl Front {
    /// Nothing has happened yet.
    ///
    /// # Errors
    /// When the address of `tcp` can't be told.
    pub fn new(
        options: ServerOptions,
        limit: ConnectionLimit,
        tcp: &TcpListener,
        files: SocketFiles,
        events: Sender<Event>,
        begun: Instant,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            limit,
            tcp_address: tcp.local_addr().context("can't tell the TCP address")?,
            unix_path: files.unix.path().to_path_buf(),
            clients: Clients::new(),
            refused: AtomicU64::new(0),
            link: Link::new(),
            events,
            begun,
            files: Mutex::new(Some(files)),
            process: Mutex::new(None),
            options,
        })
    }

    /// Takes the socket files away, so that nobody connects to a store that ends.
    pub fn remove_socket_files(&self) {
        let files = self.files.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(files);
    }

    /// The data server's process, for an end at once.
    pub fn set_process(&self, process: Arc<OwnedFd>) {
        *self.process.lock().unwrap_or_else(PoisonError::into_inner) = Some(process);
    }

    /// Ends both servers without waiting for anything. Nothing acknowledged is lost: it is in the segment.
    pub fn end_at_once(&self, status: i32) -> ! {
        self.remove_socket_files();
        if let Some(process) = &*self.process.lock().unwrap_or_else(PoisonError::into_inner) {
            kill(process);
        }
        std::process::exit(status)
    }
}

/// Kills the process that `process` stands for; one that is dead already is no error.
pub fn kill(process: &OwnedFd) {
    match pidfd_send_signal(process, Signal::KILL) {
        Ok(()) | Err(Errno::SRCH) => {}
        Err(error) => log::error!("can't kill the data server: {error}"),
    }
}
