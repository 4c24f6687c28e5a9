//! Taking the place of a front server that died: what the data server, which launched this process, hands over.

use std::os::fd::OwnedFd;

use anyhow::{Context as _, bail};
use kvs_core::control::{self, DataMessage};
use kvs_core::liveness::LivenessPage;
use kvs_core::sys::process::ProcessIdentity;
use kvs_front::estate::Estate;
use rustix::fd::AsFd;
use rustix::process::Pid;

/// A data server that lives already.
pub struct InheritedServer {
    /// The socket to it.
    pub socket: OwnedFd,
    /// Its process.
    pub process: OwnedFd,
    /// Its liveness page.
    pub liveness: LivenessPage,
    /// Who it is.
    pub identity: ProcessIdentity,
    /// Its workers, if each of them introduces its clients.
    pub strangers: u32,
}

/// All that a front server was.
pub struct Inherited {
    /// The data server that serves.
    pub server: InheritedServer,
    /// Its standby.
    pub standby: Option<InheritedServer>,
    /// The segment.
    pub segment: OwnedFd,
}

impl Inherited {
    /// Takes it from standard input, with the estate.
    ///
    /// # Errors
    /// When there is no data server, or one of another release.
    pub fn receive() -> anyhow::Result<(Estate, Self)> {
        let socket = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)
            .context("standard input is no socket; --inherited is for the data server's use")?;
        let received = control::receive::<DataMessage>(socket.as_fd())
            .context("--inherited is for the data server's use")?;
        let Some((DataMessage::Inherit { process: data, group, workers, estate, standby }, descriptors)) =
            received
        else {
            bail!("the data server is gone, or began with something else than Inherit");
        };
        let mut descriptors = descriptors.into_iter();
        let estate = Estate::receive(estate, &mut descriptors);
        let mut next = || descriptors.next().context("a descriptor is missing from Inherit");
        let liveness = LivenessPage::attach(next()?).context("can't map the liveness page")?;
        let process = next()?;
        let server = InheritedServer { socket, process, liveness, identity: data, strangers: workers };
        let segment = next()?;
        let standby = match standby {
            None => None,
            Some(identity) => {
                let (socket, process, page) = (next()?, next()?, next()?);
                let liveness = LivenessPage::attach(page).context("can't map the standby's liveness page")?;
                Some(InheritedServer { socket, process, liveness, identity, strangers: 0 })
            }
        };
        let inherited = Self { server, standby, segment };
        join_group(group);
        Ok((estate.context("a listening socket is missing from Inherit")?, inherited))
    }
}

/// Joins the job of the shell that the dead one belonged to, so that its terminal's Ctrl-C and console go on to be this one's
/// while the job has the terminal. Without a terminal it makes no difference; a job that is over can't be joined.
fn join_group(group: u32) {
    if let Some(group) = i32::try_from(group).ok().and_then(Pid::from_raw) {
        let joined = rustix::process::setpgid(None, Some(group));
        log::debug!("joining process group {group}: {joined:?}");
    }
}
