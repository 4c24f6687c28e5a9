//! What a broken promise looks like.

use std::fmt;

/// A promise that was broken.
#[derive(Debug)]
pub struct Violation(pub String);

impl fmt::Display for Violation {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "violation: {}", self.0)
    }
}

impl std::error::Error for Violation {}

/// Fails with a [`Violation`] unless the condition holds.
macro_rules! demand {
    ($condition:expr, $($what:tt)+) => {
        if !$condition {
            return Err($crate::violation::Violation(format!($($what)+)).into());
        }
    };
}
pub(crate) use demand;

/// Makes every error of `result` a [`Violation`]: for what must not fail, whatever the image.
pub fn must<R, E: fmt::Display>(what: &str, result: Result<R, E>) -> Result<R, Violation> {
    result.map_err(|error| Violation(format!("{what}: {error}")))
}

/// Says that a promise was broken.
pub fn violation(what: impl Into<String>) -> anyhow::Error {
    Violation(what.into()).into()
}
