//! What every process of kvs shares: the shared-memory segment, the table in it, the commit protocol,
//! the wire format.
//!
//! | module | what it is |
//! |---|---|
//! | [`limits`] | every limit of the store, in one place |
//! | [`sys`] | the unsafe floor: shared memory as words, the robust lock, passing descriptors, process identity |
//! | [`segment`] | the layout of the segment; creating, attaching and refusing one |
//! | [`transaction`] | the commit protocol: a redo log per worker, one store that decides |
//! | [`arena`] | memory inside the segment: extents, buddy blocks, slabs of a size class |
//! | [`table`] | the hash table: lock-free validated reads, guarded writes, growth without a pause |
//! | [`backup`] | the backup file: its records, what goes into it, what comes out of it |
//! | [`connection`] | connection slots and their buffers inside the segment |
//! | [`session`] | what is remembered of a client beyond its connection, so that nothing is executed twice |
//! | [`recover`](mod@recover) | from what a dead data server left to what can be served |
//! | [`check`] | verification of every invariant of a segment |
//! | [`inspect`] | figures of a segment, for people |
//! | [`wire`] | frames and messages between clients and the data server |
//! | [`control`] | messages between the front server and the data server |
//! | [`liveness`] | knowing at once, and for certain, that a process is dead |
//! | [`heartbeat`] | knowing that a living process has stopped working |
//! | [`instance`] | names, paths, sizes and durations as a user writes them |
//!
//! Deliberately absent: this crate starts no threads and opens no network sockets; the table never maps
//! memory; no address, descriptor or bare process id is stored in the segment.
#![deny(unsafe_code)]

pub mod arena;
pub mod backup;
pub mod check;
pub mod connection;
pub mod control;
pub mod heartbeat;
pub mod inspect;
pub mod instance;
pub mod limits;
pub mod liveness;
pub mod recover;
pub mod segment;
pub mod session;
pub mod sys;
pub mod table;
pub mod transaction;
pub mod wire;
