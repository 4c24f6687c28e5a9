//! What the front server shares with the data server, which launches a front server in its turn.
//!
//! | module | what it is |
//! |---|---|
//! | [`options`] | the options of both servers, from command line and environment |
//! | [`program`] | finding the other server's program |
//! | [`estate`] | listening sockets and what else outlives a front server |
//! | [`socket_file`] | a unix socket and its file, of which nobody is robbed |
//! | [`pace`] | how soon the next attempt to launch a server may be made |
//! | [`probe`] | what a program says that is tried before an upgrade |
//! | [`process`] | killing a process for certain |
//! | [`log_output`] | standard error, for which nobody waits |
#![forbid(unsafe_code)]

pub mod estate;
pub mod log_output;
pub mod options;
pub mod pace;
pub mod probe;
pub mod process;
pub mod program;
pub mod socket_file;
