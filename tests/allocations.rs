//! The promise: the data server takes no memory of its own for a request: what it needs is there already, or in the segment.
//!
//! Method: an allocator that counts; a connection on a segment in memory gets batches of small requests. After the first batches,
//! which size its buffers, nothing is allocated any more.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use kvs_core::connection::Connection;
use kvs_core::connection::context::{Context, Statistics};
use kvs_core::control::{Adopted, StatisticOwned, Transport};
use kvs_core::segment::Segment;
use kvs_core::segment::layout::WorkerSlot;
use kvs_core::table::Table;
use kvs_core::wire::{PROTOCOL, Request, RequestBody, SetCondition, encode_request};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

fn count() {
    // A thread that ends allocates without being counted.
    let _ = ALLOCATIONS.try_with(|allocations| allocations.set(allocations.get() + 1));
}

// SAFETY: everything is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise about `layout` is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as above; `block` came from the system's allocator.
        unsafe { System.realloc(block, layout, size) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

struct NoStatistics;

impl Statistics for NoStatistics {
    fn statistics(&self) -> Vec<(String, StatisticOwned)> {
        Vec::new()
    }
}

/// Takes in `requests`, which fit the input buffer, executes them, and takes the answers away; returns their bytes.
fn serve<'s>(connection: &mut Connection<'s>, context: &mut Context<'s>, requests: &[u8]) -> usize {
    let (first, second) = connection.input_space(context).expect("sound");
    let (head, tail) = requests.split_at(requests.len().min(first.len()));
    first[..head.len()].copy_from_slice(head);
    second[..tail.len()].copy_from_slice(tail);
    connection.received(requests.len() as u64);
    let mut answered = 0;
    loop {
        connection.execute(context).expect("sound");
        let pending: usize = connection.pending(context).expect("sound").iter().map(|part| part.len()).sum();
        if pending == 0 {
            return answered;
        }
        connection.sent(context, pending as u64).expect("sound");
        answered += pending;
    }
}

fn batch(of: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    for number in 0..24u64 {
        let key = format!("key {}", (of * 7 + number) % 500).into_bytes();
        let value = vec![b'v'; (number * 37 % 900) as usize];
        let body = match number % 4 {
            0 | 1 => RequestBody::Get { key: &key },
            2 => RequestBody::Set { condition: SetCondition::Always, key: &key, value: &value },
            _ => RequestBody::Delete { key: &key },
        };
        encode_request(&mut bytes, &Request { number: number as u32, body });
        let by = RequestBody::Increment { key: b"counter", by: 1 };
        encode_request(&mut bytes, &Request { number: 1000, body: by });
    }
    bytes
}

/// Batches after which every buffer that is used again has been as large as it ever is.
const WARM_UP: usize = 250;

#[test]
fn requests_are_served_without_allocating() {
    let segment = Segment::on_heap(64 << 20).expect("heap memory");
    segment.claim_worker(0).expect("heap memory");
    let table = Table::new(&segment).expect("just made");
    let worker: &WorkerSlot = segment.memory().object(segment.regions().worker(0)).expect("inside");
    let mut context = Context::new(&table, worker, &NoStatistics, 1 << 20, 8);
    let adopted = Adopted { connection: 1, transport: Transport::Tcp };
    let mut connection = Connection::open(&segment, 0, adopted).expect("room");
    let mut hello = Vec::new();
    let body = RequestBody::Hello { protocol: PROTOCOL, name: "test", pid: 1 };
    encode_request(&mut hello, &Request { number: 0, body });
    assert!(serve(&mut connection, &mut context, &hello) > 0);
    let batches: Vec<Vec<u8>> = (0..500).map(batch).collect();
    let mut allocations = Vec::new();
    for batch in &batches {
        let before = ALLOCATIONS.get();
        assert!(serve(&mut connection, &mut context, batch) > 48);
        allocations.push(ALLOCATIONS.get() - before);
    }
    let later: u64 = allocations[WARM_UP..].iter().sum();
    assert_eq!(later, 0, "allocations in the first batches: {:?}", &allocations[..WARM_UP]);
}
