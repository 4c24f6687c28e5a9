//! One data server, from its launch to the proof of its death.
//!
//! Two threads go with it. One receives what it says, and when it says no more waits for its end and reaps it. The other
//! sleeps in the liveness lock of its main thread: a death wakes it long before the kernel has taken the dead process's
//! memory apart and closes its socket.
//!
//! Invariants
//! - Its pid is used by nobody but the thread that reaps it; it is killed through its pidfd, so never another process.
//! - After [`DataServer::fence`] none of its threads runs, and none will.
//!
//! When this process dies, the data server finds its standard input at the end and ends by itself.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context as _;
use kvs_core::control::{self, ControlError, DataMessage, FrontMessage};
use kvs_core::liveness::{LivenessPage, MAIN_SLOT};
use kvs_core::sys::process::ProcessIdentity;
use kvs_front::program;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair, sockopt};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::front::{self, Event, Front};
use crate::link::SEND_PATIENCE;

/// A data server that was launched.
pub struct DataServer {
    /// Tells it from those before and after.
    pub generation: u64,
    /// Its process id.
    pub pid: u32,
    /// When it was launched.
    pub launched: Instant,
    /// The socket to it.
    pub socket: Arc<OwnedFd>,
    process: Arc<OwnedFd>,
    liveness: LivenessPage,
}

impl DataServer {
    /// Launches a data server, with the segment that its predecessor had, and tells it to start.
    ///
    /// # Errors
    /// Why none could be launched; none is left running then.
    pub fn launch(front: &Arc<Front>, generation: u64, segment: Option<&OwnedFd>) -> anyhow::Result<Self> {
        let launched = Instant::now();
        let path = program::find("kvs-data")?;
        let (own, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .context("can't make a socket to the data server")?;
        sockopt::set_socket_timeout(&own, sockopt::Timeout::Send, Some(SEND_PATIENCE))
            .context("can't limit the time to send")?;
        let liveness = LivenessPage::create().context("can't make the liveness page")?;
        let mut child = spawn(&path, front, theirs)?;
        let socket = Arc::new(own);
        let begun = tell_start(front, &socket, &liveness, segment)
            .and_then(|()| open_process(&child))
            .inspect_err(|_| end_unwatched(&mut child));
        let process = Arc::new(begun?);
        let server = Self { generation, pid: child.id(), launched, socket, process, liveness };
        server.receive(front, child)?;
        Ok(server)
    }

    /// The process, to be killed when nobody is left to ask.
    pub fn process(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.process)
    }

    /// Starts the thread that receives.
    fn receive(&self, front: &Arc<Front>, child: Child) -> anyhow::Result<()> {
        let (front, socket, generation) = (Arc::clone(front), Arc::clone(&self.socket), self.generation);
        let receiving = std::thread::Builder::new()
            .name("receive-data".into())
            .spawn(move || receive(&front, &socket, generation, child));
        // The child was moved into the thread that there is not: it can only be killed, its pid stays until this process ends.
        receiving.map(|_| ()).inspect_err(|_| self.kill()).context("can't start a thread for the data server")
    }

    /// Watches for its death, once it has said that it is ready.
    ///
    /// # Errors
    /// When no thread is to be had.
    pub fn watch(&self, front: &Arc<Front>) -> anyhow::Result<()> {
        let (page, events, generation) = (self.liveness.clone(), front.events.clone(), self.generation);
        let watching = std::thread::Builder::new().name("watch-data".into()).spawn(move || {
            match page.await_death(MAIN_SLOT) {
                // The supervisor may have ended.
                Ok(()) => drop(events.send(Event::Dead(generation))),
                Err(error) => log::error!("the data server's death will be noticed late: {error}"),
            }
        });
        watching.map(|_| ()).context("can't start a thread to watch the data server")
    }

    /// Sends it a message without descriptors.
    ///
    /// # Errors
    /// It is dead, or takes nothing.
    pub fn tell(&self, message: &FrontMessage) -> Result<(), ControlError> {
        control::send(self.socket.as_fd(), message, &[])
    }

    /// Kills it.
    pub fn kill(&self) {
        front::kill(&self.process);
    }

    /// Kills it, and returns when each of its threads is proven dead. Its memory and its files may go a little later.
    pub fn fence(&self) {
        self.kill();
        if let Err(error) = self.liveness.await_all_dead() {
            log::error!("{error}; waiting for the whole end of data server {} instead", self.pid);
            await_end(&self.process);
        }
    }
}

fn await_end(process: &OwnedFd) {
    loop {
        let ended = poll(&mut [PollFd::new(process, PollFlags::IN)], None);
        if !matches!(ended, Err(Errno::INTR)) {
            return;
        }
    }
}

fn spawn(path: &Path, front: &Front, socket: OwnedFd) -> anyhow::Result<Child> {
    Command::new(path)
        .arg("--controlled")
        .args(front.options.to_arguments())
        .env_remove("NOTIFY_SOCKET")
        .stdin(Stdio::from(socket))
        .stdout(Stdio::null())
        // A Ctrl-C on the terminal is the front server's to obey.
        .process_group(0)
        .spawn()
        .with_context(|| format!("can't start {}", path.display()))
}

fn open_process(child: &Child) -> anyhow::Result<OwnedFd> {
    // Nobody reaps it before the receiving thread has it: the pid is its own.
    pidfd_open(Pid::from_child(child), PidfdFlags::empty()).context("can't watch the data server's process")
}

fn end_unwatched(child: &mut Child) {
    // It is dead already, or dies now.
    let _ = child.kill();
    let _ = child.wait();
}

fn tell_start(
    front: &Front,
    socket: &OwnedFd,
    liveness: &LivenessPage,
    segment: Option<&OwnedFd>,
) -> anyhow::Result<()> {
    let start = FrontMessage::Start {
        front: ProcessIdentity::current().context("can't learn this process's start time")?,
        tcp_address: front.tcp_address.to_string(),
        unix_path: front.unix_path.display().to_string(),
        relaunched: segment.is_some(),
    };
    let mut descriptors = vec![liveness.as_fd()];
    descriptors.extend(segment.map(AsFd::as_fd));
    control::send(socket.as_fd(), &start, &descriptors).context("can't tell the data server to start")
}

/// Takes what the data server says until it says no more, and its end.
fn receive(front: &Front, socket: &OwnedFd, generation: u64, mut child: Child) {
    loop {
        match control::receive::<DataMessage>(socket.as_fd()) {
            Ok(Some((DataMessage::Closed { connections }, _))) => front.clients.remove(&connections),
            Ok(Some((message @ (DataMessage::Stats { .. } | DataMessage::Clients { .. }), _))) => {
                front.link.answer(message);
            }
            Ok(Some((message, descriptors))) => {
                // The supervisor listens for as long as the process runs; so below.
                let _ = front.events.send(Event::Said(generation, message, descriptors));
            }
            Ok(None) => break,
            Err(error) => {
                log::error!("data server {}: {error}", child.id());
                break;
            }
        }
    }
    let _ = front.events.send(Event::Dead(generation));
    let status = child.wait().ok();
    if let Some(status) = status.filter(|status| !status.success()) {
        log::info!("data server {} has ended: {status}", child.id());
    }
    let _ = front.events.send(Event::Ended(generation, status));
}
