//! Telling a client why it can't be served, also when there is no descriptor left to tell it with.
//!
//! A client that has said hello already would see a reset instead of the reason if its socket were closed at once, since
//! nobody reads what it said. So a refused socket lingers, closed for sending, until the client has had time to read. The
//! sockets that linger, and one descriptor held in reserve, are what is given up when the kernel has no descriptor left.
//!
//! Belongs to the accepting thread; no lock.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use kvs_core::wire::{self, ErrorCode, Response, ResponseBody};
use rustix::net::{SendFlags, Shutdown};

/// How long a refused client has to read why.
const LINGER: Duration = Duration::from_secs(1);
/// Most refused clients that linger.
const LINGERING_MAX: usize = 8;
/// Pause between two lines of the log about refused clients.
const LOG_PAUSE: Duration = Duration::from_secs(1);

/// The refused clients of the last moments.
pub struct Refusals {
    lingering: VecDeque<(Instant, OwnedFd)>,
    reserve: Option<OwnedFd>,
    logged: Option<Instant>,
    unlogged: u64,
}

impl Refusals {
    /// None so far.
    pub fn new() -> Self {
        Self { lingering: VecDeque::new(), reserve: open_reserve(), logged: None, unlogged: 0 }
    }

    /// Tells a client why it isn't served.
    pub fn refuse(&mut self, socket: OwnedFd, code: ErrorCode, message: &str) {
        tell(&socket, code, message);
        self.lingering.push_back((Instant::now() + LINGER, socket));
        if self.lingering.len() > LINGERING_MAX {
            self.lingering.pop_front();
        }
        self.log(message);
    }

    fn log(&mut self, message: &str) {
        self.unlogged += 1;
        if self.logged.is_none_or(|at| at.elapsed() >= LOG_PAUSE) {
            log::warn!("refused {} client(s): {message}", self.unlogged);
            self.logged = Some(Instant::now());
            self.unlogged = 0;
        }
    }

    /// Lets clients go that had their time, and makes up for a reserve that was given up.
    pub fn tidy(&mut self) {
        let now = Instant::now();
        while self.lingering.front().is_some_and(|(until, _)| *until <= now) {
            self.lingering.pop_front();
        }
        if self.reserve.is_none() {
            self.reserve = open_reserve();
        }
    }

    /// When there is something to tidy up.
    pub fn next_tidy(&self) -> Option<Instant> {
        self.lingering.front().map(|(until, _)| *until)
    }

    /// Gives up a descriptor so that a client can be accepted and told; false when there is none to give up.
    pub fn give_up_descriptor(&mut self) -> bool {
        self.reserve.take().is_some() || self.lingering.pop_front().is_some()
    }
}

/// Sends the reason as the protocol wants it, and ends the sending direction.
pub fn tell(socket: &OwnedFd, code: ErrorCode, message: &str) {
    let mut bytes = Vec::new();
    wire::encode_response(&mut bytes, &Response { number: 0, body: ResponseBody::Error { code, message } });
    // A client that is gone already needs no answer, and a new socket has room for one.
    let _ = rustix::net::send(socket, &bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
    let _ = rustix::net::shutdown(socket, Shutdown::Write);
}

fn open_reserve() -> Option<OwnedFd> {
    File::open("/dev/null").ok().map(OwnedFd::from)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    use super::*;

    fn client_and_socket() -> (TcpStream, OwnedFd) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let client = TcpStream::connect(listener.local_addr().expect("its address")).expect("connected");
        (client, listener.accept().expect("a client").0.into())
    }

    #[test]
    fn refused_client_reads_the_reason_and_the_end_though_it_has_spoken() {
        let mut refusals = Refusals::new();
        let (mut client, socket) = client_and_socket();
        client.write_all(b"a hello nobody reads").expect("sent");
        refusals.refuse(socket, ErrorCode::TooManyConnections, "full");
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).expect("no reset");
        let extent = wire::peek(&answer, 1_000).expect("a frame").expect("whole");
        let response = wire::decode_response(extent.payload(&answer).expect("whole")).expect("a response");
        let body = ResponseBody::Error { code: ErrorCode::TooManyConnections, message: "full" };
        assert_eq!((response.number, response.body), (0, body));
    }

    #[test]
    fn refused_clients_linger_in_a_bounded_number_and_their_descriptors_can_be_given_up() {
        let mut refusals = Refusals::new();
        for _ in 0..2 * LINGERING_MAX {
            let (_client, socket) = client_and_socket();
            refusals.refuse(socket, ErrorCode::TooManyConnections, "full");
        }
        let given = std::iter::from_fn(|| refusals.give_up_descriptor().then_some(())).count();
        assert_eq!(given, LINGERING_MAX + 1);
        assert_eq!(refusals.next_tidy(), None);
        refusals.tidy();
        assert!(refusals.give_up_descriptor(), "the reserve is there again");
    }
}
