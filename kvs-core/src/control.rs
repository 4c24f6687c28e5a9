//! The control module.
