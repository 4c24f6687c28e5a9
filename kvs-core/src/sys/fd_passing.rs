//! The fd_passing module.
