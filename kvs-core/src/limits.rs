//! Every limit of the store, in one place, with what derives from them and what must hold between them.

use std::time::Duration;

/// Longest key, in bytes.
pub const KEY_BYTES_MAX: usize = 65_535;
/// Default of `--max-value`, in bytes.
pub const VALUE_BYTES_MAX_DEFAULT: u64 = 16 << 20;
/// Largest `--max-value` that can be asked for, in bytes.
pub const VALUE_BYTES_MAX_LIMIT: u64 = 64 << 20;
/// Room a frame needs beyond its key and its value: version, request number, variant and lengths.
pub const FRAME_OVERHEAD_BYTES_MAX: usize = 64;
/// Most worker threads of a data server.
pub const WORKERS_MAX: usize = 64;
/// Largest `--workers`: one slot is the housekeeping thread's, one the backup thread's.
pub const WORKER_THREADS_MAX: usize = WORKERS_MAX - 2;
/// Default of `--max-connections`.
pub const CONNECTIONS_MAX_DEFAULT: u32 = 10_000;
/// Most connection slots a segment has room for; the largest `--max-connections`.
pub const CONNECTIONS_MAX_LIMIT: u32 = 65_536;
/// Number of the descriptor that the client in slot 0 has in a data server. Fewer are open besides clients' sockets, so that none of them has a
/// number of theirs: two for each worker, those of the front server's estate, a message's worth of sockets that have just come.
pub const FIRST_CLIENT_DESCRIPTOR: i32 = 512;
/// Default of `--capacity`, in bytes.
pub const CAPACITY_BYTES_DEFAULT: u64 = 1 << 30;
/// Smallest capacity of a segment, in bytes.
pub const CAPACITY_BYTES_MIN: u64 = 16 << 20;
/// Largest capacity of a segment, in bytes.
pub const CAPACITY_BYTES_MAX: u64 = 1 << 40;
/// Longest instance name, in bytes.
pub const NAME_BYTES_MAX: usize = 64;
/// Default of `--hang-timeout`.
pub const HANG_TIMEOUT_DEFAULT: Duration = Duration::from_secs(5);
/// Shortest `--hang-timeout`, but for 0: less would take a busy machine's delays for a hang.
pub const HANG_TIMEOUT_MIN: Duration = Duration::from_millis(100);
/// Longest `--hang-timeout`.
pub const HANG_TIMEOUT_MAX: Duration = Duration::from_secs(3600);
/// Most sessions a segment remembers. As many as connections, so that there is always one whose client is gone, or that is free.
pub const SESSIONS_MAX: u64 = CONNECTIONS_MAX_LIMIT as u64;
/// Changes of a session whose results are remembered: a client has no more of them unanswered. The results fill one page.
pub const SESSION_WINDOW: u64 = 256;
/// Smallest window any server may have: what a client has unanswered before it was told the window.
pub const SESSION_WINDOW_MIN: u64 = 64;
/// How long a session without a connection is kept although its memory could be used by another.
pub const SESSION_KEPT: Duration = Duration::from_secs(60);

const _: () = assert!(SESSION_WINDOW.is_power_of_two() && SESSION_WINDOW >= SESSION_WINDOW_MIN);
