//! The check module.
