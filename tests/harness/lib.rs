//! What the whole-process tests share: real servers, real sockets, real kills.
//!
//! | module | what it is |
//! |---|---|
//! | [`binaries`] | the programs under test, built in the profile of the running test |
//! | [`store`] | a running store of its own for one test, and the end of it |
//! | [`present`] | a store whose servers come and go |
//! | [`processes`] | finding, stopping and killing the processes of a store |
//! | [`c_programs`] | C programs against the C library |
//! | [`connection`] | a plain connection that says exactly what a test wants said |
//! | [`random`] | random numbers that a seed repeats |
//! | [`wait`] | waiting for a condition instead of a time |
//!
//! Invariants
//! - Every store has a name, a directory and ports of its own, so tests run side by side.
//! - No process, segment or file outlives the test program, whatever way that ends: [`store::Store`] cleans up when it is
//!   dropped, in a panic too, and a guard process does when the test program is killed.
//! - Nothing waits for ever: every wait and every read of a socket has a deadline.

pub mod binaries;
pub mod c_programs;
pub mod connection;
pub mod present;
pub mod processes;
pub mod random;
pub mod store;
pub mod wait;
