//! What becomes of descriptors that arrive when there was room for fewer: `nix` against `rustix`.
//!
//! Method: four descriptors are sent in one message, the receiver has room for two, and drops whatever it was given. Then
//! the open descriptors of this process are counted. Repeated, because a leak is what adds up.

use std::fs;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

const MESSAGES: usize = 100;
const SENT: usize = 4;
const ROOM: usize = 2;

fn main() {
    println!("{MESSAGES} messages with {SENT} descriptors each, room for {ROOM}:");
    println!("  nix 0.31:   {} descriptors left open", left_open(receive_with_nix));
    println!("  rustix 1.1: {} descriptors left open", left_open(receive_with_rustix));
}

fn left_open(receive: fn(&UnixStream)) -> usize {
    let (sender, receiver) = UnixStream::pair().expect("make sockets");
    let before = open_descriptors();
    for _ in 0..MESSAGES {
        send(&sender);
        receive(&receiver);
    }
    open_descriptors() - before
}

fn open_descriptors() -> usize {
    fs::read_dir("/proc/self/fd").expect("list descriptors").count()
}

fn send(sender: &UnixStream) {
    let descriptors: [BorrowedFd<'_>; SENT] = [sender.as_fd(); SENT];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SENT))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)));
    sendmsg(sender, &[IoSlice::new(b"x")], &mut ancillary, SendFlags::empty()).expect("send");
}

/// `cmsgs` refuses a truncated message as a whole, so the caller never learns the numbers of what the kernel installed.
fn receive_with_nix(receiver: &UnixStream) {
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
    let mut space = nix::cmsg_space!([std::os::fd::RawFd; ROOM]);
    let mut byte = [0];
    let mut buffers = [IoSliceMut::new(&mut byte)];
    let message =
        recvmsg::<()>(receiver.as_raw_fd(), &mut buffers, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)
            .expect("receive");
    for descriptors in message.cmsgs().into_iter().flatten() {
        if let ControlMessageOwned::ScmRights(numbers) = descriptors {
            numbers.into_iter().for_each(close);
        }
    }
}

fn close(number: std::os::fd::RawFd) {
    use std::os::fd::FromRawFd;
    // SAFETY: the number was just received and nothing else owns it.
    drop(unsafe { OwnedFd::from_raw_fd(number) });
}

fn receive_with_rustix(receiver: &UnixStream) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(ROOM))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(receiver, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)
        .expect("receive");
    drop(ancillary);
}
