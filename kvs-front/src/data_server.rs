//! One data server, from its launch, or from when it was inherited, to the proof of its death.
//!
//! Two threads go with it. One receives what it says, and when it says no more waits for its end and reaps it. The other
//! sleeps in the liveness lock of its main thread: a death wakes it long before the kernel has taken the dead process's
//! memory apart and closes its socket.
//!
//! Invariants
//! - Its pid is used by nobody but the thread that reaps it; it is killed through its pidfd, so never another process.
//! - After [`DataServer::fence`] none of its threads runs, and none will.
//! - What it is told first lies in its socket before it is launched. So at whatever moment this process dies, a data server
//!   that lives has all that it needs to launch the next front server, which goes on here with [`DataServer::inherit`].

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use anyhow::Context as _;
use kvs_core::control::{self, ControlError, DataMessage, FrontMessage, Role, Seat};
use kvs_core::liveness::{LivenessPage, MAIN_SLOT};
use kvs_core::sys::launch::{Child, Urgency};
use kvs_core::sys::priority::{self, BREATH};
use kvs_core::sys::process::ProcessIdentity;
use kvs_front::{process, program};
use rustix::net::sockopt;

use crate::clients::Client;
use crate::front::{Event, Front};
use crate::heart::own_identity;
use crate::inherit::InheritedServer;
use crate::link::SEND_PATIENCE;

/// A data server that was launched or inherited.
pub struct DataServer {
    /// Tells it from those before and after.
    pub generation: u64,
    /// Its process id.
    pub pid: u32,
    /// When it was launched, or inherited.
    pub launched: Instant,
    /// The socket to it.
    pub socket: Arc<OwnedFd>,
    process: Arc<OwnedFd>,
    liveness: LivenessPage,
    strangers: Arc<AtomicU32>,
}

/// What a data server is launched for, with what it needs for that.
pub enum Purpose<'a> {
    /// To be the first.
    First,
    /// To be the first since all processes died, but for the clients, whose sockets were kept.
    Inherit,
    /// To take the place of one that died, with the segment and the epolls that it had.
    Succeed(&'a OwnedFd, &'a [OwnedFd]),
    /// To stand by for the one that serves, whose segment this is.
    StandBy(&'a OwnedFd, &'a DataServer),
}

impl DataServer {
    /// Launches a data server, and tells it what for.
    ///
    /// # Errors
    /// Why none could be launched; none is left running then.
    pub fn launch(front: &Arc<Front>, generation: u64, purpose: &Purpose<'_>) -> anyhow::Result<Self> {
        let launched = Instant::now();
        let (own, theirs) = socket_pair().context("can't make a socket to the data server")?;
        let liveness = LivenessPage::create().context("can't make the liveness page")?;
        let link = match purpose {
            Purpose::StandBy(..) => Some(socket_pair().context("can't make a link to the standby")?),
            _ => None,
        };
        tell_start(front, &own, &liveness, (purpose, link.as_ref().map(|(_, its)| its)))?;
        let urgency = match purpose {
            Purpose::StandBy(..) => Urgency::AtLeisure,
            Purpose::First | Purpose::Inherit | Purpose::Succeed(..) => Urgency::Now,
        };
        let (child, process) = program::launch("kvs-data", "--controlled", &front.options, theirs, urgency)?;
        // Nobody reaps it before the receiving thread has it: the pid is its own.
        let pid = child.pid();
        let process = Arc::new(process);
        let identity = ProcessIdentity::of(pid);
        let strangers = Arc::new(AtomicU32::new(0));
        let server = Self { generation, pid, launched, socket: Arc::new(own), process, liveness, strangers };
        server.receive(front, End::OfChild(child))?;
        if let (Purpose::StandBy(_, active), Some((its, _))) = (purpose, link) {
            let standby =
                FrontMessage::Standby { process: identity.context("can't learn the standby's start time")? };
            let descriptors = [its.as_fd(), server.process.as_fd(), server.liveness.as_fd()];
            let told = control::send(active.socket.as_fd(), &standby, &descriptors);
            told.inspect_err(|_| server.kill()).context("can't tell the data server of its standby")?;
        }
        Ok(server)
    }

    /// Goes on with the data server that launched this front server, or with the standby of that one.
    ///
    /// # Errors
    /// When it can't be listened to.
    pub fn inherit(front: &Arc<Front>, generation: u64, inherited: InheritedServer) -> anyhow::Result<Self> {
        let InheritedServer { socket, process, liveness, identity, strangers } = inherited;
        limit_sends(&socket)?;
        let server = Self {
            generation,
            pid: identity.pid,
            launched: Instant::now(),
            socket: Arc::new(socket),
            process: Arc::new(process),
            liveness,
            strangers: Arc::new(AtomicU32::new(strangers)),
        };
        server.receive(front, End::OfAnother(Arc::clone(&server.process)))?;
        Ok(server)
    }

    /// Asks it to introduce all its clients.
    ///
    /// # Errors
    /// It is dead, or takes nothing.
    pub fn ask_for_clients(&self, workers: usize) -> Result<(), ControlError> {
        self.strangers.store(u32::try_from(workers).unwrap_or(u32::MAX), Ordering::Release);
        self.tell(&FrontMessage::Introduce)
    }

    /// The process, to be killed when nobody is left to ask.
    pub fn process(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.process)
    }

    /// Starts the thread that receives.
    fn receive(&self, front: &Arc<Front>, end: End) -> anyhow::Result<()> {
        let receiver = Receiver { end, strangers: Arc::clone(&self.strangers) };
        let (front, socket, generation) = (Arc::clone(front), Arc::clone(&self.socket), self.generation);
        let receiving = std::thread::Builder::new()
            .name("receive-data".into())
            .spawn(move || receiver.run(&front, socket.as_fd(), generation));
        // A child was moved into the thread that there is not: it can only be killed, its pid stays until this process ends.
        receiving.map(|_| ()).inspect_err(|_| self.kill()).context("can't start a thread for the data server")
    }

    /// Watches for its death, once it has said that it is ready.
    ///
    /// # Errors
    /// When no thread is to be had.
    pub fn watch(&self, front: &Arc<Front>) -> anyhow::Result<()> {
        let (page, events, generation) = (self.liveness.clone(), front.events.clone(), self.generation);
        let watching = std::thread::Builder::new().name("watch-data".into()).spawn(move || {
            // The lock goes from one who waits for it to the next, and a standby waits for it as well.
            if let Err(error) = priority::go_first_from_now_on() {
                log::debug!("a death will be noticed a little later: {error}");
            }
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

    /// Tells a standby that another front server launched who watches it now.
    ///
    /// # Errors
    /// It is dead, or takes nothing; or no descriptors are left.
    pub fn introduce_itself(&self, front: &Front, watching: &FrontMessage) -> anyhow::Result<()> {
        let own = process::own().context("can't open this process for the standby")?;
        if let Err(error) =
            control::send(self.socket.as_fd(), watching, &[own.as_fd(), front.liveness.as_fd()])
        {
            log::debug!("can't tell standby {}: {error}", self.pid);
        }
        Ok(())
    }

    /// Kills it.
    pub fn kill(&self) {
        process::kill(self.process.as_fd());
    }

    /// Kills it, and returns when each of its threads is proven dead. Its memory and its files may go a little later.
    pub fn fence(&self) {
        self.kill();
        if let Err(error) = self.liveness.await_all_dead() {
            log::error!("{error}; waiting for the whole end of data server {} instead", self.pid);
            process::await_end(self.process.as_fd());
        }
    }
}

/// Both ends of a socket between two servers. A send at the first waits for room for a moment only, whatever the other does.
fn socket_pair() -> anyhow::Result<(OwnedFd, OwnedFd)> {
    let (limited, other) = control::socket_pair()?;
    limit_sends(&limited)?;
    Ok((limited, other))
}

fn limit_sends(socket: &OwnedFd) -> anyhow::Result<()> {
    let limited = sockopt::set_socket_timeout(socket, sockopt::Timeout::Send, Some(SEND_PATIENCE));
    limited.context("can't limit the time to send")
}

fn tell_start(
    front: &Front,
    socket: &OwnedFd,
    liveness: &LivenessPage,
    (purpose, link): (&Purpose<'_>, Option<&OwnedFd>),
) -> anyhow::Result<()> {
    let estate = front.estate()?;
    let start = FrontMessage::Start {
        front: own_identity()?,
        group: process::own_group(),
        tcp_address: front.tcp_address.to_string(),
        unix_path: front.unix_path.display().to_string(),
        role: match purpose {
            Purpose::First => Role::First,
            Purpose::Inherit => Role::Heir,
            Purpose::Succeed(_, epolls) => {
                Role::Successor { workers: u32::try_from(epolls.len()).unwrap_or(u32::MAX) }
            }
            Purpose::StandBy(..) => Role::Standby,
        },
        estate: estate.mark(),
    };
    let own = process::own().context("can't open this process for the data server")?;
    let mut descriptors = estate.descriptors();
    descriptors.extend([own.as_fd(), front.liveness.as_fd(), liveness.as_fd()]);
    match purpose {
        Purpose::First | Purpose::Inherit => {}
        Purpose::Succeed(segment, epolls) => {
            descriptors.push(segment.as_fd());
            descriptors.extend(epolls.iter().map(AsFd::as_fd));
        }
        Purpose::StandBy(segment, active) => descriptors.extend([segment.as_fd(), active.liveness.as_fd()]),
    }
    descriptors.extend(link.map(AsFd::as_fd));
    control::send(socket.as_fd(), &start, &descriptors).context("can't tell the data server to start")
}

/// How the end of a data server is learnt.
enum End {
    /// It is reaped.
    OfChild(Child),
    /// Its parent reaps it.
    OfAnother(Arc<OwnedFd>),
}

impl End {
    /// Waits for it. One that has not ended of its own accord is still to be reaped, for which nobody waits.
    fn wait(self) -> (Option<ExitStatus>, Option<Child>) {
        match self {
            End::OfChild(child) => match child.await_end() {
                Ok(status) if status.code().is_none() => (Some(status), Some(child)),
                _ => (child.wait().ok(), None),
            },
            End::OfAnother(process) => {
                process::await_end(process.as_fd());
                (None, None)
            }
        }
    }
}

/// Takes what a data server says until it says no more, and its end.
struct Receiver {
    end: End,
    /// Workers of it that have not introduced all their clients yet.
    strangers: Arc<AtomicU32>,
}

impl Receiver {
    fn run(mut self, front: &Front, socket: BorrowedFd<'_>, generation: u64) {
        loop {
            match control::receive::<DataMessage>(socket) {
                Ok(Some((message, descriptors))) => self.take(front, generation, message, descriptors),
                Ok(None) => break,
                // The data server is none the worse for it, and launches another front server.
                Err(error) if self.strangers.load(Ordering::Acquire) > 0 => {
                    _ = front.events.send(Event::Unable(error.to_string()))
                }
                Err(error) => {
                    log::error!("data server: {error}");
                    break;
                }
            }
        }
        // The supervisor listens for as long as the process runs; so below.
        let _ = front.events.send(Event::Dead(generation));
        let (status, killed) = self.end.wait();
        if let Some(status) = status.filter(|status| !status.success()) {
            log::info!("the data server has ended: {status}");
        }
        let _ = front.events.send(Event::Ended(generation, status));
        killed.into_iter().for_each(process::reap);
    }

    fn take(&mut self, front: &Front, generation: u64, message: DataMessage, descriptors: Vec<OwnedFd>) {
        match message {
            DataMessage::Closed { connections } => front.clients.remove(&connections),
            DataMessage::Stats { .. } | DataMessage::Clients { .. } => front.link.answer(message),
            DataMessage::Introduce { connections, last } => {
                for (Seat { adopted, .. }, socket) in connections.into_iter().zip(descriptors) {
                    let client = Client { transport: adopted.transport, socket: Arc::new(socket) };
                    front.clients.introduce(adopted.connection, client, generation);
                }
                let strangers = self.strangers.load(Ordering::Acquire);
                if last && strangers > 0 {
                    self.strangers.store(strangers - 1, Ordering::Release);
                    if strangers == 1 {
                        let _ = front.events.send(Event::Introduced);
                    }
                }
            }
            DataMessage::Holds { connections } => {
                front.clients.hold(&connections, generation);
                // There may be many more, while clients wait for their answers.
                std::thread::sleep(BREATH);
            }
            DataMessage::Epolls { .. } => front.clients.keep_epolls(descriptors),
            DataMessage::Quit => _ = front.events.send(Event::Quit),
            message => _ = front.events.send(Event::Said(generation, message, descriptors)),
        }
    }
}
