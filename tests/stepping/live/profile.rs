//! One way of the worker from its wait to its next one: which instructions, what they change, what the kernel does for them.

use std::collections::HashMap;

use nix::libc;

use super::servers::{Positions, Servers};
use crate::pages::{Pages, Watch};
use crate::tracee::{Event, Path, Tracee};

/// Instructions of one way at most.
const LENGTH_MAX: usize = 2_000_000;
/// What `sendmmsg` gives when it sent its only message.
const ONE: i64 = 1;

/// What one way was.
pub struct Profile {
    /// Its instructions.
    pub path: Path,
    /// Those directly before and after each system call and each change of the segment.
    pub edges: Vec<usize>,
    /// Before each instruction: what was really taken from the client's socket, and given to it, since the way began.
    pub moved: Vec<(u32, u32)>,
}

impl Profile {
    /// Steps `worker`, which comes from its wait, to the next one. `pages` is where changes are looked for.
    ///
    /// # Errors
    /// When it ends.
    pub fn record(servers: &Servers, worker: &mut Tracee, pages: &Pages) -> anyhow::Result<Self> {
        let mut watch = Watch::new(servers.view.view(), pages)?;
        let (mut addresses, mut edges, mut moved) = (Vec::new(), Vec::new(), Vec::new());
        // Which instructions are calls.
        let mut known = HashMap::<u64, bool>::new();
        let (mut socket, mut total) = (None, (0u32, 0u32));
        while addresses.len() < LENGTH_MAX {
            let (index, at) = (addresses.len(), worker.instruction()?);
            addresses.push(at);
            moved.push(total);
            let call = match known.get(&at) {
                Some(false) => None,
                _ => worker.next_call(at)?,
            };
            known.insert(at, call.is_some());
            if worker.step()? == Event::Asleep {
                edges.push(index);
                break;
            }
            if let Some((number, descriptor)) = call {
                let result = worker.call_result()?;
                note_call(servers, (number, descriptor, result), &mut socket, &mut total)?;
            }
            if watch.changed(servers.view.view(), |_| {})? || call.is_some() {
                edges.extend([index, index + 1]);
            }
        }
        edges.sort_unstable();
        edges.dedup();
        edges.retain(|edge| *edge < addresses.len());
        Ok(Self { path: Path::new(addresses), edges, moved })
    }

    /// Whether the kernel knew more of the client's stream at instruction `index` than its slot, input and output.
    pub fn is_ahead(&self, index: usize, before: Positions, now: Positions) -> (bool, bool) {
        let (received, sent) = self.moved[index];
        (now.received < before.received + u64::from(received), now.sent < before.sent + u64::from(sent))
    }
}

/// Notes what a call moved on the client's socket, which is the first that is received from or sent to.
fn note_call(
    servers: &Servers,
    (number, descriptor, result): (i64, u64, i64),
    socket: &mut Option<u64>,
    total: &mut (u32, u32),
) -> anyhow::Result<()> {
    let receives = [libc::SYS_recvfrom, libc::SYS_recvmsg].contains(&number);
    let sends = [libc::SYS_sendto, libc::SYS_sendmsg, libc::SYS_sendmmsg].contains(&number);
    if !(receives || sends) || *socket.get_or_insert(descriptor) != descriptor || result <= 0 {
        return Ok(());
    }
    let bytes =
        if number == libc::SYS_sendmmsg && result == ONE { servers.counted()? } else { result as u64 };
    if receives {
        total.0 += bytes as u32;
    } else {
        total.1 += bytes as u32;
    }
    Ok(())
}
