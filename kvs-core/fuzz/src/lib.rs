//! What is done with each input: anything but a panic, a signal or an endless loop is right, and what is stated here besides.
//! `tests/fuzz.rs` runs the same on inputs of its own in every test run.
#![forbid(unsafe_code)]

use std::fs::OpenOptions;
use std::mem::offset_of;
use std::os::unix::fs::FileExt;
use std::path::Path;

use kvs_core::check;
use kvs_core::connection::context::Context;
use kvs_core::connection::{Connection, slot};
use kvs_core::inspect;
use kvs_core::limits::{CAPACITY_BYTES_MAX, CAPACITY_BYTES_MIN};
use kvs_core::segment::layout::{
    ConnectionSlot, EXTENT_BYTES, Header, PAGE_BYTES, Regions, SessionHead, SessionWindow, WorkerSlot,
};
use kvs_core::segment::{Segment, SegmentView};
use kvs_core::session::Sessions;
use kvs_core::sys::memory::Damaged;
use kvs_core::table::Table;
use kvs_core::table::hash::HashSeed;
use kvs_core::table::view::TableView;
use kvs_core::transaction::{self, Transaction, TransactionError};
use kvs_core::wire::{self, Request, RequestBody, SetCondition};

mod backup;
mod connection;
mod control;
mod frame;

pub use backup::backup;
pub use connection::connection;
use connection::{ADOPTED, NoStatistics, Peer, hello, join};
pub use control::control;
pub use frame::frame;

/// A filled segment in which words are changed: each twelve bytes of the input say which and how. It is verified, inspected,
/// recovered and used.
pub fn segment(input: &[u8]) {
    let segment = Segment::on_heap(CAPACITY_BYTES_MIN).expect("heap memory");
    fill(&segment);
    let memory = segment.memory();
    for change in changes(input, segment.regions()) {
        let word = memory.word(change.offset).expect("inside");
        memory.store(word, change.of(word.load()));
    }
    look_into(&SegmentView::of(&segment));
    let _ = check::check_copy(&segment);
    if succeed(&segment).is_ok() {
        look_into(&SegmentView::of(&segment));
    }
}

/// Bits of the first byte of the input for [`attach`].
const REPAIRED: u8 = 1;
const LENGTH_FITS: u8 = 2;
const LENGTH_CHANGES: u8 = 4;

/// A filled segment file in which words are changed, the checksum of its header repaired or not and its length changed or not, as
/// the first byte of the input says. It is opened, verified, recovered and used; or refused with an error.
pub fn attach(path: &Path, input: &[u8]) {
    let Some((&how, changed)) = input.split_first() else { return };
    let _ = std::fs::remove_file(path);
    let made = Segment::open_or_create(path, CAPACITY_BYTES_MIN).expect("room in memory");
    fill(&made.segment);
    let regions = *made.segment.regions();
    drop(made);
    damage(path, how, &changes(changed, &regions));
    if let Ok(view) = SegmentView::open(path) {
        look_into(&view);
    }
    let _ = check::check(path);
    if let Ok(opened) = Segment::open_or_create(path, CAPACITY_BYTES_MIN) {
        let _ = succeed(&opened.segment);
    }
}

fn damage(path: &Path, how: u8, changes: &[Change]) {
    let file = OpenOptions::new().read(true).write(true).open(path).expect("just made");
    let read = |offset| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, offset).expect("inside");
        u64::from_le_bytes(bytes)
    };
    let write = |offset, value: u64| file.write_all_at(&value.to_le_bytes(), offset).expect("room in memory");
    for change in changes {
        write(change.offset, change.of(read(change.offset)));
    }
    if how & REPAIRED != 0 {
        // All words of the header but the first, up to the checksum itself.
        let identity: Vec<u8> = (1..11).flat_map(|word| read(word * 8).to_le_bytes()).collect();
        write(IDENTITY_CHECKSUM, u64::from(crc32c(&identity)));
    }
    let capacity = read(CAPACITY);
    let possible = (CAPACITY_BYTES_MIN..=CAPACITY_BYTES_MAX).contains(&capacity);
    if how & LENGTH_FITS != 0 && possible {
        file.set_len(Regions::new(capacity).length).expect("it is sparse");
    } else if how & LENGTH_CHANGES != 0 {
        let length = changes.first().map_or(0, |change| change.value);
        file.set_len(length % Regions::new(CAPACITY_BYTES_MIN).length).expect("it is sparse");
    }
}

const CAPACITY: u64 = offset_of!(Header, capacity_bytes) as u64;
const IDENTITY_CHECKSUM: u64 = offset_of!(Header, identity_checksum) as u64;

fn crc32c(bytes: &[u8]) -> u32 {
    let shift = |sum: u32| (sum >> 1) ^ (0x82F6_3B78 * (sum & 1));
    !bytes.iter().fold(!0, |sum, &byte| (0..8).fold(sum ^ u32::from(byte), |sum, _| shift(sum)))
}

fn look_into(view: &SegmentView) {
    let _ = check::check_view(view);
    let _ = inspect::header(view);
    let _ = inspect::memory::figures(view);
    let _ = inspect::slots::workers(view);
    let _ = inspect::slots::connections(view);
    let _ = inspect::slots::sessions(view);
    for shard in 0..view.regions().shard_count {
        let _ = inspect::shards::figures(view, shard);
        let _ = inspect::shards::classes(view, shard);
    }
    let _ = inspect::entries::entry(view, &key_of(1));
    read_locally(view);
    let _ = inspect::entries::for_each(view, |_, _| Ok::<_, kvs_core::table::view::ReadError>(()));
}

/// What a local reader does with a segment: it touches no memory but what is reserved.
fn read_locally(view: &SegmentView) {
    let Ok(header) = view.header() else { return };
    let table = TableView::within(view.view(), view.regions(), HashSeed::of(header), view.data_end());
    for number in 0..120u32 {
        let key = key_of(number * 7);
        let hash = table.hash_of(&key);
        table.prefetch_bucket(hash);
        if !table.prefetch_entry(hash, true) {
            table.prefetch_entry_beyond(hash, true);
        }
        let _ = table.read(hash, &key, |value| {
            let mut bytes = vec![0; value.length().min(1 << 20) as usize];
            value.copy_to(0, &mut bytes)
        });
    }
}

/// What a data server does with a segment that it finds, and then some of what clients ask of it.
fn succeed(segment: &Segment) -> Result<(), TransactionError> {
    let table = Table::new(segment)?;
    let (header, memory) = (segment.header()?, segment.memory());
    let slots = (0..header.worker_slots_reserved.load())
        .map(|index| memory.object::<WorkerSlot>(segment.regions().worker(index)))
        .collect::<Result<Vec<_>, _>>()?;
    for slot in &slots {
        transaction::recover(memory, slot)?;
    }
    segment.initialize_locks().map_err(|_| Damaged { offset: 0 })?;
    for slot in &slots {
        let _ = table.collect_garbage(slot);
    }
    for index in 0..header.connection_slots_reserved.load() {
        let left: &ConnectionSlot = memory.object(segment.regions().connection(index))?;
        if slot::is_used(left) && slot::release(segment, worker(segment), left).is_err() {
            slot::abandon(segment, worker(segment), left)?;
        }
    }
    use_table(&table);
    use_connection(&table);
    Ok(())
}

fn use_table(table: &Table) {
    let segment = table.segment();
    for number in 0..120u32 {
        let key = key_of(number * 7);
        let hash = table.hash_of(&key);
        let _ = table.read(hash, &key, |value| Ok(value.length()));
        put(table, &key, &vec![b'n'; number as usize * 20]);
        let mut transaction = Transaction::begin(segment, worker(segment));
        let _ = table.increment(&mut transaction, hash, &key, 1).map(|_| transaction.commit());
        let mut transaction = Transaction::begin(segment, worker(segment));
        let _ = table.delete(&mut transaction, hash, &key).map(|_| transaction.commit());
        let _ = table.collect_garbage(worker(segment));
    }
    let _ = table.scan(0, 1000, &mut |_| {});
}

fn use_connection(table: &Table) {
    let segment = table.segment();
    let sessions = Sessions::default();
    let context = Context::new(table, worker(segment), &NoStatistics, 1 << 20, 8);
    let mut context = context.with_sessions(&sessions);
    let Ok(mut connection) = Connection::open(segment, 1, ADOPTED) else { return };
    let set = |key, value| RequestBody::Set { condition: SetCondition::Always, key, value };
    let stream = requests(
        2,
        &[
            RequestBody::Get { key: b"large" },
            set(b"large", &[b'n'; 70_000]),
            RequestBody::Get { key: b"large" },
            RequestBody::List { prefix: b"key 1", cursor: 0, limit: 50 },
            RequestBody::Increment { key: b"number", by: 1 },
            RequestBody::Delete { key: b"large" },
        ],
    );
    if Peer::new(0).talk(&mut connection, &mut context, &stream).is_ok() {
        let _ = connection.close(&mut context);
    }
}

/// What becomes of a word.
struct Change {
    offset: u64,
    value: u64,
    kind: u8,
}

impl Change {
    fn of(&self, before: u64) -> u64 {
        match self.kind {
            0 => self.value,
            1 => before ^ self.value,
            _ => before.wrapping_add(self.value),
        }
    }
}

/// First bytes from here on choose a part that has to do with sessions.
const SESSION_PARTS_FROM: usize = 0xf0;

/// Words to change: the first byte of twelve chooses a part of the segment and the kind of change, three the place in it, the
/// others are the value.
fn changes(input: &[u8], regions: &Regions) -> Vec<Change> {
    let slots = |start: u64, bytes: usize| (start, start + bytes as u64);
    let mut parts = vec![
        (0, offset_of!(Header, spare) as u64),
        (PAGE_BYTES, regions.free_maps),
        (regions.free_maps, regions.extents),
        (regions.extents, regions.extents + 512),
        slots(regions.workers, size_of::<WorkerSlot>()),
        slots(regions.connections, size_of::<ConnectionSlot>()),
        (regions.data, regions.data + 4 * EXTENT_BYTES),
    ];
    // These came later, and what is kept in `seeds` means what it meant.
    let session_parts = [
        slots(regions.session_heads, 2 * size_of::<SessionHead>()),
        slots(regions.session_windows, 2 * size_of::<SessionWindow>()),
        slots(offset_of!(Header, sessions_reserved) as u64, 8),
        slots(regions.connections + offset_of!(ConnectionSlot, session) as u64, 8),
    ];
    parts.extend((0..regions.shard_count).map(|shard| slots(regions.bucket_region(shard), 4096)));
    let words = input.as_chunks::<12>().0.iter().take(64);
    words
        .map(|bytes| {
            let part = usize::from(bytes[0]);
            let (start, end) = match part.checked_sub(SESSION_PARTS_FROM) {
                Some(part) => session_parts[part % session_parts.len()],
                None => parts[part % parts.len()],
            };
            let place = u64::from(u32::from_le_bytes([bytes[1], bytes[2], bytes[3], 0]));
            let value = bytes[4..].iter().rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte));
            let offset = start + place % ((end - start) / 8) * 8;
            Change { offset, value, kind: bytes[0] >> 4 & 3 }
        })
        .collect()
}

/// Fills an empty segment: small values, a large one, and a connection in a session that has sent most of another.
fn fill(segment: &Segment) {
    segment.claim_worker(0).expect("memory");
    let table = Table::new(segment).expect("just made");
    for number in 0..400u32 {
        put(&table, &key_of(number), &vec![b'v'; number as usize * 5]);
    }
    let sessions = Sessions::default();
    let context = Context::new(&table, worker(segment), &NoStatistics, 1 << 20, 8);
    let mut context = context.with_sessions(&sessions);
    let mut connection = Connection::open(segment, 0, ADOPTED).expect("room");
    let set = RequestBody::Set { condition: SetCondition::Always, key: b"large", value: &[b'l'; 90_000] };
    let stream = requests(1, &[RequestBody::Increment { key: b"number", by: 1 }, set.clone(), set]);
    let begun = &stream[..stream.len() - 20_000];
    Peer::new(0).talk(&mut connection, &mut context, begun).expect("sound");
}

/// A hello, the client's session joined again, and the frames of `bodies`.
fn requests(attempt: u64, bodies: &[RequestBody<'_>]) -> Vec<u8> {
    let mut stream = [hello(), join(attempt)].concat();
    for (number, body) in (1..).zip(bodies) {
        wire::encode_request(&mut stream, &Request { number, body: body.clone() });
    }
    stream
}

fn key_of(number: u32) -> Vec<u8> {
    format!("key {number}").into_bytes()
}

fn put(table: &Table, key: &[u8], value: &[u8]) {
    let mut transaction = Transaction::begin(table.segment(), worker(table.segment()));
    let set = table.set(&mut transaction, table.hash_of(key), key, value, SetCondition::Always);
    let _ = set.map(|_| transaction.commit());
    let _ = table.collect_garbage(worker(table.segment()));
}

fn worker(segment: &Segment) -> &WorkerSlot {
    segment.memory().object(segment.regions().worker(0)).expect("inside")
}
