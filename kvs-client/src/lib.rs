//! Client of kvs.
