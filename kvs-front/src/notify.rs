//! Telling systemd how the store is (`sd_notify`), when it wants to know, and giving it descriptors to keep.
//!
//! What is in its store outlives all processes of the service, and is given to the next one that it starts. Best effort: a descriptor that
//! it has no room for, or that is lost because it is busy, is closed with the last process, as without a store.

use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use crossbeam_channel::{Sender, bounded};
use kvs_core::sys::fd_passing::{self, Wait};

/// Most things that wait for systemd to take them.
const ORDERS_MAX: usize = 1 << 17;

/// How long the last of it may take.
const FINISH_PATIENCE: Duration = Duration::from_secs(1);

/// Sends `state`, such as `READY=1`, to the socket that `NOTIFY_SOCKET` names, if any.
pub fn notify(state: &str) {
    let Some(address) = address() else { return };
    let sent = address.and_then(|address| UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address));
    if let Err(error) = sent {
        log::warn!("can't tell systemd {state}: {error}");
    }
}

/// Where systemd listens, if it does.
fn address() -> Option<std::io::Result<SocketAddr>> {
    let path = std::env::var_os("NOTIFY_SOCKET")?;
    Some(match path.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&path),
    })
}

/// Something for the store.
enum Order {
    /// Keep this under a name.
    Keep(String, Arc<OwnedFd>),
    /// Let go what has this name.
    LetGo(String),
    /// Tell that all before is done.
    Tell(Sender<()>),
}

/// The store for descriptors. What is put in goes there in order, by a thread of its own: systemd may be slow, and clients don't wait for it.
pub struct DescriptorStore {
    orders: Sender<Order>,
}

impl DescriptorStore {
    /// The store of this service; None when it has none (`FileDescriptorStoreMax=`, of which `FDSTORE` tells).
    pub fn of_service() -> Option<Self> {
        let places: u64 = std::env::var("FDSTORE").ok()?.parse().ok()?;
        let address = address().filter(|_| places > 0)?;
        match address.map_err(anyhow::Error::from).and_then(|address| Self::open(&address)) {
            Ok(store) => Some(store),
            Err(error) => {
                log::warn!("no connection outlives this service: {error:#}");
                None
            }
        }
    }

    fn open(address: &SocketAddr) -> anyhow::Result<Self> {
        let socket = UnixDatagram::unbound().context("can't make a socket to systemd")?;
        socket.connect_addr(address).context("can't connect to systemd's socket")?;
        let (orders, ordered) = bounded(ORDERS_MAX);
        let thread = std::thread::Builder::new().name("descriptor-store".into());
        thread
            .spawn(move || ordered.iter().for_each(|order| carry_out(&socket, &order)))
            .context("can't start a thread for systemd's store")?;
        Ok(Self { orders })
    }

    /// Has `descriptor` kept under `name`.
    pub fn keep(&self, name: String, descriptor: Arc<OwnedFd>) {
        self.order(Order::Keep(name, descriptor));
    }

    /// Has everything of this name let go.
    pub fn let_go(&self, name: String) {
        self.order(Order::LetGo(name));
    }

    /// Waits until systemd has been told everything, or is too slow.
    pub fn finish(&self) {
        let (done, told) = bounded(1);
        self.order(Order::Tell(done));
        // What systemd was not told it finds out from the closed sockets.
        let _ = told.recv_timeout(FINISH_PATIENCE);
    }

    fn order(&self, order: Order) {
        if self.orders.try_send(order).is_err() {
            log::debug!("systemd is too slow for its store; something is not kept, or kept too long");
        }
    }
}

fn carry_out(socket: &UnixDatagram, order: &Order) {
    let (words, descriptor) = match order {
        Order::Keep(name, descriptor) => (format!("FDSTORE=1\nFDNAME={name}"), Some(descriptor.as_fd())),
        Order::LetGo(name) => (format!("FDSTOREREMOVE=1\nFDNAME={name}"), None),
        Order::Tell(done) => {
            // Who asked may have given up.
            let _ = done.send(());
            return;
        }
    };
    if let Err(error) = fd_passing::send(socket.as_fd(), words.as_bytes(), descriptor.as_slice(), Wait::Yes) {
        log::debug!("systemd's store: {words:?}: {error}");
    }
}
