//! The memory module.
