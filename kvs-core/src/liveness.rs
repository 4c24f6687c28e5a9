//! The liveness module.
