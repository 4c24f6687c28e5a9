//! The segment module.
