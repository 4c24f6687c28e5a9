//! The null server: what a data server does, without a table. It is the ceiling of a machine for servers of this kind.
//!
//! Like the data server it has a fixed number of threads, each with clients of its own and an `epoll`; for a client with requests
//! there is one `recv` into a buffer, frames are found and decoded by the code that the data server uses, and all answers go out with
//! one `send`. A store is acknowledged and forgotten but for its length; a read is answered with as many bytes.
//!
//! Lock: one a thread, for new clients, held for a moment by the main thread and when a client is first heard of.

use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context as _;
use kvs_core::limits::VALUE_BYTES_MAX_LIMIT;
use kvs_core::wire::{
    ErrorCode, PROTOCOL, Request, RequestBody, Response, ResponseBody, decode_request, encode_response, peek,
    request_length_max,
};
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::output;

/// Events taken from the kernel at once, as in the data server.
const EVENTS_MAX: usize = 256;
/// Room for what comes at once.
const INPUT_BYTES: usize = 64 << 10;

/// Serves until it is killed.
///
/// # Errors
/// It can't listen.
pub fn run(workers: usize, unix: &Path) -> anyhow::Result<()> {
    let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("can't listen on TCP")?;
    let unix = UnixListener::bind(unix).context("can't listen on a unix socket")?;
    let value_bytes = Arc::new(AtomicUsize::new(0));
    let inboxes: Vec<Arc<Inbox>> =
        (0..workers).map(|_| Inbox::new().map(Arc::new)).collect::<Result<_, _>>()?;
    for inbox in &inboxes {
        let worker = Worker::new(Arc::clone(inbox), Arc::clone(&value_bytes));
        std::thread::Builder::new().spawn(move || worker.run()).context("can't start a thread")?;
    }
    output::print_line(format_args!("listening on {}", tcp.local_addr()?))?;
    for inbox in inboxes.iter().cycle() {
        inbox.give(accept(&tcp, &unix)?)?;
    }
    Ok(())
}

/// The next client.
fn accept(tcp: &TcpListener, unix: &UnixListener) -> anyhow::Result<OwnedFd> {
    let mut listeners = [PollFd::new(tcp, PollFlags::IN), PollFd::new(unix, PollFlags::IN)];
    while !matches!(poll(&mut listeners, None), Ok(count) if count > 0) {}
    if listeners[0].revents().contains(PollFlags::IN) {
        let (stream, _) = tcp.accept().context("can't accept")?;
        stream.set_nodelay(true).context("can't set up a connection")?;
        return Ok(stream.into());
    }
    Ok(unix.accept().context("can't accept")?.0.into())
}

/// New clients of a thread, by their place; it is their token in its epoll.
struct Inbox {
    epoll: OwnedFd,
    clients: Mutex<Vec<Option<OwnedFd>>>,
}

impl Inbox {
    fn new() -> anyhow::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).context("can't make an epoll")?;
        Ok(Self { epoll, clients: Mutex::new(Vec::new()) })
    }

    fn give(&self, socket: OwnedFd) -> anyhow::Result<()> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        let token = EventData::new_u64(clients.len() as u64);
        epoll::add(&self.epoll, &socket, token, EventFlags::IN).context("can't wait for a client")?;
        clients.push(Some(socket));
        Ok(())
    }

    fn take(&self, place: usize) -> Option<OwnedFd> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner).get_mut(place)?.take()
    }
}

/// A client.
struct Client {
    socket: OwnedFd,
    /// The beginning of a frame.
    rest: Vec<u8>,
    /// Answers that the kernel had no room for.
    unsent: Vec<u8>,
}

/// What is to become of a client.
#[derive(PartialEq, Eq)]
enum Fate {
    Stays,
    Ends,
}

struct Worker {
    inbox: Arc<Inbox>,
    clients: Vec<Option<Client>>,
    input: Vec<u8>,
    output: Vec<u8>,
    /// Bytes of the last value that was stored, by anybody.
    value_bytes: Arc<AtomicUsize>,
    value: Vec<u8>,
}

impl Worker {
    fn new(inbox: Arc<Inbox>, value_bytes: Arc<AtomicUsize>) -> Self {
        let (input, output) = (vec![0; INPUT_BYTES], Vec::new());
        Self { inbox, clients: Vec::new(), input, output, value_bytes, value: Vec::new() }
    }

    fn run(mut self) {
        let mut events = Vec::with_capacity(EVENTS_MAX);
        loop {
            match epoll::wait(&self.inbox.epoll, spare_capacity(&mut events), None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return output::complain(&format!("can't wait: {errno}")),
            }
            for event in events.drain(..) {
                let place = event.data.u64() as usize;
                if self.serve(place, event.flags) == Fate::Ends {
                    self.clients[place] = None;
                }
            }
        }
    }

    fn serve(&mut self, place: usize, flags: EventFlags) -> Fate {
        if self.clients.len() <= place {
            self.clients.resize_with(place + 1, || None);
        }
        if self.clients[place].is_none() {
            let Some(socket) = self.inbox.take(place) else { return Fate::Ends };
            self.clients[place] = Some(Client { socket, rest: Vec::new(), unsent: Vec::new() });
        }
        let Some(mut client) = self.clients[place].take() else { return Fate::Ends };
        let fate = if flags.contains(EventFlags::OUT) {
            let unsent = std::mem::take(&mut client.unsent);
            self.send(&mut client, place, &unsent, true)
        } else {
            self.take_requests(&mut client, place)
        };
        self.clients[place] = Some(client);
        fate
    }

    /// One `recv`, all answers, one `send`.
    fn take_requests(&mut self, client: &mut Client, place: usize) -> Fate {
        let left = client.rest.len();
        if self.input.len() < left + INPUT_BYTES {
            self.input.resize(left + INPUT_BYTES, 0);
        }
        self.input[..left].copy_from_slice(&client.rest);
        let filled = match recv(&client.socket, &mut self.input[left..], RecvFlags::DONTWAIT) {
            Ok((_, 0)) => return Fate::Ends,
            Ok((_, count)) => left + count,
            Err(Errno::AGAIN | Errno::INTR) => return Fate::Stays,
            Err(_) => return Fate::Ends,
        };
        self.output.clear();
        let Some(used) = self.answer_all(filled) else { return Fate::Ends };
        client.rest.clear();
        client.rest.extend_from_slice(&self.input[used..filled]);
        let output = std::mem::take(&mut self.output);
        let fate = self.send(client, place, &output, false);
        self.output = output;
        fate
    }

    /// Answers all whole requests among the first bytes of the input; how many bytes they have. None when they make no sense.
    fn answer_all(&mut self, filled: usize) -> Option<usize> {
        let mut from = 0;
        loop {
            let input = &self.input[from..filled];
            let extent = peek(input, request_length_max(VALUE_BYTES_MAX_LIMIT)).ok()?;
            let Some((extent, payload)) = extent.and_then(|extent| Some((extent, extent.payload(input)?)))
            else {
                return Some(from);
            };
            let Request { number, body } = decode_request(payload).ok()?;
            let body = match body {
                RequestBody::Get { .. } => {
                    let length = self.value_bytes.load(Ordering::Relaxed);
                    self.value.resize(length, 0);
                    ResponseBody::Value { value: &self.value }
                }
                RequestBody::Set { value, .. } => {
                    if self.value_bytes.load(Ordering::Relaxed) != value.len() {
                        self.value_bytes.store(value.len(), Ordering::Relaxed);
                    }
                    ResponseBody::Stored
                }
                RequestBody::Hello { .. } => welcome(),
                _ => refusal(),
            };
            encode_response(&mut self.output, &Response { number, body });
            from += extent.total;
        }
    }

    /// Sends; what the kernel doesn't take is kept, and the client not listened to until it is sent. `waits`: whether it is kept from
    /// being listened to already.
    fn send(&self, client: &mut Client, place: usize, bytes: &[u8], waits: bool) -> Fate {
        let sent = match send(&client.socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(count) => count,
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(_) => return Fate::Ends,
        };
        client.unsent.extend_from_slice(&bytes[sent..]);
        let must_wait = !client.unsent.is_empty();
        if must_wait == waits {
            return Fate::Stays;
        }
        let flags = if must_wait { EventFlags::OUT } else { EventFlags::IN };
        let token = EventData::new_u64(place as u64);
        let watched = epoll::modify(&self.inbox.epoll, client.socket.as_fd(), token, flags);
        if watched.is_ok() { Fate::Stays } else { Fate::Ends }
    }
}

fn welcome() -> ResponseBody<'static> {
    let server = "null server";
    ResponseBody::Welcome {
        protocol: PROTOCOL,
        server,
        connection: 1,
        value_bytes_max: VALUE_BYTES_MAX_LIMIT,
    }
}

fn refusal() -> ResponseBody<'static> {
    let message = "the null server of a benchmark answers reads and stores only";
    ResponseBody::Error { code: ErrorCode::UnknownMessage, message }
}
