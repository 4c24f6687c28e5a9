//! How far a client's stream got, from the kernel, after whoever served it died: what was taken from the socket, and what was put
//! into it.
//!
//! TCP counts both ways itself. Bytes received count when they arrive, so what still lies in the queue is taken off; bytes sent
//! count when they are acknowledged, so what isn't yet is added. A FIN counts as one byte each way. Packets go on arriving
//! between the calls: they are made again until nothing moved in between.
//!
//! A unix socket counts nothing, but it has a *peek offset*, which every `recv` lowers by what it took: set to a large number once,
//! it is a counter of the input. Output is counted by [`super::counted_send`].
//!
//! Invariants: every thread that used the socket is dead, and nobody uses it until the positions are noted.
//!
//! Sources: `tcp_get_info`, `tcp_inq` and `tcp_ioctl` in Linux's net/ipv4/tcp.c, `sk_peek_offset_bwd` in include/net/sock.h.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;

/// What the peek offset is set to.
const PEEK_START: i32 = i32::MAX;
/// A unix socket's counter is set anew after so many bytes, long before it ends.
pub const PEEK_RENEW_BYTES: u64 = 1 << 30;
/// Rounds after which a connection on which something always moves is given up.
const ROUNDS_MAX: usize = 10_000;

/// How far a TCP stream got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TcpPositions {
    /// Bytes of input taken from the socket.
    pub received: u64,
    /// Bytes of output given to it.
    pub sent: u64,
    /// The connection is over: nothing will come or go any more, and the counts may be one too high.
    pub closed: bool,
}

/// The beginning of Linux's `struct tcp_info`, up to the last field that is needed.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct TcpInfo {
    state: u8,
    small: [u8; 7],
    various: [u32; 24],
    pacing_rate: u64,
    max_pacing_rate: u64,
    bytes_acked: u64,
    bytes_received: u64,
}

const _: () = assert!(size_of::<TcpInfo>() == 136);

// States of a TCP connection, from Linux's include/net/tcp_states.h.
const FIN_WAIT1: u8 = 4;
const FIN_WAIT2: u8 = 5;
const TIME_WAIT: u8 = 6;
const CLOSE: u8 = 7;
const CLOSE_WAIT: u8 = 8;
const LAST_ACK: u8 = 9;
const CLOSING: u8 = 11;

/// Reads how far a TCP stream got.
///
/// # Errors
/// What the kernel says: the socket is none of TCP.
pub fn tcp(socket: BorrowedFd<'_>) -> rustix::io::Result<TcpPositions> {
    for _ in 0..ROUNDS_MAX {
        let before = tcp_info(socket)?;
        let waiting = queue(socket, libc::FIONREAD)?;
        let unacknowledged = queue(socket, libc::TIOCOUTQ)?;
        let after = tcp_info(socket)?;
        let moved = before.bytes_acked != after.bytes_acked
            || before.bytes_received != after.bytes_received
            || before.state != after.state;
        if moved {
            continue;
        }
        let peer_ended = matches!(after.state, CLOSE_WAIT | LAST_ACK | CLOSING | TIME_WAIT);
        let ended = matches!(after.state, FIN_WAIT1 | FIN_WAIT2 | LAST_ACK | CLOSING | TIME_WAIT);
        return Ok(TcpPositions {
            received: (after.bytes_received - u64::from(peer_ended)).saturating_sub(waiting),
            sent: (after.bytes_acked + unacknowledged).saturating_sub(u64::from(ended)),
            closed: after.state == CLOSE,
        });
    }
    Err(Errno::BUSY)
}

/// Begins to count the input of a unix socket of which everything that was taken is known.
///
/// # Errors
/// What the kernel says: the socket is none of these.
pub fn begin_to_count_unix(socket: BorrowedFd<'_>) -> rustix::io::Result<()> {
    let value = PEEK_START;
    // SAFETY: the option's value is an int that lives through the call.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            (&raw const value).cast(),
            size_of::<i32>() as libc::socklen_t,
        )
    };
    if set == 0 { Ok(()) } else { Err(last_error()) }
}

/// Bytes of input taken from a unix socket since they were begun to be counted.
///
/// # Errors
/// What the kernel says, or nobody counts.
pub fn unix_received(socket: BorrowedFd<'_>) -> rustix::io::Result<u64> {
    let mut value = 0i32;
    option(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF, &mut value)?;
    u64::try_from(value).map(|left| PEEK_START as u64 - left).map_err(|_| Errno::INVAL)
}

fn tcp_info(socket: BorrowedFd<'_>) -> rustix::io::Result<TcpInfo> {
    let mut info = TcpInfo::default();
    option(socket, libc::IPPROTO_TCP, libc::TCP_INFO, &mut info)?;
    Ok(info)
}

/// Reads a socket option of a type that any bytes are a value of.
fn option<T: Copy + Default>(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    name: libc::c_int,
    value: &mut T,
) -> rustix::io::Result<()> {
    let mut length = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes; only plain numbers are read here, of which any bytes are one.
    let got = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, name, (&raw mut *value).cast(), &raw mut length)
    };
    match got {
        0 if length as usize == size_of::<T>() => Ok(()),
        // An older kernel that knows less.
        0 => Err(Errno::NOPROTOOPT),
        _ => Err(last_error()),
    }
}

/// Bytes in one of the socket's queues.
fn queue(socket: BorrowedFd<'_>, which: libc::Ioctl) -> rustix::io::Result<u64> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: both requests write one int.
    if unsafe { libc::ioctl(socket.as_raw_fd(), which, &raw mut bytes) } != 0 {
        return Err(last_error());
    }
    u64::try_from(bytes).map_err(|_| Errno::INVAL)
}

fn last_error() -> Errno {
    Errno::from_raw_os_error(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO))
}

#[cfg(all(test, not(miri), not(feature = "shuttle")))]
mod tests {
    //! Goal: the positions are what was really taken and given, in every state of the connection that a client can bring about.
    //! Method: a connection inside the test, whose every byte is known.

    use std::io::{Read as _, Write as _};
    use std::net::{Shutdown, TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::time::{Duration, Instant};

    use rustix::net::sockopt;

    use super::*;

    /// The far end and the near end.
    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        sockopt::set_socket_oobinline(&listener, true).expect("set");
        let far = TcpStream::connect(listener.local_addr().expect("bound")).expect("listening");
        (far, listener.accept().expect("connected").0)
    }

    /// The positions once they are as expected: what the far end did takes a moment to arrive.
    fn assert_soon(near: &TcpStream, expected: (u64, u64)) {
        let until = Instant::now() + Duration::from_secs(10);
        loop {
            let found = tcp(near.as_fd()).expect("a TCP socket");
            if (found.received, found.sent) == expected {
                return;
            }
            assert!(Instant::now() < until, "{found:?}, not {expected:?}");
            std::thread::yield_now();
        }
    }

    /// Waits until the near end knows that it, or the far one, has sent its last byte.
    fn await_state(near: &TcpStream, end: usize) {
        let ended: &[u8] = match end {
            0 => &[CLOSE_WAIT, LAST_ACK, CLOSING, TIME_WAIT, CLOSE],
            _ => &[FIN_WAIT1, FIN_WAIT2, LAST_ACK, CLOSING, TIME_WAIT, CLOSE],
        };
        let until = Instant::now() + Duration::from_secs(10);
        while !ended.contains(&tcp_info(near.as_fd()).expect("a TCP socket").state) {
            assert!(Instant::now() < until);
            std::thread::yield_now();
        }
    }

    #[test]
    fn stream_positions_of_tcp_are_exact_whatever_is_queued() {
        let (mut far, mut near) = pair();
        assert_soon(&near, (0, 0));
        far.write_all(&[1; 1000]).expect("open");
        near.read_exact(&mut [0; 300]).expect("sent");
        near.write_all(&[2; 500]).expect("open");
        assert_soon(&near, (300, 500));
        far.read_exact(&mut [0; 100]).expect("sent");
        assert_soon(&near, (300, 500));
        near.set_nonblocking(true).expect("set");
        let mut sent = 500;
        while let Ok(count) = near.write(&[3; 100_000]) {
            sent += count as u64;
        }
        assert_soon(&near, (300, sent));
    }

    #[test]
    fn stream_positions_of_tcp_leave_both_ends_out() {
        for (far_first, unread) in [(true, 0), (true, 200), (false, 0), (false, 200)] {
            let (mut far, mut near) = pair();
            far.write_all(&[1; 700]).expect("open");
            near.read_exact(&mut vec![0; 700 - unread]).expect("sent");
            near.write_all(&[2; 50]).expect("open");
            let expected = (700 - unread as u64, 50);
            let ends = [&far, &near];
            for end in if far_first { [0, 1] } else { [1, 0] } {
                assert_soon(&near, expected);
                ends[end].shutdown(Shutdown::Write).expect("open");
                await_state(&near, end);
                let found = tcp(near.as_fd()).expect("a TCP socket");
                assert!(found.closed || (found.received, found.sent) == expected, "{found:?}");
            }
        }
    }

    #[test]
    fn stream_positions_of_tcp_survive_urgent_data_and_a_reset() {
        let (mut far, mut near) = pair();
        far.write_all(&[1; 10]).expect("open");
        rustix::net::send(&far, &[9], rustix::net::SendFlags::OOB).expect("open");
        far.write_all(&[1; 10]).expect("open");
        sockopt::set_socket_oobinline(&near, true).expect("set");
        near.read_exact(&mut [0; 15]).expect("sent");
        assert_soon(&near, (15, 0));
        sockopt::set_socket_linger(&far, Some(Duration::ZERO)).expect("set");
        drop(far);
        let until = Instant::now() + Duration::from_secs(10);
        while !tcp(near.as_fd()).expect("a TCP socket").closed {
            assert!(Instant::now() < until);
            std::thread::yield_now();
        }
        assert_soon(&near, (15, 0));
    }

    #[test]
    fn stream_positions_of_a_unix_socket_count_what_was_taken() {
        let (mut far, mut near) = UnixStream::pair().expect("a pair");
        assert!(unix_received(near.as_fd()).is_err(), "nobody counts");
        begin_to_count_unix(near.as_fd()).expect("a unix socket");
        far.write_all(&[1; 100]).expect("open");
        far.write_all(&[1; 900]).expect("open");
        near.read_exact(&mut [0; 350]).expect("sent");
        assert_eq!(unix_received(near.as_fd()), Ok(350));
        drop(far);
        near.read_exact(&mut [0; 650]).expect("sent");
        assert_eq!(near.read(&mut [0; 10]).expect("the end"), 0);
        assert_eq!(unix_received(near.as_fd()), Ok(1000));
        begin_to_count_unix(near.as_fd()).expect("a unix socket");
        assert_eq!(unix_received(near.as_fd()), Ok(0));
    }
}
