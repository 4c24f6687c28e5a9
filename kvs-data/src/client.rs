//! A client: its socket and its connection. One `recv`, all that can be executed, one `send`.

use std::io::IoSliceMut;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use kvs_core::connection::context::Context;
use kvs_core::connection::{Connection, Fatal, Progress};
use kvs_core::control::Transport;
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, recv, recvmsg, send, sendmsg,
};

/// Rounds of executing and sending before other clients get their turn.
const ROUNDS_MAX: usize = 32;
/// Bytes sent to a client before other clients get their turn.
const TURN_BYTES_MAX: usize = 1 << 20;

/// What is to become of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It is waited for.
    Stays,
    /// It is served on when the backup file has come further.
    Waits,
    /// It was told why it can't be served; it may read that before it is closed.
    Lingers,
    /// It is closed.
    Ends,
}

/// A client.
pub struct Client<'s> {
    socket: OwnedFd,
    connection: Connection<'s>,
    /// The client has sent its last byte.
    at_end: bool,
    /// The answers it gets are the last.
    ending: bool,
    /// What it is waited for.
    interest: EventFlags,
    /// It was served since somebody last looked.
    busy: bool,
    /// Its answers are sent when the backup ring is on disk up to here.
    held_until: Option<u64>,
    /// It has a change for which the backup ring had no room.
    parked: bool,
    /// Its answers are of a data server that died, and may not be on disk.
    held_back: bool,
    /// What is to be had of its input was taken already in this wave; whether the connection is sound.
    taken: Option<bool>,
    /// That was executed already, but not answered, and came to this.
    executed: Option<Progress>,
    /// When it is closed at the latest.
    pub linger_until: Option<Instant>,
}

impl<'s> Client<'s> {
    /// A client that was just adopted, or one that a data server served that died; it is waited for to speak.
    pub fn new(socket: OwnedFd, connection: Connection<'s>, context: &Context<'s>) -> Self {
        let interest = EventFlags::IN;
        Self {
            socket,
            at_end: connection.has_input_ended(),
            ending: false,
            interest,
            busy: true,
            held_until: None,
            parked: false,
            held_back: context.waits_for_sync() && connection.has_output(),
            taken: None,
            executed: None,
            linger_until: None,
            connection,
        }
    }

    /// Whether there is something to do for it before it speaks.
    pub fn is_pending(&self) -> bool {
        let connection = &self.connection;
        self.at_end || connection.has_output() || connection.has_input() || connection.is_refused()
    }

    /// Whether it waits for what the data server before had changed.
    pub fn is_held_back(&self) -> bool {
        self.held_back
    }

    /// Whether it is the backup file that it waits for.
    pub fn waits_for_backup(&self, context: &Context<'s>) -> bool {
        self.held_until.is_some_and(|position| !context.is_synced(position))
            || (self.parked && !context.may_change())
            || (self.held_back && !context.is_inheritance_synced())
    }

    /// How far the backup file must come before its answers are sent.
    pub fn held_until(&self) -> Option<u64> {
        self.held_until
    }

    /// Whether it waits for room in the backup ring.
    pub fn is_parked(&self) -> bool {
        self.parked
    }

    /// The connection.
    pub fn connection(&self) -> &Connection<'s> {
        &self.connection
    }

    /// What it is waited for.
    pub fn interest(&self) -> EventFlags {
        self.interest
    }

    /// Takes what came, and has it looked at together with what came of others, if it is input that the client is waited for. It is
    /// the wave's `place`th.
    ///
    /// # Errors
    /// [`Fatal`].
    pub fn join_wave(&mut self, context: &mut Context<'s>, place: usize) -> Result<(), Fatal> {
        if self.interest != EventFlags::IN || self.at_end || self.connection.has_output() {
            return Ok(());
        }
        context.joins_wave(self.connection.index(), place);
        context.serves(self.connection.index());
        self.taken = Some(self.take_input(context)?);
        context.serves_nobody();
        self.connection.add_to_wave(context)
    }

    /// Executes what was taken in the wave, and sends nothing yet.
    ///
    /// # Errors
    /// [`Fatal`].
    pub fn execute_taken(&mut self, context: &mut Context<'s>) -> Result<(), Fatal> {
        if self.taken == Some(true) {
            self.executed = Some(self.execute(context)?);
        }
        Ok(())
    }

    /// Executes what came, unless that was done, and sends the answers.
    ///
    /// # Errors
    /// [`Fatal`].
    pub fn serve(&mut self, context: &mut Context<'s>) -> Result<Fate, Fatal> {
        if self.executed.is_none() {
            if self.waits_for_backup(context) {
                return Ok(self.wait());
            }
            (self.held_until, self.parked, self.held_back) = (None, false, false);
        }
        context.serves(self.connection.index());
        let fate = self.serve_turn(context);
        context.serves_nobody();
        fate
    }

    fn serve_turn(&mut self, context: &mut Context<'s>) -> Result<Fate, Fatal> {
        let is_sound = match self.taken.take() {
            Some(is_sound) => is_sound,
            None => self.connection.has_output() || self.at_end || self.take_input(context)?,
        };
        if !is_sound {
            return Ok(Fate::Ends);
        }
        self.busy = true;
        // Its turn being over with something left to do counts as blocked: the socket is waited for to take output,
        // which it is at once when it can.
        let mut blocked = true;
        let mut budget = TURN_BYTES_MAX;
        for _ in 0..ROUNDS_MAX {
            let progress = match self.executed.take() {
                Some(progress) => progress,
                None => self.execute(context)?,
            };
            if self.held_until.is_some() {
                return Ok(self.wait());
            }
            match self.flush(context, &mut budget)? {
                Flushed::All if progress == Progress::NeedsOutput => {}
                Flushed::All if self.parked => return Ok(self.wait()),
                Flushed::All => {
                    blocked = progress == Progress::GivesWay;
                    break;
                }
                Flushed::Some => break,
                Flushed::Broken => return Ok(Fate::Ends),
            }
        }
        self.connection.rest(context)?;
        Ok(self.fate(blocked))
    }

    /// Executes what there is, and notes what its answers, or the rest of it, have to wait for.
    fn execute(&mut self, context: &mut Context<'s>) -> Result<Progress, Fatal> {
        let before = context.ring_head();
        let progress = self.connection.execute(context)?;
        let after = context.ring_head();
        if after != before && context.waits_for_sync() {
            self.held_until = Some(after);
        }
        self.parked = progress == Progress::NeedsBackup;
        Ok(progress)
    }

    /// Nothing of the client is listened to meanwhile.
    fn wait(&mut self) -> Fate {
        self.interest = EventFlags::empty();
        Fate::Waits
    }

    /// Gives its buffers back if it was silent since this was called last.
    ///
    /// # Errors
    /// [`Fatal`].
    pub fn cool(&mut self, context: &mut Context<'s>) -> Result<(), Fatal> {
        if std::mem::take(&mut self.busy) { Ok(()) } else { self.connection.give_back_rings(context) }
    }

    fn fate(&mut self, blocked: bool) -> Fate {
        let unsent = blocked || self.connection.has_output();
        self.interest = if unsent { EventFlags::OUT } else { EventFlags::IN };
        if unsent {
            return Fate::Stays;
        }
        if self.at_end || self.ending || self.connection.is_exhausted() {
            return Fate::Ends;
        }
        if self.connection.is_refused() {
            if self.linger_until.is_none() {
                // The client sees the end after the error, and its own last words don't turn it into a reset.
                let _ = rustix::net::shutdown(&self.socket, Shutdown::Write);
            }
            return Fate::Lingers;
        }
        Fate::Stays
    }

    /// From now on nothing more is read; it ends when all answers are sent.
    ///
    /// # Errors
    /// [`Fatal`].
    pub fn finish(&mut self, context: &mut Context<'s>) -> Result<Fate, Fatal> {
        self.at_end = true;
        self.ending = true;
        self.serve(context)
    }

    /// Takes what the kernel has, as far as the ring has room; false when the connection is broken.
    fn take_input(&mut self, context: &mut Context<'s>) -> Result<bool, Fatal> {
        if self.connection.must_count_anew() && self.connection.count_input(self.socket.as_fd()).is_err() {
            return Ok(false);
        }
        let (first, second) = self.connection.input_space(context)?;
        if first.is_empty() {
            return Ok(true);
        }
        match receive(self.socket.as_fd(), first, second) {
            Ok(0) => {
                self.at_end = true;
                self.connection.input_ended();
            }
            Ok(count) => self.connection.received(count as u64),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => return Ok(false),
        }
        Ok(true)
    }

    fn flush(&mut self, context: &mut Context<'s>, budget: &mut usize) -> Result<Flushed, Fatal> {
        while self.connection.has_output() {
            if *budget == 0 {
                return Ok(Flushed::Some);
            }
            let pending = self.connection.pending(context)?;
            let parts = &pending[..pending.iter().take_while(|part| !part.is_empty()).count()];
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            let sent = match (self.connection.transport(), parts) {
                (Transport::Unix, parts) => {
                    context.send_counted(self.connection.sent_so_far(), self.socket.as_fd(), parts)
                }
                (Transport::Tcp, [whole]) => send(&self.socket, whole, flags),
                (Transport::Tcp, parts) => {
                    sendmsg(&self.socket, parts, &mut SendAncillaryBuffer::default(), flags)
                }
            };
            match sent {
                Ok(count) => {
                    self.connection.sent(context, count as u64)?;
                    *budget = budget.saturating_sub(count);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(Flushed::Some),
                Err(_) => return Ok(Flushed::Broken),
            }
        }
        Ok(Flushed::All)
    }

    /// Closes the socket, through all its duplicates, and frees all it holds.
    ///
    /// # Errors
    /// [`Fatal`].
    pub fn close(self, context: &mut Context<'s>) -> Result<(), Fatal> {
        // It may be closed already from the other side.
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
        self.connection.close(context)
    }
}

impl AsFd for Client<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

enum Flushed {
    All,
    Some,
    Broken,
}

fn receive(socket: BorrowedFd<'_>, first: &mut [u8], second: &mut [u8]) -> Result<usize, Errno> {
    if second.is_empty() {
        return recv(socket, first, RecvFlags::DONTWAIT).map(|(_, count)| count);
    }
    let mut parts = [IoSliceMut::new(first), IoSliceMut::new(second)];
    recvmsg(socket, &mut parts, &mut RecvAncillaryBuffer::default(), RecvFlags::DONTWAIT)
        .map(|message| message.bytes)
}
