//! Where everything lies in the segment. `report/segment.md` draws it; a test holds the two together.
//!
//! ```text
//! 0            header          4 KiB   identity, recovery figures, the arena's lock
//! 4 KiB        shards          1 KiB each
//!              free maps       which extents have a free block of each order
//!              extents         128 B of free bits each
//!              worker slots    one redo log each, reserved as workers come
//!              connection slots  256 B each, reserved as connections come
//!              backup rings    256 KiB each, one for every worker that serves clients
//!              session heads   64 B each, reserved as sessions come
//!              session windows 4 KiB each, likewise
//!              buckets         one region a shard, reserved as the shard grows
//!              data            extents of 2 MiB, reserved as data grows
//! ```
//!
//! Invariants
//! - The regions follow from the capacity alone, so that two processes that agree on it agree on every offset.
//! - The file is as long as all regions together, but sparse: memory is taken (`fallocate`) before it is touched.
//! - The constants here own the layout: any change changes [`LAYOUT_HASH`], and an older segment is refused.

use crate::limits::{CONNECTIONS_MAX_LIMIT, SESSION_WINDOW, SESSIONS_MAX, WORKERS_MAX};
use crate::shared_struct;
use crate::sys::memory::{Offset, Word};
use crate::sys::robust_mutex::RobustMutex;

/// First eight bytes of a segment: `kvs-seg` and a zero.
pub const MAGIC: u64 = u64::from_le_bytes(*b"kvs-seg\0");
/// Version of the layout; raised with every change of it.
pub const LAYOUT_VERSION: u64 = 5;

/// Page size that all regions are aligned to, in bytes.
pub const PAGE_BYTES: u64 = 4096;
/// Size of an extent, in bytes: the unit in which data memory is taken from the kernel; a huge page.
pub const EXTENT_BYTES: u64 = 2 << 20;
/// Number of buddy orders: blocks of 4 KiB (order 0) up to a whole extent (order 9).
pub const ORDERS: usize = 10;
/// Size of a block of order 0, in bytes.
pub const BLOCK_BYTES: u64 = 4096;
/// Number of slab size classes; see `arena::size_class`.
pub const SIZE_CLASSES: usize = 25;
/// Size of a bucket, in bytes: one cache line.
pub const BUCKET_BYTES: u64 = 64;
/// Slots in a bucket.
pub const BUCKET_SLOTS: usize = 7;
/// How many buckets behind its home an entry's slot may lie. At the fill at which a shard grows, the
/// farthest of ten million entries lies about 40 behind.
pub const REACH_MAX: u64 = 63;
/// Most entries of one home that a growth step moves. Homes have five or six; hundreds would need a broken hash.
pub const MOVES_MAX: usize = 256;
/// Most shards of a segment; they must fit the eight hash bits that choose one.
pub const SHARDS_MAX: u64 = 256;
/// Fewest shards of a segment.
pub const SHARDS_MIN: u64 = 4;
/// Words a redo log has room for. The largest transaction is a growth step, which moves every entry of one home.
pub const LOG_WORDS: usize = 640;
/// Most clients from whom a worker takes input before it executes any of it.
pub const WAVE_MAX: usize = 16;
/// Unit in which a bucket region is reserved, in bytes.
pub const BUCKET_RESERVE_BYTES: u64 = PAGE_BYTES;
/// Size of a worker's backup ring, in bytes: what it changes while the backup thread is busy with the batch before.
pub const BACKUP_RING_BYTES: u64 = 256 << 10;

// A growth step clears and sets a slot for every entry of a home, and touches a few words besides.
const _: () = assert!(2 * MOVES_MAX + 64 <= LOG_WORDS);
const _: () = assert!(BLOCK_BYTES << (ORDERS - 1) == EXTENT_BYTES);
const _: () = assert!((BUCKET_SLOTS as u64 + 1) * 8 == BUCKET_BYTES);

/// FNV-1a over every constant that the layout depends on, the kind of C library included: a pthread mutex has
/// no fixed layout.
pub const LAYOUT_HASH: u64 = {
    let facts = [
        LAYOUT_VERSION,
        PAGE_BYTES,
        EXTENT_BYTES,
        ORDERS as u64,
        BLOCK_BYTES,
        SIZE_CLASSES as u64,
        BUCKET_BYTES,
        REACH_MAX,
        LOG_WORDS as u64,
        BACKUP_RING_BYTES,
        WAVE_MAX as u64,
        WORKERS_MAX as u64,
        CONNECTIONS_MAX_LIMIT as u64,
        SESSIONS_MAX,
        SESSION_WINDOW,
        size_of::<Header>() as u64,
        size_of::<Shard>() as u64,
        size_of::<WorkerSlot>() as u64,
        size_of::<ConnectionSlot>() as u64,
        size_of::<SessionHead>() as u64,
        size_of::<SessionWindow>() as u64,
        size_of::<Extent>() as u64,
        cfg!(target_env = "gnu") as u64,
        cfg!(target_arch = "x86_64") as u64,
    ];
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    let mut index = 0;
    while index < facts.len() {
        hash = (hash ^ facts[index]).wrapping_mul(0x0000_0100_0000_01b3);
        index += 1;
    }
    hash
};

/// Bytes of text kept in the header for each address.
pub const ADDRESS_BYTES: usize = 256;

shared_struct! {
    /// How far a backup file has come.
    pub struct BackupMark, 32, {
        /// Which of the files that followed one another; 0 while there is none.
        generation: Word,
        /// Bytes of it that are written whole.
        position: Word,
        /// Sequence number of the next record.
        sequence: Word,
        /// Checksum of the last record.
        chain: Word,
    }
}

shared_struct! {
    /// First page of the segment.
    pub struct Header, 4096, {
        /// [`MAGIC`]; written last at creation, so a segment without it was never finished.
        magic: Word,
        /// [`LAYOUT_VERSION`].
        layout_version: Word,
        /// [`LAYOUT_HASH`].
        layout_hash: Word,
        /// Capacity that every region follows from, in bytes.
        capacity_bytes: Word,
        /// Number of shards.
        shard_count: Word,
        /// Boot id of the machine that made the segment; another one means that the machine was restarted.
        boot_id: [Word; 2],
        /// Identity of the backup file that belongs to the segment; zero while there is none.
        backup_id: [Word; 2],
        /// Seed of the hash.
        hash_seed: [Word; 2],
        /// CRC32C of all fields above, `magic` taken as set.
        identity_checksum: Word,
        /// 1 after an orderly end, 0 while a data server is attached.
        clean: Word,
        /// Data server: pid and start time; valid only while that very process lives.
        data_process: [Word; 2],
        /// Front server: pid and start time; valid only while that very process lives.
        front_process: [Word; 2],
        /// How often a data server was started again after one had died.
        data_restarts: Word,
        /// How often a front server was started again after one had died.
        front_restarts: Word,
        /// Nanoseconds since the epoch at which the segment was made.
        created_ns: Word,
        /// Largest value, in bytes, as last told by `--max-value`.
        value_bytes_max: Word,
        /// Connection slots reserved so far; slots beyond were never touched.
        connection_slots_reserved: Word,
        /// Extents reserved so far. Guarded by `arena_lock`.
        extents_reserved: Word,
        /// Memory reserved so far over all regions, in bytes. Guarded by `arena_lock`.
        reserved_bytes: Word,
        /// Guards the free maps, the extents' free bits and the two fields above. Taken after a shard's lock, never before.
        arena_lock: RobustMutex,
        /// TCP address clients connect to, as text, zero-padded.
        tcp_address: [Word; ADDRESS_BYTES / 8],
        /// Path of the unix socket clients connect to, zero-padded.
        unix_path: [Word; ADDRESS_BYTES / 8],
        /// Worker slots reserved so far; slots beyond were never touched.
        worker_slots_reserved: Word,
        /// Backup rings reserved so far; rings beyond were never touched.
        backup_rings_reserved: Word,
        /// 1 while the entries are still being loaded from the backup file: such a segment is made anew.
        loading: Word,
        /// The backup file as far as the rings were drained into it; see `backup::log`. Changes in a transaction with the
        /// rings' tails.
        backup: BackupMark,
        /// The file that is about to take the place of the one in `backup`; all zero when none is.
        backup_next: BackupMark,
        /// Goes up while the data server works.
        data_heartbeat: Word,
        /// Goes up while the front server works.
        front_heartbeat: Word,
        /// Process id and start time of the standby, written by the data server that serves; 0 while there is none. No other may
        /// take over.
        standby_process: [Word; 2],
        /// Process id of the standby once it has every client's socket, written by itself.
        standby_stands: Word,
        /// Session records reserved so far; records beyond were never touched.
        sessions_reserved: Word,
        /// Room for later fields.
        spare: [Word; 399],
    }
}

shared_struct! {
    /// One shard's part of the table. Everything but `geometry` is guarded by `lock`.
    pub struct Shard, 1024, {
        /// Guards the shard. Taken before the arena's lock; no thread holds two shards' locks.
        lock: RobustMutex,
        /// Bucket count and growth frontier, in one word that readers load; see `table::geometry`.
        geometry: Word,
        /// Buckets' memory reserved so far, in bytes from the region's start.
        reserved_bytes: Word,
        /// Non-zero: something here did not check out, and requests to this shard are refused.
        quarantined: Word,
        /// Fills up the readers' cache line, which only growth changes.
        reserved: [Word; 5],
        /// Version that the next change gets; starts at 1, never reused.
        next_version: Word,
        /// Live entries.
        entries: Word,
        /// Bytes of keys and values of the live entries.
        content_bytes: Word,
        /// Fills up to a cache line.
        reserved_counters: [Word; 5],
        /// First slab with a free block, per size class; 0 for none.
        partial: [Word; SIZE_CLASSES],
        /// Slabs, full or not, per size class.
        slabs: [Word; SIZE_CLASSES],
        /// Room for later fields.
        spare: [Word; 54],
    }
}

shared_struct! {
    /// One word of a redo log: what to store where.
    pub struct LogEntry, 16, {
        /// Offset of the word.
        offset: Word,
        /// What it becomes.
        value: Word,
    }
}

shared_struct! {
    /// What one worker keeps in the segment, from the beginning of a page on. Only that worker writes it, and recovery once
    /// the worker is dead.
    pub struct WorkerSlot, 12288, {
        /// What the send under way on a unix socket came to: the low half is written by the kernel itself, with the send. All
        /// ones while nothing is known of it. First in the page; see `sys::counted_send`.
        unix_sent: Word,
        /// The connection's `sent` before that send.
        unix_sent_from: Word,
        /// Index of the connection slot that is being served, plus 1; 0 for none. Only of that one does the kernel know more
        /// of the stream than its slot does.
        serving: Word,
        /// 0: nothing decided. Else the number of log entries and their checksum: decided, to be completed.
        intent: Word,
        /// Head of the chunked entry whose blocks are still to be freed; 0 for none.
        garbage: Word,
        /// Requests served, by kind; see `connection::Counter`. No part of any transaction.
        counters: [Word; 16],
        /// Bytes ever put into the worker's backup ring. Changes in the transaction of the change that is put there.
        ring_head: Word,
        /// Bytes ever taken out of it. Only the backup thread changes it.
        ring_tail: Word,
        /// Odd while the worker serves somebody, even while it waits; goes up with every round.
        turn: Word,
        /// Block list of a large value that is being loaded from the backup file; 0 for none.
        loading: Word,
        /// Indexes of the connection slots, plus 1, from which input was taken last before any of it was executed; 0 for none. What
        /// is left of earlier ones does no harm.
        wave: [Word; WAVE_MAX],
        /// Fills up to a multiple of the cache line.
        reserved: [Word; 23],
        /// The redo log.
        log: [LogEntry; LOG_WORDS],
        /// Fills up to whole pages.
        tail: [Word; 192],
    }
}

shared_struct! {
    /// A ring buffer of a connection.
    pub struct RingPlace, 16, {
        /// Its block: offset with its order in the low bits; 0 for none. Valid while there is something in it.
        block: Word,
        /// Stream position of its first byte, and of every byte that is a multiple of its size behind. Changes only while there is
        /// nothing in it.
        base: Word,
    }
}

shared_struct! {
    /// What one connection keeps in the segment. Only the worker it belongs to writes it.
    pub struct ConnectionSlot, 256, {
        /// 0: free. Else in use: 1 Hello is awaited, 2 requests are served, 3 the client was refused.
        state: Word,
        /// How far input is executed (low 32 bits) and output produced (high 32 bits), modulo 2^32 each.
        committed: Word,
        /// Bytes of input taken from the socket.
        received: Word,
        /// Bytes of output given to the socket.
        sent: Word,
        /// Input buffer.
        input: RingPlace,
        /// Output buffer.
        output: RingPlace,
        /// Number of the connection, given by the front server, never reused while the segment lives.
        id: Word,
        /// Block list that collects a value larger than the input buffer; 0 for none. Nothing of its frame is consumed, or
        /// all of it is done with, while `assembly_end` is 0.
        assembly: Word,
        /// Block list that holds an answer larger than the output buffer; 0 for none.
        outgoing: Word,
        /// Stream position at which `outgoing` begins in the output; all ones while it is no part of it, not yet or not
        /// any longer.
        outgoing_start: Word,
        /// Non-zero: input up to this position belongs to a refused frame and is thrown away.
        discard_until: Word,
        /// Process id the client named in its hello (0 before), with the transport in the high half.
        client: Word,
        /// Name the client gave, zero-padded.
        client_name: [Word; 4],
        /// Stream position behind the frame whose value is collected; 0 for none.
        assembly_end: Word,
        /// Number of that request, with its condition in the high half.
        assembly_request: Word,
        /// Bytes of its key, which begins the list.
        assembly_key_bytes: Word,
        /// Non-zero: the client has sent its last byte.
        input_ended: Word,
        /// Non-zero: its server died while it served it, so `received` and `sent` are to be asked of the kernel.
        uncertain: Word,
        /// `received` at the time the kernel's own count of a unix socket's input was set; all ones while that is being done,
        /// and nothing is received then. See `sys::stream_position`.
        peek_base: Word,
        /// Index of the session whose changes come over this connection, and one; 0 for none.
        session: Word,
        /// Stream position up to which input, from where it is executed on, is received right into `assembly` and not into the
        /// input buffer; less than what is executed when none is.
        direct_until: Word,
        /// Room for later fields.
        spare: [Word; 6],
    }
}

shared_struct! {
    /// Whose a session record is. Guarded by a lock of the process that serves the segment; see `session`.
    pub struct SessionHead, 64, {
        /// 0: free, and nothing else here or in the window means anything. 1: in use.
        state: Word,
        /// What its client knows it by. A secret.
        token: [Word; 2],
        /// Number of the connection that may change something for it; 0 while there is none.
        owner: Word,
        /// Which of its client's connections, counted by the client, had it last.
        attempt: Word,
        /// Since when it has no connection, in milliseconds since the machine was started; only while `owner` is 0.
        since_ms: Word,
        /// Room for later fields.
        spare: [Word; 2],
    }
}

shared_struct! {
    /// What came of one change of a session.
    pub struct SessionResult, 16, {
        /// Its place in the order of the session's changes (48 bits), a code of error (8), what came of it (8); 0 for none.
        outcome: Word,
        /// The sum, after an increment.
        value: Word,
    }
}

shared_struct! {
    /// The last changes of a session. Each is stored in the transaction of its change.
    pub struct SessionWindow, 4096, {
        /// By their place in the order, modulo their number.
        results: [SessionResult; SESSION_WINDOW as usize],
    }
}

shared_struct! {
    /// Free bits of one extent: bit set means that this very block is free and no larger one around it is.
    pub struct Extent, 128, {
        /// 512 bits of order 0, 256 of order 1, 128, 64, then orders 4 to 9 in the last word.
        free: [Word; 16],
    }
}

/// Rounds up to a multiple of `unit`, which is a power of two.
pub const fn round_up(value: u64, unit: u64) -> u64 {
    (value + unit - 1) & !(unit - 1)
}

/// Where every region lies, worked out from the capacity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Regions {
    /// Most memory the segment may take, in bytes.
    pub capacity_bytes: u64,
    /// Number of shards, a power of two.
    pub shard_count: u64,
    /// Where the free maps begin.
    pub free_maps: u64,
    /// Words in the free map of one order.
    pub free_map_words: u64,
    /// Where the extents' free bits begin.
    pub extents: u64,
    /// Most extents there can be.
    pub extent_count: u64,
    /// Where the worker slots begin; all before is reserved at creation.
    pub workers: u64,
    /// Where the connection slots begin.
    pub connections: u64,
    /// Where the backup rings begin.
    pub rings: u64,
    /// Where the session heads begin.
    pub session_heads: u64,
    /// Where the session windows begin.
    pub session_windows: u64,
    /// Where the bucket regions begin.
    pub buckets: u64,
    /// Size of one shard's bucket region, in bytes.
    pub bucket_region_bytes: u64,
    /// Where the data extents begin.
    pub data: u64,
    /// Length of the segment file, in bytes (sparse).
    pub length: u64,
}

impl Regions {
    /// The regions of a segment of `capacity_bytes`, a multiple of [`PAGE_BYTES`] within the limits.
    pub const fn new(capacity_bytes: u64) -> Self {
        let shard_count = shard_count(capacity_bytes);
        let extent_count = capacity_bytes / EXTENT_BYTES;
        let free_maps = PAGE_BYTES + shard_count * size_of::<Shard>() as u64;
        let free_map_words = extent_count.div_ceil(64);
        let extents = round_up(free_maps + ORDERS as u64 * free_map_words * 8, PAGE_BYTES);
        let workers = round_up(extents + extent_count * size_of::<Extent>() as u64, PAGE_BYTES);
        let connections = round_up(workers + WORKERS_MAX as u64 * size_of::<WorkerSlot>() as u64, PAGE_BYTES);
        let connections_length = CONNECTIONS_MAX_LIMIT as u64 * size_of::<ConnectionSlot>() as u64;
        let rings = round_up(connections + connections_length, PAGE_BYTES);
        let session_heads = rings + WORKERS_MAX as u64 * BACKUP_RING_BYTES;
        let session_windows = session_heads + SESSIONS_MAX * size_of::<SessionHead>() as u64;
        let windows_length = SESSIONS_MAX * size_of::<SessionWindow>() as u64;
        let buckets = round_up(session_windows + windows_length, EXTENT_BYTES);
        // The smallest entry takes 32 bytes of data and at most 16 of buckets, so half the capacity is enough
        // for buckets; a quarter more because shards are never exactly even.
        let bucket_region_bytes = round_up(capacity_bytes / shard_count * 5 / 8, EXTENT_BYTES);
        let data = buckets + shard_count * bucket_region_bytes;
        let length = data + extent_count * EXTENT_BYTES;
        Self {
            capacity_bytes,
            shard_count,
            free_maps,
            free_map_words,
            extents,
            extent_count,
            workers,
            connections,
            rings,
            session_heads,
            session_windows,
            buckets,
            bucket_region_bytes,
            data,
            length,
        }
    }

    /// The header.
    pub const fn header(&self) -> Offset<Header> {
        Offset::new(0)
    }

    /// Shard `index`.
    pub const fn shard(&self, index: u64) -> Offset<Shard> {
        Offset::new(PAGE_BYTES).index(index)
    }

    /// Worker slot `index`.
    pub const fn worker(&self, index: u64) -> Offset<WorkerSlot> {
        Offset::new(self.workers).index(index)
    }

    /// Connection slot `index`.
    pub const fn connection(&self, index: u64) -> Offset<ConnectionSlot> {
        Offset::new(self.connections).index(index)
    }

    /// Where the backup ring of worker `index` begins.
    pub const fn ring(&self, index: u64) -> u64 {
        self.rings + index * BACKUP_RING_BYTES
    }

    /// Head of session `index`.
    pub const fn session_head(&self, index: u64) -> Offset<SessionHead> {
        Offset::new(self.session_heads).index(index)
    }

    /// Window of session `index`.
    pub const fn session_window(&self, index: u64) -> Offset<SessionWindow> {
        Offset::new(self.session_windows).index(index)
    }

    /// Free bits of extent `index`.
    pub const fn extent(&self, index: u64) -> Offset<Extent> {
        Offset::new(self.extents).index(index)
    }

    /// Word `word` of the free map of `order`.
    pub const fn free_map(&self, order: usize, word: u64) -> u64 {
        self.free_maps + (order as u64 * self.free_map_words + word) * 8
    }

    /// Where the buckets of shard `index` begin.
    pub const fn bucket_region(&self, index: u64) -> u64 {
        self.buckets + index * self.bucket_region_bytes
    }

    /// Whether `offset` lies in an extent that can exist, as the start of `length` bytes.
    pub const fn in_data(&self, offset: u64, length: u64) -> bool {
        offset >= self.data && offset <= self.length && length <= self.length - offset
    }
}

/// Shards are made for every so many bytes of capacity: each costs some 20 KiB of slack, half a byte for each of 40,000 entries.
const CAPACITY_PER_SHARD: u64 = 64 << 20;

const fn shard_count(capacity_bytes: u64) -> u64 {
    let wanted = capacity_bytes / CAPACITY_PER_SHARD;
    let mut count = SHARDS_MIN;
    while count * 2 <= wanted && count < SHARDS_MAX {
        count *= 2;
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_of_every_capacity_do_not_overlap() {
        for capacity in [16u64 << 20, 64 << 20, 1 << 30, 8 << 30, 1 << 40] {
            let regions = Regions::new(capacity);
            assert!(regions.free_maps < regions.extents);
            assert!(regions.extents < regions.workers);
            assert!(regions.workers < regions.connections);
            assert!(regions.connections < regions.rings);
            assert!(regions.ring(WORKERS_MAX as u64) <= regions.session_heads);
            assert!(regions.session_head(SESSIONS_MAX).bytes() <= regions.session_windows);
            assert!(regions.session_windows.is_multiple_of(PAGE_BYTES));
            assert!(regions.session_window(SESSIONS_MAX).bytes() <= regions.buckets);
            assert!(regions.buckets.is_multiple_of(EXTENT_BYTES));
            assert!(regions.data.is_multiple_of(EXTENT_BYTES));
            assert_eq!(regions.length, regions.data + regions.extent_count * EXTENT_BYTES);
            assert!(regions.workers < capacity / 100, "{capacity}: {}", regions.workers);
        }
    }

    #[test]
    fn shards_follow_the_capacity() {
        assert_eq!(Regions::new(16 << 20).shard_count, 4);
        assert_eq!(Regions::new(1 << 30).shard_count, 16);
        assert_eq!(Regions::new(1 << 40).shard_count, 256);
    }
}
