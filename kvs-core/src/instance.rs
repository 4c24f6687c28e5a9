//! The instance module.
