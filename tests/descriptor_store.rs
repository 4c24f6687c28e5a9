//! The promise: under a service manager with a store for descriptors, the death of all processes of the store closes no port and no
//! connection: who connects meanwhile waits, who is connected is served on at the exact byte.
//!
//! Method: a stand-in for systemd speaks its protocol. It receives what is put into the store on the socket that `NOTIFY_SOCKET` names,
//! lets go what it is told to, and starts the store again with all it holds from descriptor 3 on, named by `LISTEN_FDNAMES`.

use std::fs;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use kvs_harness::binaries;
use kvs_harness::connection::{Answer, Connection, hello, increment, set};
use kvs_harness::processes::kill_store;
use kvs_harness::store::{Launch, Store};
use kvs_harness::wait::{SOON, eventually};
use rustix::cmsg_space;
use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::Signal;

/// Names of the listening sockets.
const LISTENING: [&str; 3] = ["tcp", "unix", "console"];

/// What systemd is to a service, as far as descriptors are concerned.
struct Manager {
    directory: tempfile::TempDir,
    socket: UnixDatagram,
    kept: Vec<(String, OwnedFd)>,
}

impl Manager {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let socket = UnixDatagram::bind(directory.path().join("notify")).expect("bound");
        socket.set_nonblocking(true).expect("set");
        Self { directory, socket, kept: Vec::new() }
    }

    fn launch(&self, program: PathBuf) -> Launch {
        let notify = self.directory.path().join("notify").display().to_string();
        Launch::new().front(program).environment("NOTIFY_SOCKET", &notify).environment("FDSTORE", "4096")
    }

    /// Takes what the store has said so far.
    fn listen(&mut self) {
        let mut bytes = [0; 4096];
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(8))];
        loop {
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let received = recvmsg(
                &self.socket,
                &mut [IoSliceMut::new(&mut bytes)],
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            );
            let length = match received {
                Ok(message) => message.bytes,
                Err(Errno::AGAIN) => return,
                Err(error) => panic!("the notification socket: {error}"),
            };
            let descriptors: Vec<OwnedFd> = control
                .drain()
                .filter_map(|message| match message {
                    RecvAncillaryMessage::ScmRights(rights) => Some(rights),
                    _ => None,
                })
                .flatten()
                .collect();
            self.obey(&String::from_utf8_lossy(&bytes[..length]), descriptors);
        }
    }

    fn obey(&mut self, words: &str, descriptors: Vec<OwnedFd>) {
        let says = |wanted: &str| words.lines().any(|line| line == wanted);
        let name = words.lines().find_map(|line| line.strip_prefix("FDNAME="));
        if says("FDSTORE=1") {
            let name = name.expect("named");
            // What is kept already is not kept twice.
            if LISTENING.contains(&name) {
                self.kept.retain(|(kept, _)| kept != name);
            }
            assert!(name.len() < 256 && !name.contains(':'), "{name:?} is no name for systemd");
            assert_eq!(descriptors.len(), 1, "{words:?}");
            self.kept.extend(descriptors.into_iter().map(|descriptor| (name.to_owned(), descriptor)));
        }
        if says("FDSTOREREMOVE=1") {
            let name = name.expect("named");
            self.kept.retain(|(kept, _)| kept != name);
        }
    }

    /// Waits until so many descriptors are kept.
    fn await_kept(&mut self, count: usize) {
        eventually(&format!("{count} are kept"), SOON, || {
            self.listen();
            self.kept.len() == count
        });
    }

    fn names(&self) -> Vec<&str> {
        self.kept.iter().map(|(name, _)| name.as_str()).collect()
    }

    /// A program that starts `kvs-front` with everything that is kept, as systemd does: from descriptor 3 on.
    fn program(&mut self) -> PathBuf {
        // What was said before the end counts.
        self.listen();
        let mut script = String::from("#!/bin/bash\n");
        // First out of the way of the numbers that they are to get.
        for (place, (_, descriptor)) in self.kept.iter().enumerate() {
            fcntl_setfd(descriptor, FdFlags::empty()).expect("to be inherited");
            script += &format!("exec {}<&{}-\n", 500 + place, descriptor.as_raw_fd());
        }
        for place in 0..self.kept.len() {
            script += &format!("exec {}<&{}-\n", 3 + place, 500 + place);
        }
        script += &format!(
            "LISTEN_PID=$$ LISTEN_FDS={} LISTEN_FDNAMES={} exec {} \"$@\"\n",
            self.kept.len(),
            self.names().join(":"),
            binaries::program("kvs-front").display()
        );
        let path = self.directory.path().join("start");
        write_program(&path, &script);
        path
    }
}

impl Manager {
    /// Hides from other programs what the one that was started has.
    fn hide(&self) {
        for (_, descriptor) in &self.kept {
            fcntl_setfd(descriptor, FdFlags::CLOEXEC).expect("marked");
        }
    }
}

fn write_program(path: &Path, script: &str) {
    fs::write(path, script).expect("written");
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("marked");
}

fn kill_all(store: Store) -> kvs_harness::store::Place {
    kill_store(store.place().name());
    store.end(Signal::TERM).0
}

#[test]
fn descriptor_store_keeps_ports_open_while_nobody_lives() {
    let mut manager = Manager::new();
    let store = manager.launch(binaries::program("kvs-front")).start();
    let mut client = store.connect();
    let stored = set(b"before", b"all died");
    assert_eq!(client.ask(&stored).expect("served"), Answer::Stored);
    eventually("the listening sockets are kept", SOON, || {
        manager.listen();
        LISTENING.iter().all(|name| manager.names().contains(name))
    });
    let (tcp, unix) = (store.ready().tcp, store.ready().unix.clone());
    let place = kill_all(store);

    // Nobody lives; the kernel takes connections all the same.
    let mut waiting = [Connection::tcp(tcp).expect("accepted"), Connection::unix(&unix).expect("accepted")];
    for client in &mut waiting {
        client.queue(&hello());
        client.queue(&increment(b"waited", 1));
        client.flush().expect("sent");
    }
    let program = manager.program();
    let store = manager.launch(program).start_at(place);
    manager.hide();
    assert_eq!((store.ready().tcp, &store.ready().unix), (tcp, &unix), "at the same addresses");
    let mut numbers = Vec::new();
    for client in &mut waiting {
        assert!(matches!(client.receive().expect("welcomed").1, Answer::Welcome { .. }));
        match client.receive().expect("served").1 {
            Answer::Number(number) => numbers.push(number),
            other => panic!("{other:?}"),
        }
    }
    numbers.sort_unstable();
    assert_eq!(numbers, [1, 2]);
    assert!(store.place().tools(&["get", "before"]).stdout == b"all died");
}

/// A client in the middle of a conversation.
struct Talk {
    client: Connection,
    key: String,
    asked: i64,
    answered: i64,
    /// What is still to be sent of it.
    rest: Vec<u8>,
}

impl Talk {
    fn ask(&mut self) {
        self.client.queue(&increment(self.key.as_bytes(), 1));
        self.asked += 1;
    }

    /// Takes answers until `open` are left, each of which must be the next number.
    fn listen(&mut self, open: i64) {
        while self.asked - self.answered > open {
            self.answered += 1;
            let answer = self.client.receive().expect("the connection lasts").1;
            assert_eq!(answer, Answer::Number(self.answered), "{}", self.key);
        }
    }
}

#[test]
fn descriptor_store_keeps_connections_while_nobody_lives() {
    const CLIENTS: usize = 24;
    const ROUNDS: usize = 3;
    let mut manager = Manager::new();
    let mut store = manager.launch(binaries::program("kvs-front")).start();
    let mut talks: Vec<Talk> = (0..CLIENTS)
        .map(|which| Talk {
            client: if which % 2 == 0 { store.connect() } else { store.connect_unix() },
            key: format!("talk {which}"),
            asked: 0,
            answered: 0,
            rest: Vec::new(),
        })
        .collect();
    for round in 0..ROUNDS {
        manager.await_kept(LISTENING.len() + CLIENTS);
        for (which, talk) in talks.iter_mut().enumerate() {
            (0..20).for_each(|_| talk.ask());
            let whole = talk.client.take_queued();
            // Some have everything under way, some half of a request, some are silent.
            let sent = [whole.len(), whole.len() - 5, 0][(which + round) % 3];
            talk.client.send_raw(&whole[..sent]).expect("sent");
            if which % 2 == 0 && sent > 0 {
                talk.listen(10);
            }
            talk.rest = whole[sent..].to_vec();
        }
        let place = kill_all(store);
        // Nobody lives: what is sent now waits.
        for talk in &mut talks {
            let rest = std::mem::take(&mut talk.rest);
            talk.client.send_raw(&rest).expect("sent");
        }
        let program = manager.program();
        store = manager.launch(program).start_at(place);
        manager.hide();
        assert_eq!(store.ready().start, "attached");
        talks.iter_mut().for_each(|talk| talk.listen(0));
    }
    let asked: i64 = talks.iter().map(|talk| talk.asked).sum();
    assert_eq!(asked, (CLIENTS * ROUNDS * 20) as i64);
    drop(talks);
    manager.await_kept(LISTENING.len());
}

#[test]
fn descriptor_store_without_the_segment_ends_the_connections_it_kept() {
    let mut manager = Manager::new();
    let store = manager.launch(binaries::program("kvs-front")).start();
    let mut client = store.connect();
    assert_eq!(client.ask(&set(b"key", b"value")).expect("served"), Answer::Stored);
    manager.await_kept(LISTENING.len() + 1);
    let place = kill_all(store);
    fs::remove_file(place.segment()).expect("it was there");
    let program = manager.program();
    let store = manager.launch(program).start_at(place);
    manager.hide();
    assert_eq!(client.read_to_end().expect("ended"), b"");
    manager.await_kept(LISTENING.len());
    store.connect();
}

#[test]
fn descriptor_store_lets_go_what_is_closed_and_all_at_an_orderly_end() {
    let mut manager = Manager::new();
    let store = manager.launch(binaries::program("kvs-front")).start();
    let clients: Vec<Connection> =
        (0..20).map(|which| if which % 2 == 0 { store.connect() } else { store.connect_unix() }).collect();
    let kept = |manager: &mut Manager| {
        manager.listen();
        manager.names().iter().filter(|name| name.starts_with("client-")).count()
    };
    eventually("the clients are kept", SOON, || kept(&mut manager) == clients.len());
    drop(clients);
    eventually("they are let go", SOON, || kept(&mut manager) == 0);
    // The next front server goes on with it.
    store.kill_front();
    let client = store.connect();
    eventually("a client of the next front server is kept", SOON, || kept(&mut manager) == 1);
    drop(client);
    eventually("it is let go", SOON, || kept(&mut manager) == 0);
    assert!(store.place().tools(&["quit"]).status.success());
    let _place = store.await_end();
    manager.listen();
    assert_eq!(manager.names(), Vec::<&str>::new());
}
