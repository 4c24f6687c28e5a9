//! What all threads of the front server see.
//!
//! Locks: each field has its own. That of `processes` is held while a data server is launched, and may be followed by that of
//! `estate`; else none is taken while another is held.

use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use anyhow::Context as _;
use crossbeam_channel::Sender;
use kvs_core::control::DataMessage;
use kvs_core::liveness::{LivenessPage, MAIN_SLOT};
use kvs_front::estate::Estate;
use kvs_front::options::ServerOptions;
use kvs_front::process;

use crate::clients::{Client, Clients, Number};
use crate::data_server::DataServer;
use crate::descriptors::ConnectionLimit;
use crate::link::Link;
use crate::notify::DescriptorStore;
use crate::stored;

/// What the supervisor learns of.
pub enum Event {
    /// The data server of this generation says so; not its answers to the operator.
    Said(u64, DataMessage, Vec<OwnedFd>),
    /// The data server of this generation is dead, or doesn't talk any more.
    Dead(u64),
    /// The data server of this generation has ended and is reaped.
    Ended(u64, Option<ExitStatus>),
    /// All clients of a data server that was there before this front server are known.
    Introduced,
    /// This front server can't take over, and why.
    Unable(String),
    /// The data server shall give way to the program on disk. Whoever asked is told the process id of the one that is going to take
    /// over, or why there is none.
    RestartData(Sender<Result<u32, String>>),
    /// Both servers shall give way to the programs on disk. These attach to the segment, or it is of no use to them, and they
    /// load the backup file.
    Reload {
        /// Whether they attach.
        attach: bool,
    },
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
    /// Tells of this process's death before all that it has is given back.
    pub liveness: LivenessPage,
    /// systemd's store for descriptors, where there is one.
    store: Option<Arc<DescriptorStore>>,
    /// None once the store ends.
    estate: Mutex<Option<Estate>>,
    processes: Mutex<Processes>,
}

/// What is killed by an end at once.
#[derive(Default)]
struct Processes {
    data: Option<Arc<OwnedFd>>,
    standby: Option<Arc<OwnedFd>>,
}

impl Front {
    /// Nothing has happened yet. To be called by the main thread, which is alive for as long as the process is.
    ///
    /// # Errors
    /// When the address of the TCP socket can't be told, or there is no memory for a page.
    pub fn new(
        options: ServerOptions,
        limit: ConnectionLimit,
        estate: Estate,
        events: Sender<Event>,
        begun: Instant,
    ) -> anyhow::Result<Self> {
        let store = DescriptorStore::of_service().map(Arc::new);
        let liveness = LivenessPage::create().context("can't make the liveness page")?;
        liveness.claim(MAIN_SLOT)?;
        Ok(Self {
            limit,
            tcp_address: estate.tcp.local_addr().context("can't tell the TCP address")?,
            unix_path: estate.unix_file.path().to_path_buf(),
            clients: Clients::new().kept_in(store.clone()),
            store,
            refused: AtomicU64::new(0),
            link: Link::new(),
            events,
            begun,
            liveness,
            estate: Mutex::new(Some(estate)),
            processes: Mutex::default(),
            options,
        })
    }

    /// What a data server is to keep for the front server after this one.
    ///
    /// # Errors
    /// When the store ends, or no descriptors are left.
    pub fn estate(&self) -> anyhow::Result<Estate> {
        let estate = self.estate.lock().unwrap_or_else(PoisonError::into_inner);
        let estate = estate.as_ref().context("the store is ending")?;
        estate.try_clone().context("can't duplicate the listening sockets")
    }

    /// Takes the socket files away and lets the listening sockets go, so that nobody connects to a store that ends.
    pub fn end_estate(&self) {
        let estate = self.estate.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(estate) = estate {
            estate.remove_files();
            // Who is started next begins anew.
            self.store.iter().for_each(|store| stored::let_go_estate(store));
        }
    }

    /// Has the listening sockets outlive all processes of the store, where that can be had.
    pub fn keep_estate(&self) {
        let estate = self.estate.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Some(store), Some(estate)) = (&self.store, &*estate) {
            stored::keep_estate(store, estate);
        }
    }

    /// The store has ended: nothing of it is to be kept.
    pub fn finish(&self) {
        self.end_estate();
        self.store.iter().for_each(|store| store.finish());
    }

    /// Takes up clients who outlived all processes of the store. The data server that had them is none of this front server's.
    pub fn restore(&self, clients: Vec<(Number, Client)>) {
        if !clients.is_empty() {
            log::info!("{} connections were kept by systemd", clients.len());
        }
        for (number, client) in clients {
            self.clients.introduce(number, client, 0);
        }
    }

    /// Gets the data server that serves by `launch`, and keeps its process for an end at once, which waits for it.
    ///
    /// # Errors
    /// Those of `launch`.
    pub fn keep_process(
        &self,
        launch: impl FnOnce() -> anyhow::Result<DataServer>,
    ) -> anyhow::Result<DataServer> {
        keep(&mut self.processes().data, launch)
    }

    /// As [`Front::keep_process`], for a standby.
    ///
    /// # Errors
    /// Those of `launch`.
    pub fn keep_standby(
        &self,
        launch: impl FnOnce() -> anyhow::Result<DataServer>,
    ) -> anyhow::Result<DataServer> {
        keep(&mut self.processes().standby, launch)
    }

    /// The standby is the data server from now on.
    pub fn standby_serves(&self) {
        let mut kept = self.processes();
        kept.data = kept.standby.take();
    }

    fn processes(&self) -> MutexGuard<'_, Processes> {
        self.processes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends all servers without waiting for anything. Nothing acknowledged is lost: it is in the segment.
    pub fn end_at_once(&self, status: i32) -> ! {
        self.end_estate();
        let kept = self.processes();
        // Dead before this one is: the standby takes nothing over, the data server launches no other front server.
        for server in [&kept.standby, &kept.data].into_iter().flatten() {
            process::kill(server.as_fd());
        }
        std::process::exit(status)
    }
}

/// Launches a data server while the lock of `place` is held: an end at once comes before, or finds its process there.
fn keep(
    place: &mut Option<Arc<OwnedFd>>,
    launch: impl FnOnce() -> anyhow::Result<DataServer>,
) -> anyhow::Result<DataServer> {
    let server = launch()?;
    *place = Some(server.process());
    Ok(server)
}
