//! What outlives a front server: the listening sockets, the operator's input, and whose the socket files are.
//!
//! Both servers hold it. As long as one of them lives no port and no socket is closed, and the next front server goes on with
//! the very same: clients that connect meanwhile wait in the kernel's queue.
//!
//! Invariants
//! - The socket files are removed by an orderly end and by nothing else, and only while they are the ones that were made.
//! - All holders share the open files, flags included: the clients' sockets don't wait in `accept`, the operators' one does.

use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;

use kvs_core::control::EstateMark;

use crate::socket_file::SocketFile;

/// The estate.
pub struct Estate {
    /// For TCP clients.
    pub tcp: TcpListener,
    /// For local clients.
    pub unix: UnixListener,
    /// For operators.
    pub console: UnixListener,
    /// Where the operator types, if there is a console on standard input.
    pub input: Option<OwnedFd>,
    /// The file of `unix`.
    pub unix_file: SocketFile,
    /// The file of `console`.
    pub console_file: SocketFile,
}

impl Estate {
    /// What a message tells of it.
    pub fn mark(&self) -> EstateMark {
        EstateMark {
            unix: self.unix_file.mark(),
            console: self.console_file.mark(),
            has_input: self.input.is_some(),
        }
    }

    /// The descriptors that go with the mark.
    pub fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let sockets = [self.tcp.as_fd(), self.unix.as_fd(), self.console.as_fd()];
        sockets.into_iter().chain(self.input.as_ref().map(AsFd::as_fd)).collect()
    }

    /// Takes it out of a message; None when descriptors are missing.
    pub fn receive(mark: EstateMark, descriptors: &mut impl Iterator<Item = OwnedFd>) -> Option<Self> {
        Some(Self {
            tcp: descriptors.next()?.into(),
            unix: descriptors.next()?.into(),
            console: descriptors.next()?.into(),
            input: if mark.has_input { Some(descriptors.next()?) } else { None },
            unix_file: SocketFile::of(mark.unix),
            console_file: SocketFile::of(mark.console),
        })
    }

    /// The same once more.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn try_clone(&self) -> std::io::Result<Self> {
        Ok(Self {
            tcp: self.tcp.try_clone()?,
            unix: self.unix.try_clone()?,
            console: self.console.try_clone()?,
            input: self.input.as_ref().map(OwnedFd::try_clone).transpose()?,
            unix_file: self.unix_file.clone(),
            console_file: self.console_file.clone(),
        })
    }

    /// Takes the socket files away, so that nobody connects to a store that ends.
    pub fn remove_files(&self) {
        self.unix_file.remove();
        self.console_file.remove();
    }
}
