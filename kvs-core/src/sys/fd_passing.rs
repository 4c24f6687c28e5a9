//! Descriptors through a unix socket (`SCM_RIGHTS`).
//!
//! One message is one packet of a `SOCK_SEQPACKET` socket: bytes, at least one, with up to
//! [`DESCRIPTORS_PER_MESSAGE_MAX`] descriptors.
//!
//! Invariants
//! - A received descriptor is owned from its first moment (`MSG_CMSG_CLOEXEC`, `OwnedFd`): an error on the way
//!   closes it, a child never inherits it.
//! - A message is received whole or not at all: what was cut short is an error.
//! - The end of the stream is `None`, and it comes after every message the peer had sent, also when the peer died.
//!
//! No lock: the kernel keeps packets of several senders apart. A crash loses only what was not sent yet; what was
//! sent is received by the peer, descriptors included.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::thread;
use std::time::Duration;

use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, RecvMsg, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Most descriptors of one message: the kernel's `SCM_MAX_FD`.
pub const DESCRIPTORS_PER_MESSAGE_MAX: usize = 253;

/// How often, and how long apart, a send is tried again while too many descriptors are under way.
const IN_FLIGHT_RETRIES_MAX: u32 = 5_000;
const IN_FLIGHT_PAUSE: Duration = Duration::from_millis(1);

/// What was received besides the bytes in the caller's buffer.
#[derive(Debug)]
pub struct Received {
    /// Number of bytes, at the start of the buffer.
    pub length: usize,
    /// The descriptors, in the order they were sent.
    pub descriptors: Vec<OwnedFd>,
}

/// Whether to wait when a message cannot be sent or received at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// For as long as it takes.
    Yes,
    /// Not at all: [`PassingError::WouldBlock`].
    No,
}

/// Why a message was not passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PassingError {
    /// Nothing to receive, or no room to send, and the caller does not wait.
    #[error("the socket is not ready")]
    WouldBlock,
    /// The peer has closed its end.
    #[error("the peer closed its end of the socket; it has probably died")]
    Disconnected,
    /// More descriptors than the kernel passes at once.
    #[error(
        "{count} descriptors do not fit one message, which carries {DESCRIPTORS_PER_MESSAGE_MAX}; send several"
    )]
    TooManyDescriptors {
        /// How many were to be sent.
        count: usize,
    },
    /// A message of no bytes looks like the end of the stream.
    #[error("an empty message cannot be told from the end of the stream; send at least one byte")]
    Empty,
    /// The buffer was too small for the message.
    #[error("a message was longer than the {limit} bytes expected; are both servers of the same version?")]
    BytesCut {
        /// Size of the buffer.
        limit: usize,
    },
    /// More descriptors came than were expected, or this process has no room for them.
    #[error(
        "descriptors were lost on the way: more came than expected, or the process has too many open; \
         raise the limit with `ulimit -n`"
    )]
    DescriptorsCut,
    /// What the kernel says.
    #[error("passing a message between the servers failed: {0}")]
    Os(#[from] Errno),
}

/// Sends `bytes` and duplicates of `descriptors` as one message.
///
/// # Errors
/// [`PassingError`]; nothing was sent then.
pub fn send(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
    wait: Wait,
) -> Result<(), PassingError> {
    if bytes.is_empty() {
        return Err(PassingError::Empty);
    }
    let flags = match wait {
        Wait::Yes => SendFlags::NOSIGNAL,
        Wait::No => SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
    };
    let mut retries = 0;
    loop {
        match send_once(socket, bytes, descriptors, flags)? {
            Ok(()) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Err(PassingError::WouldBlock),
            Err(Errno::PIPE | Errno::CONNRESET) => return Err(PassingError::Disconnected),
            // A user may have only so many descriptors under way, unreceived; the peer is about to take them.
            Err(Errno::TOOMANYREFS) if wait == Wait::No => return Err(PassingError::WouldBlock),
            Err(Errno::TOOMANYREFS) if retries < IN_FLIGHT_RETRIES_MAX => {
                retries += 1;
                thread::sleep(IN_FLIGHT_PAUSE);
            }
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn send_once(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
    flags: SendFlags,
) -> Result<Result<(), Errno>, PassingError> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(DESCRIPTORS_PER_MESSAGE_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fits = descriptors.len() <= DESCRIPTORS_PER_MESSAGE_MAX
        && (descriptors.is_empty() || control.push(SendAncillaryMessage::ScmRights(descriptors)));
    if !fits {
        return Err(PassingError::TooManyDescriptors { count: descriptors.len() });
    }
    Ok(sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags).map(|_| ()))
}

/// Receives one message into `buffer`, with at most `descriptors_max` descriptors. `None` at the end of the
/// stream: the peer has closed its end or died, and nothing it sent is left.
///
/// # Errors
/// [`PassingError`]. A message that was cut is gone, its descriptors closed.
pub fn receive(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    descriptors_max: usize,
    wait: Wait,
) -> Result<Option<Received>, PassingError> {
    let limit = buffer.len();
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(DESCRIPTORS_PER_MESSAGE_MAX))];
    let room = match descriptors_max.min(DESCRIPTORS_PER_MESSAGE_MAX) {
        0 => 0,
        count => cmsg_space!(ScmRights(count)),
    };
    let mut control = RecvAncillaryBuffer::new(&mut space[..room]);
    let received = receive_retrying(socket, buffer, &mut control, wait)?;
    // Taken out before anything is refused, so that an error closes them.
    let descriptors = drain(&mut control);
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(PassingError::DescriptorsCut);
    }
    if received.flags.contains(ReturnFlags::TRUNC) {
        return Err(PassingError::BytesCut { limit });
    }
    Ok((received.bytes > 0).then_some(Received { length: received.bytes, descriptors }))
}

fn receive_retrying(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    control: &mut RecvAncillaryBuffer<'_>,
    wait: Wait,
) -> Result<RecvMsg, PassingError> {
    let flags = match wait {
        Wait::Yes => RecvFlags::CMSG_CLOEXEC,
        Wait::No => RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
    };
    loop {
        match recvmsg(socket, &mut [IoSliceMut::new(buffer)], control, flags) {
            Ok(received) => return Ok(received),
            // A peer that dies with our messages unread leaves this error, told once, *before* the messages it
            // had sent itself; those, and then the end, follow.
            Err(Errno::INTR | Errno::CONNRESET) => {}
            Err(Errno::AGAIN) => return Err(PassingError::WouldBlock),
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn drain(control: &mut RecvAncillaryBuffer<'_>) -> Vec<OwnedFd> {
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            descriptors.extend(received);
        }
    }
    descriptors
}

#[cfg(all(test, not(miri)))]
mod tests {
    //! Goal: whole messages, owned descriptors, and a clear end. Method: a socket pair inside the test.

    use std::os::fd::AsFd;

    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).expect("a pair")
    }

    fn receive_some(socket: &OwnedFd, descriptors_max: usize) -> Result<Option<Received>, PassingError> {
        receive(socket.as_fd(), &mut [0; 16], descriptors_max, Wait::No)
    }

    #[test]
    fn passing_descriptors_arrive_in_order_and_close_on_exec() {
        let (left, right) = pair();
        let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
        send(left.as_fd(), b"two", &[reader.as_fd(), writer.as_fd()], Wait::Yes).expect("send");
        let received = receive_some(&right, 2).expect("receive").expect("a message");
        assert_eq!((received.length, received.descriptors.len()), (3, 2));
        assert_eq!(rustix::io::write(&received.descriptors[1], b"x"), Ok(1));
        assert_eq!(rustix::io::read(&reader, &mut [0u8; 4][..]), Ok(1));
        let flags = rustix::io::fcntl_getfd(&received.descriptors[0]).expect("flags");
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    }

    #[test]
    fn passing_most_descriptors_of_a_message_and_one_more() {
        let (left, right) = pair();
        let many = vec![left.as_fd(); DESCRIPTORS_PER_MESSAGE_MAX + 1];
        send(left.as_fd(), b"x", &many[1..], Wait::Yes).expect("send");
        let received =
            receive_some(&right, DESCRIPTORS_PER_MESSAGE_MAX).expect("receive").expect("a message");
        assert_eq!(received.descriptors.len(), DESCRIPTORS_PER_MESSAGE_MAX);
        let refused = send(left.as_fd(), b"x", &many, Wait::Yes);
        assert_eq!(refused, Err(PassingError::TooManyDescriptors { count: 254 }));
    }

    #[test]
    fn passing_cut_messages_are_errors() {
        let (left, right) = pair();
        send(left.as_fd(), &[1; 17], &[], Wait::Yes).expect("send");
        assert_eq!(receive_some(&right, 1).map(|_| ()), Err(PassingError::BytesCut { limit: 16 }));
        send(left.as_fd(), b"x", &[left.as_fd(); 9], Wait::Yes).expect("send");
        assert_eq!(receive_some(&right, 1).map(|_| ()), Err(PassingError::DescriptorsCut));
        send(left.as_fd(), b"x", &[left.as_fd()], Wait::Yes).expect("send");
        assert_eq!(receive_some(&right, 0).map(|_| ()), Err(PassingError::DescriptorsCut));
    }

    #[test]
    fn passing_end_of_stream_comes_after_the_messages_of_a_peer_that_died_with_unread_ones() {
        let (left, right) = pair();
        assert_eq!(receive_some(&right, 0).map(|_| ()), Err(PassingError::WouldBlock));
        send(right.as_fd(), b"never read", &[], Wait::Yes).expect("send");
        send(left.as_fd(), b"last", &[], Wait::Yes).expect("send");
        drop(left);
        assert_eq!(receive_some(&right, 0).expect("receive").map(|received| received.length), Some(4));
        assert!(receive_some(&right, 0).expect("receive").is_none());
        assert_eq!(send(right.as_fd(), b"x", &[], Wait::Yes), Err(PassingError::Disconnected));
    }

    #[test]
    fn passing_an_empty_message_is_refused() {
        let (left, _right) = pair();
        assert_eq!(send(left.as_fd(), b"", &[], Wait::Yes), Err(PassingError::Empty));
    }
}
