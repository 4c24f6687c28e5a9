//! The arena module.
