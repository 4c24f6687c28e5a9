//! The connection module.
