//! The thread that accepts: takes all who wait, refuses who is too many with the reason, hands the others over at once.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use kvs_core::control::{ADOPTED_MAX, Transport};
use kvs_core::wire::{self, ErrorCode, Response, ResponseBody};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SendFlags, SocketFlags, accept_with, sockopt};

use crate::Front;

/// How often the thread looks whether it shall end, though nobody comes.
const ROUND: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
/// Pause after the kernel had no descriptor or memory for a client.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(10);
/// Pause between two warnings of the same kind.
const WARNING_PAUSE: Duration = Duration::from_secs(1);

/// Accepts until the front server stops.
pub fn run(front: &Arc<Front>) {
    let mut reserve = open_reserve();
    let mut warned: Option<Instant> = None;
    while !front.stopping.load(Ordering::Acquire) {
        let mut sockets = [
            PollFd::new(&front.listening.tcp, PollFlags::IN),
            PollFd::new(&front.listening.unix, PollFlags::IN),
        ];
        if poll(&mut sockets, Some(&ROUND)).is_err() {
            continue;
        }
        let ready = sockets.map(|socket| !socket.revents().is_empty());
        for (transport, ready) in [Transport::Tcp, Transport::Unix].into_iter().zip(ready) {
            if ready && accept_some(front, transport) == Err(Exhausted) {
                refuse_for_want_of_descriptors(front, transport, &mut reserve);
                if warned.is_none_or(|at| at.elapsed() > WARNING_PAUSE) {
                    log::warn!("no descriptor left for another client; raise the limit with `ulimit -n`");
                    warned = Some(Instant::now());
                }
            }
        }
        front.link.hand_over_waiting(&front.clients);
    }
}

#[derive(PartialEq, Eq)]
struct Exhausted;

fn accept_one(front: &Front, transport: Transport) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    match transport {
        Transport::Tcp => accept_with(&front.listening.tcp, flags),
        Transport::Unix => accept_with(&front.listening.unix, flags),
    }
}

fn accept_some(front: &Front, transport: Transport) -> Result<(), Exhausted> {
    for _ in 0..ADOPTED_MAX {
        match accept_one(front, transport) {
            Ok(socket) => welcome(front, transport, socket),
            Err(Errno::AGAIN) => return Ok(()),
            Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => return Err(Exhausted),
            // The client gave up before it was accepted.
            Err(_) => {}
        }
    }
    Ok(())
}

fn welcome(front: &Front, transport: Transport, socket: OwnedFd) {
    if transport == Transport::Unix && !is_ours(&socket) {
        return refuse(&socket, "this store belongs to another user");
    }
    let limit = front.options.max_connections;
    if front.clients.count() >= limit as usize {
        return refuse(
            &socket,
            &format!("the limit of {limit} connections is reached; raise --max-connections"),
        );
    }
    if transport == Transport::Tcp {
        // Answers are sent whole; waiting for more to send would only delay them.
        let _ = sockopt::set_tcp_nodelay(&socket, true);
        // Else a byte sent as urgent would be missing from the stream, and from the kernel's counters of it.
        let _ = sockopt::set_socket_oobinline(&socket, true);
    }
    front.clients.add(transport, socket);
}

fn is_ours(socket: &OwnedFd) -> bool {
    let own = rustix::process::geteuid();
    sockopt::socket_peercred(socket).is_ok_and(|peer| peer.uid == own || peer.uid.is_root())
}

/// Tells a client why it can't be served. The socket closes when it is dropped; nothing of it was read, and nothing has
/// come yet as a rule, so the message isn't lost to a reset.
fn refuse(socket: &OwnedFd, message: &str) {
    let mut bytes = Vec::new();
    let body = ResponseBody::Error { code: ErrorCode::TooManyConnections, message };
    wire::encode_response(&mut bytes, &Response { number: 0, body });
    let _ = rustix::net::send(socket, &bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
    let _ = rustix::net::shutdown(socket.as_fd(), rustix::net::Shutdown::Write);
}

/// A descriptor that is given up when there is no other left, so that a client can still be told so.
fn open_reserve() -> Option<File> {
    File::open("/dev/null").ok()
}

fn refuse_for_want_of_descriptors(front: &Front, transport: Transport, reserve: &mut Option<File>) {
    drop(reserve.take());
    if let Ok(socket) = accept_one(front, transport) {
        refuse(
            &socket,
            "the server has no descriptor left for another connection; raise its limit with `ulimit -n`",
        );
    }
    *reserve = open_reserve();
    std::thread::sleep(EXHAUSTED_PAUSE);
}
