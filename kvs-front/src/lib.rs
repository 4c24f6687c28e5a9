//! What the front server shares with the data server: the options, and finding each other's program.

pub mod options;
pub mod program;
