//! What differs between the stores that are asked: how a request is written, and how an answer is found among bytes.
//!
//! All else is the same code for all of them, see [`driver`](super::driver). Requests are made from templates, so that making one
//! is a copy and ten digits; of answers, those expected are known by their first bytes.

use std::os::fd::BorrowedFd;

use crate::bench::workload::{Workload, write_key};

/// Numbers that requests on a connection carry go from 1 to this, and begin anew: a byte in every encoding.
pub const NUMBER_MAX: u8 = 127;

/// How one kind of store is talked to, with keys and values of fixed lengths.
pub trait Protocol: Send + Sync {
    /// Says what has to be said first on a new connection, which still blocks.
    ///
    /// # Errors
    /// The store refuses, in its words.
    fn greet(&self, socket: BorrowedFd<'_>) -> anyhow::Result<()>;

    /// Appends a request for the value of a key.
    fn ask_read(&self, output: &mut Vec<u8>, number: u8, index: u64);

    /// Appends a request to store a value.
    fn ask_write(&self, output: &mut Vec<u8>, number: u8, index: u64, value: &[u8]);

    /// The answer that `input` begins with, to the request with this number; None when it isn't whole yet.
    ///
    /// # Errors
    /// What came is no answer to that, in words for a person.
    fn answer<'i>(&self, input: &'i [u8], number: u8) -> Result<Option<Answer<'i>>, String>;
}

/// An answer, and how many bytes it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer<'i> {
    /// Its bytes.
    pub length: usize,
    /// What it says.
    pub body: Body<'i>,
}

/// What an answer says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body<'i> {
    /// The value of the key.
    Value(&'i [u8]),
    /// There is no such key.
    Missing,
    /// The value is stored.
    Stored,
}

/// A request without its value, to be filled in.
#[derive(Debug, Clone)]
pub struct Template {
    bytes: Vec<u8>,
    key_at: usize,
    key_bytes: usize,
}

impl Template {
    /// Of bytes that have the key of number 0 at `key_at`.
    pub fn new(bytes: Vec<u8>, key_at: usize, workload: &Workload) -> Self {
        Self { bytes, key_at, key_bytes: workload.key_bytes }
    }

    /// Appends the request for the key with this number; where it begins.
    #[inline]
    pub fn append(&self, output: &mut Vec<u8>, index: u64) -> usize {
        let from = output.len();
        output.extend_from_slice(&self.bytes);
        let key_at = from + self.key_at;
        write_key(index, &mut output[key_at..key_at + self.key_bytes]);
        from
    }
}

/// The bytes of key number 0.
pub fn first_key(workload: &Workload) -> Vec<u8> {
    vec![b'0'; workload.key_bytes]
}
