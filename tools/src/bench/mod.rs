//! `bench`: the same load for kvs and its peers, side by side in one run.
//!
//! | module | what it is |
//! |---|---|
//! | [`scenario`] | the canonical cases: load, targets, promises |
//! | [`workload`], [`zipf`] | which keys and values, from seeds |
//! | [`target`] | what can be measured |
//! | [`in_process`] | targets without a socket |
//! | [`results`] | medians, spread, ratios |
//! | [`claim`] | promises, and whether they were kept |
#![allow(dead_code)]

mod claim;
mod in_process;
mod results;
mod scenario;
mod target;
mod workload;
mod zipf;
