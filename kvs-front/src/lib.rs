//! What the front server shares with the data server: the options, and finding each other's program.
//!
//! | module | what it is |
//! |---|---|
//! | [`options`] | the options of both servers, from command line and environment |
//! | [`program`] | finding the other server's program |
#![forbid(unsafe_code)]

pub mod options;
pub mod program;
