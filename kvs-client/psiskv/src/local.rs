//! Reads from the shared memory, described in `kvs-client/include/psiskv_local.h`.
//!
//! Invariants: those of the crate, and a read takes no lock that a reader of another descriptor takes, allocates nothing once its
//! room is as large as the value, and makes no system call.
//!
//! Lock: each descriptor's own, for a call.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvs_client::LocalReader;

use super::{ERROR, NO, call, hand_out};

/// Most descriptors at a time.
const READERS_MAX: usize = 1024;
/// Digits of the longest key.
const DIGITS_MAX: usize = 10;

struct Open {
    reader: LocalReader,
    value: Vec<u8>,
}

static READERS: [Mutex<Option<Open>>; READERS_MAX] = [const { Mutex::new(None) }; READERS_MAX];

fn lock(place: &Mutex<Option<Open>>) -> MutexGuard<'_, Option<Open>> {
    place.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where the reader of a descriptor is kept.
fn place_of(descriptor: c_int) -> Option<&'static Mutex<Option<Open>>> {
    READERS.get(usize::try_from(descriptor).ok()?.checked_sub(1)?)
}

/// Opens; see the header.
///
/// # Safety
/// `name` is null or points to a text that ends with a zero.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kv_local_open(name: *const c_char) -> c_int {
    call(|| {
        if name.is_null() {
            return None;
        }
        // SAFETY: not null, and by contract a text that ends with a zero.
        let name = unsafe { CStr::from_ptr(name) }.to_str().ok()?;
        let reader = LocalReader::open(name).ok()?;
        // One that is locked is in use.
        let free = |place: &'static Mutex<Option<Open>>| place.try_lock().ok().filter(|open| open.is_none());
        let (index, mut place) =
            READERS.iter().enumerate().find_map(|(index, place)| Some((index, free(place)?)))?;
        *place = Some(Open { reader, value: Vec::new() });
        c_int::try_from(index + 1).ok()
    })
}

/// Closes; see the header.
#[unsafe(no_mangle)]
pub extern "C" fn kv_local_close(kv_local: c_int) {
    call(|| {
        *lock(place_of(kv_local)?) = None;
        Some(0)
    });
}

/// Reads; see the header.
///
/// # Safety
/// `value` is null or points to min(length of the stored value, `value_length`) bytes that can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kv_local_read(
    kv_local: c_int,
    key: u32,
    value: *mut c_char,
    value_length: u32,
) -> c_int {
    if value.is_null() && value_length > 0 {
        return ERROR;
    }
    call(|| {
        let mut place = lock(place_of(kv_local)?);
        let Open { reader, value: stored } = place.as_mut()?;
        let mut digits = [0; DIGITS_MAX];
        if !reader.get_into(decimal(key, &mut digits), stored).ok()? {
            return Some(NO);
        }
        // SAFETY: not null with a length, as was just seen; else the caller's own contract, and the reader's room overlaps nothing
        // of the caller's.
        Some(unsafe { hand_out(stored, value, value_length) })
    })
}

/// The number in decimal, without asking for memory.
fn decimal(mut number: u32, digits: &mut [u8; DIGITS_MAX]) -> &[u8] {
    let mut start = DIGITS_MAX;
    loop {
        start -= 1;
        digits[start] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            return &digits[start..];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn psiskv_local_keys_are_decimal() {
        for number in [0, 7, 10, 35, 4_294_967_295] {
            assert_eq!(decimal(number, &mut [0; DIGITS_MAX]), number.to_string().as_bytes());
        }
    }

    #[test]
    fn psiskv_local_bad_arguments_are_errors() {
        for descriptor in [0, -1, 1, 1024, 1025, i32::MIN, i32::MAX] {
            let mut value = [0 as c_char; 4];
            // SAFETY: the buffer is as long as said, or null with a length, which is what is tried.
            unsafe {
                assert_eq!(kv_local_read(descriptor, 1, value.as_mut_ptr(), 4), ERROR);
                assert_eq!(kv_local_read(descriptor, 1, std::ptr::null_mut(), 4), ERROR);
            }
            kv_local_close(descriptor);
        }
        // SAFETY: null is allowed; the others end with a zero.
        unsafe {
            assert_eq!(kv_local_open(std::ptr::null()), ERROR);
            assert_eq!(kv_local_open(c"../no".as_ptr()), ERROR);
            assert_eq!(kv_local_open(c"no-such-instance-anywhere".as_ptr()), ERROR);
        }
    }
}
