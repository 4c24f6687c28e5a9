//! Targets inside this process: no socket and no server between the reader and the memory. Memory per entry and the making of
//! connections are measured here too.

use super::scenario::{Case, Scenario};
use super::stores::Settings;
use super::target::Ready;

/// How a case reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reads {
    /// Threads that read.
    pub threads: usize,
    /// Keys asked for at once.
    pub batch: usize,
    /// Whether a writer changes the same keys meanwhile.
    pub with_writer: bool,
}

/// The scenarios measured here.
pub const SCENARIOS: &[Scenario] = &[];

/// The targets of a case of another kind than [`Kind::Network`](super::scenario::Kind::Network), ready to be measured.
///
/// # Errors
/// When one that is here can't be made ready.
pub fn ready(case: &Case, _settings: &Settings) -> anyhow::Result<Ready> {
    anyhow::bail!("{} isn't known", case.name)
}
