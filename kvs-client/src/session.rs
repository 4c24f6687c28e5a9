//! What the server remembers this client by, and what its changes are numbered with.
//!
//! Invariants
//! - A number is given to one change only, whatever becomes of it.
//! - Each connection says that it is a later attempt than the one before, so a server never takes an old one for the new.

use std::io;

use kvs_core::wire::{SESSION_TOKEN_BYTES, SessionToken};
use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};

/// Numbers come round after 2^32. They begin shortly before that, so that every client that lives a while passes the place,
/// and a fault there shows at once instead of after months.
const NUMBER_FIRST: u32 = 1000u32.wrapping_neg();

/// A client's session.
pub struct Session {
    token: SessionToken,
    attempt: u64,
    /// Number of the next change.
    pub next_number: u32,
}

impl Session {
    /// A new one, with a token that nobody can guess.
    pub fn new() -> io::Result<Self> {
        let mut bytes = [0; SESSION_TOKEN_BYTES];
        let mut filled = 0;
        while filled < bytes.len() {
            match getrandom(&mut bytes[filled..], GetRandomFlags::empty()) {
                Ok(count) => filled += count,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(Self { token: SessionToken::new(bytes), attempt: 0, next_number: NUMBER_FIRST })
    }

    /// What the next connection says.
    pub fn attempt(&mut self) -> (SessionToken, u64) {
        self.attempt += 1;
        (self.token, self.attempt)
    }
}
