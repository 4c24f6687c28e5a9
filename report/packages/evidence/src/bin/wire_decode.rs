//! What decoding a request costs: borrowed bytes against owned ones, a reused buffer against a new one.
//!
//! Method: one set request (16-byte key, 32-byte and 4 KiB value) is decoded and encoded in rounds.

use std::hint::black_box;

use kvs_package_evidence::{Spread, nanoseconds_each};
use serde::{Deserialize, Serialize};

/// As kvs does it: the fields point into the input buffer.
#[derive(Serialize, Deserialize)]
struct Borrowed<'a> {
    #[serde(borrow, with = "serde_bytes")]
    key: &'a [u8],
    #[serde(borrow, with = "serde_bytes")]
    value: &'a [u8],
}

/// Owned fields that serde fills byte by byte.
#[derive(Serialize, Deserialize)]
struct Owned {
    key: Vec<u8>,
    value: Vec<u8>,
}

/// Owned fields copied at once.
#[derive(Serialize, Deserialize)]
struct OwnedBytes {
    #[serde(with = "serde_bytes")]
    key: Vec<u8>,
    #[serde(with = "serde_bytes")]
    value: Vec<u8>,
}

fn main() {
    for length in [32, 4096] {
        report(&vec![7; length]);
    }
}

fn report(value: &[u8]) {
    println!("16-byte key, {}-byte value", value.len());
    let message = Borrowed { key: &[1; 16], value };
    let bytes = postcard::to_allocvec(&message).expect("encode");
    println!("  decode &[u8]                 {}", decode::<Borrowed>(&bytes));
    println!("  decode Vec<u8>               {}", decode::<Owned>(&bytes));
    println!("  decode Vec<u8>, serde_bytes  {}", decode::<OwnedBytes>(&bytes));
    println!("  encode into a reused buffer  {}", encode_into(&message));
    println!("  encode with to_allocvec      {}", encode_new(&message));
}

fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Spread {
    nanoseconds_each(15, 200_000, |count| {
        for _ in 0..count {
            black_box(postcard::from_bytes::<T>(black_box(bytes)).expect("decode"));
        }
    })
}

fn encode_into(message: &Borrowed) -> Spread {
    let mut buffer = [0; 8192];
    nanoseconds_each(15, 200_000, |count| {
        for _ in 0..count {
            black_box(postcard::to_slice(black_box(message), &mut buffer).expect("encode"));
        }
    })
}

fn encode_new(message: &Borrowed) -> Spread {
    nanoseconds_each(15, 200_000, |count| {
        for _ in 0..count {
            black_box(postcard::to_allocvec(black_box(message)).expect("encode"));
        }
    })
}
