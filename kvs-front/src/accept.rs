//! The thread that accepts: takes all who wait, refuses who is too many with the reason, hands the others over at once.
//!
//! It waits for the listening sockets and for being told to end; nothing a client does makes it wait. A data server that
//! takes no more clients delays it for at most [`SEND_PATIENCE`](crate::link::SEND_PATIENCE) a round.

use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use kvs_core::control::{ADOPTED_MAX, Transport};
use kvs_core::wire::ErrorCode;
use kvs_front::estate::Estate;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with, sockopt};

use crate::front::Front;
use crate::link::HandOver;
use crate::refuse::Refusals;

/// Pause after the kernel had no descriptor or memory for a client, and none could be given up.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(20);
/// How soon clients are offered again to a data server that took none.
const OFFER_PAUSE: Duration = Duration::from_millis(20);

/// The thread, from outside.
pub struct Accepting {
    call: Arc<Call>,
    thread: JoinHandle<()>,
}

impl Accepting {
    /// Starts it.
    ///
    /// # Errors
    /// When no descriptor or thread is to be had.
    pub fn start(front: &Arc<Front>) -> anyhow::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let wake = wake.context("can't make an eventfd")?;
        let Estate { tcp, unix, .. } = front.estate()?;
        let call = Arc::new(Call { wake, end: AtomicBool::new(false) });
        let acceptor = Acceptor {
            front: Arc::clone(front),
            tcp,
            unix,
            call: Arc::clone(&call),
            refusals: Refusals::new(),
            offer_again: None,
        };
        let thread = std::thread::Builder::new().name("accept".into()).spawn(move || acceptor.run());
        Ok(Self { call, thread: thread.context("can't start the accepting thread")? })
    }

    /// Lets it look for clients that wait for a data server.
    pub fn wake(&self) {
        // A full counter wakes it just as well.
        let _ = rustix::io::write(&self.call.wake, &1u64.to_ne_bytes());
    }

    /// Ends it; its listening sockets are closed when this returns.
    pub fn stop(self) {
        self.call.end.store(true, Ordering::Release);
        self.wake();
        if self.thread.join().is_err() {
            log::error!("the accepting thread had panicked");
        }
    }
}

/// How the thread is called.
struct Call {
    wake: OwnedFd,
    end: AtomicBool,
}

struct Acceptor {
    front: Arc<Front>,
    tcp: TcpListener,
    unix: UnixListener,
    call: Arc<Call>,
    refusals: Refusals,
    offer_again: Option<Instant>,
}

/// What a round of accepting came to.
#[derive(PartialEq, Eq)]
enum Round {
    Done,
    /// The kernel has no descriptor or memory for another socket.
    Exhausted,
}

impl Acceptor {
    fn run(mut self) {
        loop {
            let [tcp, unix] = self.wait();
            if self.call.end.load(Ordering::Acquire) {
                return;
            }
            for (transport, ready) in [(Transport::Tcp, tcp), (Transport::Unix, unix)] {
                if ready && self.accept_some(transport) == Round::Exhausted {
                    self.refuse_for_want_of_descriptors(transport);
                }
            }
            self.refusals.tidy();
            self.offer_again = match self.front.link.hand_over(&self.front.clients) {
                HandOver::Done => None,
                HandOver::Refused => Some(Instant::now() + OFFER_PAUSE),
            };
        }
    }

    /// Waits until something is to be done, and tells which sockets are ready.
    fn wait(&self) -> [bool; 2] {
        let mut sockets = [
            PollFd::new(&self.tcp, PollFlags::IN),
            PollFd::new(&self.unix, PollFlags::IN),
            PollFd::new(&self.call.wake, PollFlags::IN),
        ];
        let next = [self.refusals.next_tidy(), self.offer_again].into_iter().flatten().min();
        let pause = next.map(|at| at.saturating_duration_since(Instant::now()));
        let timeout = pause.and_then(|pause| Timespec::try_from(pause).ok());
        match poll(&mut sockets, timeout.as_ref()) {
            Ok(_) => {
                let [tcp, unix, called] = sockets.map(|socket| !socket.revents().is_empty());
                if called {
                    // Only to reset it; what it calls for is looked at in every round.
                    let _ = rustix::io::read(&self.call.wake, &mut [0u8; 8][..]);
                }
                [tcp, unix]
            }
            Err(Errno::INTR) => [false; 2],
            Err(error) => {
                // Out of memory, at worst: what could be ready is tried.
                log::warn!("can't wait for clients: {error}");
                std::thread::sleep(EXHAUSTED_PAUSE);
                [true; 2]
            }
        }
    }

    /// Accepts a batch at most, so that the first don't wait for the last.
    fn accept_some(&mut self, transport: Transport) -> Round {
        for _ in 0..ADOPTED_MAX {
            match accept_one(self.listener(transport)) {
                Ok(socket) => self.receive(transport, socket),
                Err(Errno::AGAIN) => break,
                Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => return Round::Exhausted,
                // The client gave up before it was accepted, or a signal came.
                Err(_) => {}
            }
        }
        Round::Done
    }

    fn listener(&self, transport: Transport) -> BorrowedFd<'_> {
        match transport {
            Transport::Tcp => self.tcp.as_fd(),
            Transport::Unix => self.unix.as_fd(),
        }
    }

    fn receive(&mut self, transport: Transport, socket: OwnedFd) {
        if transport == Transport::Unix && !is_ours(socket.as_fd()) {
            return self.refuse(socket, ErrorCode::Internal, "this store serves its own user and root only");
        }
        let limit = self.front.limit;
        if let Err(socket) = self.front.clients.add(transport, socket, limit.most) {
            self.refuse(socket, ErrorCode::TooManyConnections, &limit.message());
        }
    }

    fn refuse(&mut self, socket: OwnedFd, code: ErrorCode, message: &str) {
        self.front.refused.fetch_add(1, Ordering::Relaxed);
        self.refusals.refuse(socket, code, message);
    }

    fn refuse_for_want_of_descriptors(&mut self, transport: Transport) {
        if !self.refusals.give_up_descriptor() {
            std::thread::sleep(EXHAUSTED_PAUSE);
            return;
        }
        match accept_one(self.listener(transport)) {
            Ok(socket) => self.refuse(
                socket,
                ErrorCode::TooManyConnections,
                "no descriptor is left for another connection; raise the server's limit of open files (ulimit -n)",
            ),
            // The machine itself has none: the client waits until it has.
            Err(_) => std::thread::sleep(EXHAUSTED_PAUSE),
        }
    }
}

fn accept_one(listener: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)
}

/// Whether the other end of a unix socket is of this user, or root.
pub fn is_ours(socket: BorrowedFd<'_>) -> bool {
    let own = rustix::process::geteuid();
    sockopt::socket_peercred(socket).is_ok_and(|peer| peer.uid == own || peer.uid.is_root())
}
