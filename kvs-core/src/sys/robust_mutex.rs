//! The robust_mutex module.
