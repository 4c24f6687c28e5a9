//! Client library of kvs, for Rust programs.
//!
//! ```no_run
//! # fn main() -> Result<(), kvs_client::Error> {
//! let mut client = kvs_client::Client::connect("127.0.0.1:9999")?;
//! client.set("greeting", "hello")?;
//! assert_eq!(client.get("greeting")?.as_deref(), Some(&b"hello"[..]));
//! let visits = client.increment("visits", 1)?;
//! # let _ = visits;
//! # Ok(())
//! # }
//! ```
//!
//! | module | what it is |
//! |---|---|
//! | `client` | [`Client`]: one call, one answer; connects again when the connection breaks |
//! | `pipeline` | [`Pipeline`]: many requests at once |
//! | `connection` | one connection: frames out and in, without deadlock |
//! | `session` | what the server remembers this client by |
//! | `local` | [`LocalReader`]: reads straight from the shared memory, server or not |
//! | `address` | where a server is |
//! | `error` | [`Error`] |
//!
//! Calls block. A [`Client`] is `Send`; threads that work at the same time each connect for themselves.
#![forbid(unsafe_code)]

mod address;
mod client;
mod connection;
mod error;
mod local;
mod pipeline;
mod session;
#[cfg(test)]
mod tests;

pub use client::{Client, ConnectOptions, Keys, ListPage, Statistic};
pub use error::Error;
pub use local::LocalReader;
pub use pipeline::{Answer, Pipeline};
