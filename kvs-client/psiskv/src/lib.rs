//! C library of kvs.
