//! A client's requests, served as a worker of the data server serves them: bytes into the input ring, execute, answers out.

use anyhow::{bail, ensure};
use kvs_core::connection::context::{Context, Statistics};
use kvs_core::connection::{Connection, Progress};
use kvs_core::control::{Adopted, StatisticOwned, Transport};
use kvs_core::limits::VALUE_BYTES_MAX_DEFAULT;
use kvs_core::segment::layout::WorkerSlot;
use kvs_core::table::Table;
use kvs_core::wire::{PROTOCOL, Request, RequestBody, Response, ResponseBody, encode_request};

/// Rings the worker keeps.
const RINGS_MAX: u64 = 8;
/// Rounds after which a client is not served but stuck.
const ROUNDS_MAX: usize = 10_000;

/// Number of the connection.
const CONNECTION: u64 = 77;
/// What a client says first.
pub const HELLO: Request<'static> =
    Request { number: 0, body: RequestBody::Hello { protocol: PROTOCOL, name: "stepping", pid: 1 } };
/// What it is answered.
pub const WELCOME: Response<'static> = Response {
    number: 0,
    body: ResponseBody::Welcome {
        protocol: PROTOCOL,
        server: concat!("kvs ", env!("CARGO_PKG_VERSION")),
        connection: CONNECTION,
        value_bytes_max: VALUE_BYTES_MAX_DEFAULT,
    },
};

struct NoStatistics;

impl Statistics for NoStatistics {
    fn statistics(&self) -> Vec<(String, StatisticOwned)> {
        Vec::new()
    }
}

/// A connection and its worker.
pub struct Client<'s> {
    table: &'s Table,
    worker: &'s WorkerSlot,
    context: Context<'s>,
    connection: Connection<'s>,
}

impl<'s> Client<'s> {
    /// On the first connection slot, served by the first worker.
    ///
    /// # Errors
    /// When the connection can't be had.
    pub fn open(table: &'s Table) -> anyhow::Result<Self> {
        let segment = table.segment();
        let worker: &WorkerSlot = segment.memory().object(segment.regions().worker(0))?;
        let context = Context::new(table, worker, &NoStatistics, VALUE_BYTES_MAX_DEFAULT, RINGS_MAX);
        let adopted = Adopted { connection: CONNECTION, transport: Transport::Unix };
        let connection = Connection::open(segment, 0, adopted)?;
        Ok(Self { table, worker, context, connection })
    }

    /// The same, after hello.
    ///
    /// # Errors
    /// When the connection can't be had.
    pub fn greeted(table: &'s Table) -> anyhow::Result<Self> {
        let mut client = Self::open(table)?;
        let mut hello = Vec::new();
        encode_request(&mut hello, &HELLO);
        client.exchange(&hello, &mut Vec::new())?;
        Ok(client)
    }

    /// Sends all of `requests` and takes the answers.
    ///
    /// # Errors
    /// When the data server would end, or the client would wait for ever.
    pub fn exchange(&mut self, requests: &[u8], answers: &mut Vec<u8>) -> anyhow::Result<()> {
        let mut rest = requests;
        for _ in 0..ROUNDS_MAX {
            rest = &rest[self.take_input(rest)?..];
            let progress = self.connection.execute(&mut self.context)?;
            self.flush(answers)?;
            self.connection.rest(&mut self.context)?;
            self.table.collect_garbage(self.worker)?;
            if rest.is_empty() && progress == Progress::NeedsInput && !self.connection.has_output() {
                return Ok(());
            }
        }
        bail!("the client is stuck");
    }

    /// What the kernel does when the socket is read.
    fn take_input(&mut self, bytes: &[u8]) -> anyhow::Result<usize> {
        if bytes.is_empty() {
            return Ok(0);
        }
        let (first, second) = self.connection.input_space(&mut self.context)?;
        let in_first = bytes.len().min(first.len());
        copy(&bytes[..in_first], first);
        let in_second = (bytes.len() - in_first).min(second.len());
        copy(&bytes[in_first..in_first + in_second], second);
        self.connection.received((in_first + in_second) as u64);
        Ok(in_first + in_second)
    }

    /// What the kernel does when the socket is written.
    fn flush(&mut self, answers: &mut Vec<u8>) -> anyhow::Result<()> {
        while self.connection.has_output() {
            let before = answers.len();
            for part in self.connection.pending(&self.context)? {
                answers.extend_from_slice(&part);
            }
            let count = (answers.len() - before) as u64;
            ensure!(count > 0, "there is output, and nothing to send");
            self.connection.sent(&mut self.context, count)?;
        }
        Ok(())
    }

    /// Ends the connection.
    ///
    /// # Errors
    /// When the data server would end.
    pub fn close(mut self) -> anyhow::Result<()> {
        Ok(self.connection.close(&mut self.context)?)
    }
}

/// Copies in short pieces: the C library copies long ones byte by byte, each of which would be an image of its own, and the
/// kernel, whose work this is, does not.
fn copy(from: &[u8], to: &mut [u8]) {
    const PIECE: usize = 256;
    for (from, to) in from.chunks(PIECE).zip(to.chunks_mut(PIECE)) {
        to[..from.len()].copy_from_slice(from);
    }
}
