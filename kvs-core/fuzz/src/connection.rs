//! What a connection makes of a client's bytes.

use kvs_core::check;
use kvs_core::connection::context::{Context, Statistics};
use kvs_core::connection::{Connection, Fatal, Progress, slot};
use kvs_core::control::{Adopted, StatisticOwned, Transport};
use kvs_core::limits::CAPACITY_BYTES_MIN;
use kvs_core::segment::layout::ConnectionSlot;
use kvs_core::segment::{Segment, SegmentView};
use kvs_core::session::Sessions;
use kvs_core::table::Table;
use kvs_core::wire::{self, FRAME_HEADER_BYTES, PROTOCOL, Request, RequestBody, SessionToken};

use super::worker;

/// Who is connected.
pub const ADOPTED: Adopted = Adopted { connection: 1, transport: Transport::Tcp };

/// Says nothing of the store.
pub struct NoStatistics;

impl Statistics for NoStatistics {
    fn statistics(&self) -> Vec<(String, StatisticOwned)> {
        Vec::new()
    }
}

/// Bits of the first byte of the input.
const NO_HELLO: u8 = 1;
const IN_PIECES: u8 = 2;
const READS_SLOWLY: u8 = 4;
const SERVER_DIES: u8 = 8;
const IN_SESSION: u8 = 16;

/// Bytes from a client, behind a Hello or not, in a session or not, in pieces or not, as the first byte says. The answers are frames, and the segment
/// is sound before and after the end, whether the connection is closed or its data server dies.
pub fn connection(input: &[u8]) {
    let Some((&how, bytes)) = input.split_first() else { return };
    let segment = Segment::on_heap(CAPACITY_BYTES_MIN).expect("heap memory");
    segment.claim_worker(0).expect("heap memory");
    let table = Table::new(&segment).expect("just made");
    let sessions = Sessions::default();
    let context = Context::new(&table, worker(&segment), &NoStatistics, 1 << 20, 8);
    let mut context = context.with_sessions(&sessions);
    let mut connection = Connection::open(&segment, 0, ADOPTED).expect("room");
    let mut stream = if how & NO_HELLO == 0 { hello() } else { Vec::new() };
    if how & IN_SESSION != 0 {
        stream.extend_from_slice(&join(1));
    }
    stream.extend_from_slice(bytes);
    let mut peer = Peer::new(how);
    peer.talk(&mut connection, &mut context, &stream).expect("sound");
    assert!(!peer.is_stuck, "it neither takes nor gives, and is not done");
    assert_frames(&peer.answers, connection.is_refused());
    assert_sound(&segment);
    if how & SERVER_DIES == 0 {
        connection.close(&mut context).expect("sound");
    } else {
        drop(connection);
        let left: &ConnectionSlot = segment.memory().object(segment.regions().connection(0)).expect("inside");
        slot::release(&segment, worker(&segment), left).expect("sound");
    }
    table.collect_garbage(worker(&segment)).expect("sound");
    assert_sound(&segment);
}

fn assert_sound(segment: &Segment) {
    let report = check::check_view(&SegmentView::of(segment)).expect("a header");
    assert!(report.faults.is_empty(), "{:?}", report.faults);
}

/// The frame that begins a conversation.
pub fn hello() -> Vec<u8> {
    let mut frame = Vec::new();
    let body = RequestBody::Hello { protocol: PROTOCOL, name: "fuzz", pid: 1 };
    wire::encode_request(&mut frame, &Request { number: 0, body });
    frame
}

/// The frame with which a client joins its session, as its connection number `attempt`.
pub fn join(attempt: u64) -> Vec<u8> {
    let mut frame = Vec::new();
    let body = RequestBody::Session { token: SessionToken::new(*b"sixteen of bytes"), attempt };
    wire::encode_request(&mut frame, &Request { number: 0, body });
    frame
}

/// The other end: it sends and reads as the kernel would let it, and keeps what it was answered.
pub struct Peer {
    how: u8,
    random: u64,
    answers: Vec<u8>,
    /// There was nothing to send, nothing was taken, and yet the end was not reached.
    pub is_stuck: bool,
}

impl Peer {
    /// One that behaves as `how` says.
    pub fn new(how: u8) -> Self {
        Self { how, random: u64::from(how), answers: Vec::new(), is_stuck: false }
    }

    /// How much goes at once: any number of bytes, short ones as often as long ones.
    fn piece(&mut self, bit: u8) -> usize {
        if self.how & bit == 0 {
            return usize::MAX;
        }
        self.random =
            self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let number = self.random >> 33;
        1 + (number >> 4) as usize % (1 << (number % 16))
    }

    /// Gives `bytes` to the connection and takes all its answers.
    ///
    /// # Errors
    /// [`Fatal`], in a damaged segment only.
    pub fn talk<'s>(
        &mut self,
        connection: &mut Connection<'s>,
        context: &mut Context<'s>,
        mut bytes: &[u8],
    ) -> Result<(), Fatal> {
        // A round that neither takes input nor gives output may still have executed what the next one has room by.
        let mut idle_rounds = 0;
        loop {
            let taken = self.write(connection, context, bytes)?;
            bytes = &bytes[taken..];
            let progress = connection.execute(context)?;
            let given = self.read(connection, context)?;
            let idle = progress != Progress::GivesWay && taken == 0 && given == 0;
            idle_rounds = if idle { idle_rounds + 1 } else { 0 };
            let done = bytes.is_empty() && !connection.has_output();
            if idle && (done || idle_rounds == 2) {
                self.is_stuck = !done;
                return connection.rest(context);
            }
            if taken % 8 == 1 {
                connection.give_back_rings(context)?;
            }
        }
    }

    fn write<'s>(
        &mut self,
        connection: &mut Connection<'s>,
        context: &mut Context<'s>,
        bytes: &[u8],
    ) -> Result<usize, Fatal> {
        if bytes.is_empty() {
            return Ok(0);
        }
        let piece = self.piece(IN_PIECES);
        let bytes = &bytes[..bytes.len().min(piece)];
        let (first, second) = connection.input_space(context)?;
        let in_first = bytes.len().min(first.len());
        first[..in_first].copy_from_slice(&bytes[..in_first]);
        let in_second = (bytes.len() - in_first).min(second.len());
        second[..in_second].copy_from_slice(&bytes[in_first..in_first + in_second]);
        connection.received((in_first + in_second) as u64);
        Ok(in_first + in_second)
    }

    fn read<'s>(
        &mut self,
        connection: &mut Connection<'s>,
        context: &mut Context<'s>,
    ) -> Result<usize, Fatal> {
        let before = self.answers.len();
        let mut room = self.piece(READS_SLOWLY);
        for part in connection.pending(context)? {
            let taken = part.len().min(room);
            self.answers.extend_from_slice(&part[..taken]);
            room -= taken;
        }
        let given = self.answers.len() - before;
        connection.sent(context, given as u64)?;
        Ok(given)
    }
}

fn assert_frames(mut answers: &[u8], refused: bool) {
    while !answers.is_empty() {
        if refused && answers.starts_with(b"HTTP/1.1 400 ") {
            return;
        }
        let extent = wire::peek(answers, usize::MAX).expect("a frame").expect("whole");
        wire::decode_response(&answers[FRAME_HEADER_BYTES..extent.total]).expect("a response");
        answers = &answers[extent.total..];
    }
}
