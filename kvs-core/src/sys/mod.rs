//! The unsafe floor of the crate: everything that talks to the kernel or to raw memory, each with a safe face.
//!
//! | module | what it is |
//! |---|---|
//! | [`memory`] | a mapping seen as 8-byte atomic words, bounds-checked |
//! | [`liveness_map`] | the memory of a liveness page: sealed, with a lock for each thread |
//! | [`robust_mutex`] | the process-shared lock that tells when its owner died |
//! | [`fd_passing`] | descriptors through a unix socket (`SCM_RIGHTS`) |
//! | [`stream_position`] | how far a stream got, asked of the kernel |
//! | [`counted_send`] | sending so that the count survives the sender |
//! | [`activation`] | descriptors that a service manager kept for this process |
//! | [`priority`] | making the dead give way to the living |
//! | [`launch`] | starting a program without a look at thousands of descriptors |
//! | [`process`] | who a process is, beyond a pid that may be reused |

pub mod activation;
pub mod counted_send;
#[cfg(test)]
pub mod crash;
pub mod fd_passing;
pub mod launch;
pub mod liveness_map;
pub mod memory;
pub mod priority;
pub mod process;
pub mod robust_mutex;
pub mod stream_position;
