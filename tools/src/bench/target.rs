//! What can be measured: a target gives one measurement a round, whatever it is.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::results::{Sample, Unit};

/// Something that is measured, ready for it: its keys are stored, its server runs.
pub trait Target {
    /// What it is called in tables, such as `kvs-tcp`.
    fn name(&self) -> &str;

    /// What its measurements count.
    fn unit(&self) -> Unit {
        Unit::OperationsPerSecond
    }

    /// Measures one round.
    ///
    /// # Errors
    /// Whatever keeps it from being measured, a wrong answer among it.
    fn measure(&mut self, span: &Span) -> anyhow::Result<Measurement>;
}

/// The targets of a case, ready to be measured, and what isn't here and why.
pub struct Ready {
    /// Those that are here.
    pub targets: Vec<Box<dyn Target>>,
    /// What to say of each that isn't.
    pub missing: Vec<String>,
}

/// What a round gives.
#[derive(Debug, Clone)]
pub enum Measurement {
    /// Requests, their time and latencies.
    Load(Sample),
    /// A single figure, in the target's unit.
    Figure(f64),
}

/// How long a round takes, and what ends it early.
#[derive(Debug, Clone)]
pub struct Span {
    /// Time before anything counts.
    pub warm_up: Duration,
    /// Time that counts.
    pub duration: Duration,
    /// Set when the user wants the end.
    pub interrupted: Interrupted,
}

/// Whether the user wants the end (Ctrl-C, SIGTERM).
#[derive(Debug, Clone, Default)]
pub struct Interrupted(Arc<AtomicBool>);

impl Interrupted {
    /// The flag, for a signal handler to set.
    pub fn flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.0)
    }

    /// Whether it is set.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// An error once it is set.
    ///
    /// # Errors
    /// When the user wants the end.
    pub fn check(&self) -> anyhow::Result<()> {
        anyhow::ensure!(!self.is_set(), "interrupted; nothing was kept");
        Ok(())
    }
}
