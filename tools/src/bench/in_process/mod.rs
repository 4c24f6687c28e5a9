//! Targets inside this process: no socket and no server between the reader and the memory. Memory per entry and the making of
//! connections are measured here too.

use super::scenario::{Case, Scenario};
use super::target::Target;

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

/// The targets of a case of another kind than [`Kind::Network`](super::scenario::Kind::Network), ready to be measured: those of
/// `case.targets` that are here on this machine. What isn't is told to `missing`, with the reason.
///
/// # Errors
/// When one that is here can't be made ready.
pub fn targets(case: &Case, _missing: &mut dyn FnMut(String)) -> anyhow::Result<Vec<Box<dyn Target>>> {
    anyhow::bail!("{} isn't known", case.name)
}
