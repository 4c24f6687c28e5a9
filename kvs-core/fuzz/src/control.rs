//! What the two servers say to each other.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;

use kvs_core::control::{self, DataMessage, FrontMessage, Message};
use kvs_core::sys::fd_passing::{self, Wait};

/// A packet between the servers, with as many descriptors as the first byte says. What is received is sent again, and then
/// received as the same.
pub fn control(input: &[u8]) {
    let Some((&descriptors, packet @ [_, ..])) = input.split_first() else { return };
    let packet = &packet[..packet.len().min(control::MESSAGE_BYTES_MAX)];
    let file = File::open("/dev/null").expect("it is always there");
    let descriptors = vec![file.as_fd(); usize::from(descriptors) % 8];
    pass::<FrontMessage>(packet, &descriptors);
    pass::<DataMessage>(packet, &descriptors);
}

fn pass<M: Message + PartialEq + std::fmt::Debug>(packet: &[u8], descriptors: &[BorrowedFd<'_>]) {
    let (here, there) = UnixDatagram::pair().expect("a pair");
    fd_passing::send(here.as_fd(), packet, descriptors, Wait::Yes).expect("room");
    let Ok(received) = control::receive::<M>(there.as_fd()) else { return };
    let (message, files) = received.expect("no packet is empty");
    assert_eq!(files.len(), descriptors.len());
    let files: Vec<BorrowedFd> = files.iter().map(AsFd::as_fd).collect();
    control::send(here.as_fd(), &message, &files).expect("it came the same way");
    let (again, _) = control::receive::<M>(there.as_fd()).expect("sent just so").expect("not the end");
    assert_eq!(again, message);
}
