//! `libpsiskv`: five functions for C programs, described in `kvs-client/include/psiskv.h`, and three that read from shared memory, in
//! `local`.
//!
//! Invariants: no panic crosses into C; nothing is read or written through a pointer that is null or beyond the length that came with
//! it; whatever the arguments are, an error is -1 and no crash.
#![allow(unsafe_code)]

mod descriptors;
mod local;

use std::ffi::{CStr, c_char, c_int};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use kvs_client::{Client, ConnectOptions, Error};

const ERROR: c_int = -1;
/// The key exists, or doesn't.
const NO: c_int = -2;

/// How long a lost connection is sought again, in milliseconds.
const RETRY_VARIABLE: &str = "KVS_RETRY_MS";

/// Whether `kv_read` reads from the server's shared memory where that can be done: 1.
const LOCAL_READS_VARIABLE: &str = "KVS_LOCAL_READS";

/// How to connect, as the environment says now.
fn options() -> ConnectOptions {
    let wanted = std::env::var(RETRY_VARIABLE).ok().and_then(|text| text.trim().parse().ok());
    let local = std::env::var(LOCAL_READS_VARIABLE).is_ok_and(|text| text.trim() == "1");
    let options = ConnectOptions::new().local_reads(local);
    match wanted {
        Some(wanted) => options.retry_for(Duration::from_millis(wanted)),
        None => options,
    }
}

/// Runs a call; whatever panics is an error, not the end of the caller's program.
fn call(body: impl FnOnce() -> Option<c_int>) -> c_int {
    catch_unwind(AssertUnwindSafe(body)).ok().flatten().unwrap_or(ERROR)
}

/// Runs a call with the client of `descriptor` and the key's bytes: a number N is the key N in decimal.
fn with_client(
    descriptor: c_int,
    key: u32,
    body: impl FnOnce(&mut Client, &[u8]) -> Result<c_int, Error>,
) -> c_int {
    call(|| {
        let entry = descriptors::get(descriptor)?;
        let mut client = entry.client()?;
        body(&mut client, key.to_string().as_bytes()).ok()
    })
}

/// Copies what there is room for of a stored value to where C wants it; gives the length of the whole.
///
/// # Safety
/// min(length of `stored`, `value_length`) bytes can be written to `value`, none of which is among those of `stored`; it may be null
/// when `value_length` is 0.
unsafe fn hand_out(stored: &[u8], value: *mut c_char, value_length: u32) -> c_int {
    let count = stored.len().min(value_length as usize);
    if count > 0 {
        // SAFETY: `value_length` isn't 0, so by contract `value` isn't null, so many bytes can be written there, and nothing overlaps.
        unsafe { std::ptr::copy_nonoverlapping(stored.as_ptr(), value.cast::<u8>(), count) };
    }
    c_int::try_from(stored.len()).unwrap_or(ERROR)
}

/// Connects; see the header.
///
/// # Safety
/// `kv_server_ip` is null or points to a text that ends with a zero.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kv_connect(kv_server_ip: *mut c_char, kv_server_port: c_int) -> c_int {
    call(|| {
        if kv_server_ip.is_null() {
            return None;
        }
        // SAFETY: not null, and by contract a text that ends with a zero.
        let host = unsafe { CStr::from_ptr(kv_server_ip) }.to_str().ok()?;
        let port = u16::try_from(kv_server_port).ok().filter(|&port| port > 0)?;
        // An address of IPv6 is written in brackets before a port.
        let address = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
        let client = options().connect(address).ok()?;
        descriptors::insert(client)
    })
}

/// Closes; see the header.
#[unsafe(no_mangle)]
pub extern "C" fn kv_close(kv_descriptor: c_int) {
    call(|| {
        descriptors::remove(kv_descriptor);
        Some(0)
    });
}

/// Stores; see the header.
///
/// # Safety
/// `value` is null or points to `value_length` bytes that can be read.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kv_write(
    kv_descriptor: c_int,
    key: u32,
    value: *mut c_char,
    value_length: u32,
    kv_overwrite: c_int,
) -> c_int {
    if value.is_null() && value_length > 0 {
        return ERROR;
    }
    let value: &[u8] = if value_length == 0 {
        &[]
    } else {
        // SAFETY: not null, and by contract so many bytes can be read.
        unsafe { std::slice::from_raw_parts(value.cast::<u8>(), value_length as usize) }
    };
    with_client(kv_descriptor, key, |client, key| {
        if kv_overwrite == 0 {
            return client.set_if_absent(key, value).map(|stored| if stored { 0 } else { NO });
        }
        client.set(key, value).map(|()| 0)
    })
}

/// Reads; see the header.
///
/// # Safety
/// `value` is null or points to min(length of the stored value, `value_length`) bytes that can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kv_read(
    kv_descriptor: c_int,
    key: u32,
    value: *mut c_char,
    value_length: u32,
) -> c_int {
    if value.is_null() && value_length > 0 {
        return ERROR;
    }
    with_client(kv_descriptor, key, |client, key| {
        let Some(stored) = client.get(key)? else { return Ok(NO) };
        // SAFETY: not null with a length, as was just seen; else the caller's own contract, and the value just received overlaps
        // nothing of the caller's.
        Ok(unsafe { hand_out(&stored, value, value_length) })
    })
}

/// Removes; see the header.
#[unsafe(no_mangle)]
pub extern "C" fn kv_delete(kv_descriptor: c_int, key: u32) -> c_int {
    with_client(kv_descriptor, key, |client, key| {
        client.delete(key).map(|deleted| if deleted { 0 } else { ERROR })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn psiskv_bad_arguments_are_errors() {
        for descriptor in [0, -1, 1, 77, i32::MIN, i32::MAX] {
            let mut value = [0 as c_char; 4];
            // SAFETY: the buffer is as long as said, or null with a length, which is what is tried.
            unsafe {
                assert_eq!(kv_write(descriptor, 1, value.as_mut_ptr(), 4, 1), ERROR);
                assert_eq!(kv_write(descriptor, 1, std::ptr::null_mut(), 4, 1), ERROR);
                assert_eq!(kv_read(descriptor, 1, value.as_mut_ptr(), 4), ERROR);
                assert_eq!(kv_read(descriptor, 1, std::ptr::null_mut(), 4), ERROR);
            }
            assert_eq!(kv_delete(descriptor, 1), ERROR);
            kv_close(descriptor);
        }
        for port in [0, -1, 65_536, i32::MIN] {
            // SAFETY: a text that ends with a zero.
            assert_eq!(unsafe { kv_connect(c"127.0.0.1".as_ptr().cast_mut(), port) }, ERROR);
        }
        // SAFETY: null is allowed; the other text ends with a zero.
        unsafe {
            assert_eq!(kv_connect(std::ptr::null_mut(), 9999), ERROR);
            assert_eq!(kv_connect(c"no such host.invalid".as_ptr().cast_mut(), 9999), ERROR);
        }
    }
}
