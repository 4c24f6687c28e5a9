//! Dying between two stores, for tests: the thread panics before its n-th store into shared memory, and what it has stored by
//! then is what a killed process would have left. A lock it held is freed by unwinding instead of by its successor.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

thread_local! {
    static STORES_LEFT: Cell<Option<u64>> = const { Cell::new(None) };
}

struct Crash;

/// Called before every store.
pub fn before_store() {
    STORES_LEFT.with(|left| match left.get() {
        None => {}
        Some(0) => {
            left.set(None);
            // Not `panic!`: nobody wants a thousand messages.
            resume_unwind(Box::new(Crash));
        }
        Some(count) => left.set(Some(count - 1)),
    });
}

/// Runs `action` and lets it die before its store number `stores` (0: the first); None when it did.
pub fn die_before<R>(stores: u64, action: impl FnOnce() -> R) -> Option<R> {
    STORES_LEFT.set(Some(stores));
    let done = catch_unwind(AssertUnwindSafe(action));
    STORES_LEFT.set(None);
    match done {
        Ok(result) => Some(result),
        Err(payload) if payload.is::<Crash>() => None,
        Err(payload) => resume_unwind(payload),
    }
}
