//! One situation after the other: kills, and as many times of the same length without.

use std::thread::scope;
use std::time::{Duration, Instant};

use anyhow::Result;
use kvs_harness::connection::{Connection, get};
use kvs_harness::wait::SetOnDrop;

use super::figures::Row;
use super::peers::Peer;
use super::speak::Speak;
use super::stores::{Kvs, Victim};
use super::watch::{Gaps, Watch};

/// How long the client is looked at from a kill on, and as long without one.
const WINDOW: Duration = Duration::from_millis(100);
/// Connections of the peers: they lose all of them, however many there are.
const PEER_CONNECTIONS: usize = 1;

/// Which windows are those of kills, and which are calm.
#[derive(Default)]
struct Windows {
    kills: Vec<u64>,
    calm: Vec<u64>,
}

impl Windows {
    fn calm(&mut self, watch: &Watch) {
        self.calm.push(watch.open_window());
        watch.await_answers(Instant::now(), WINDOW);
    }

    fn kill(&mut self, watch: &Watch, kill: impl FnOnce() -> Result<()>) -> Result<()> {
        watch.check()?;
        self.kills.push(watch.open_window());
        let start = Instant::now();
        kill()?;
        watch.await_answers(start, WINDOW);
        // What is done until the next one is not counted.
        watch.open_window();
        Ok(())
    }
}

/// Measures `deeds` beside a client of the store at `address`: the windows and what they say of it.
fn beside_client(
    speak: Speak,
    address: std::net::SocketAddr,
    deeds: impl FnOnce(&Watch, &mut Windows) -> Result<()>,
) -> Result<(Vec<Gaps>, Vec<Gaps>, u64)> {
    let (watch, mut windows) = (Watch::default(), Windows::default());
    scope(|scope| {
        let _ends = SetOnDrop(watch.over());
        scope.spawn(|| watch.run(speak, address, None));
        watch.await_answers(Instant::now(), WINDOW);
        deeds(&watch, &mut windows)?;
        watch.check()
    })?;
    let lost = watch.lost();
    let gaps = watch.into_gaps()?;
    let of =
        |windows: &[u64]| windows.iter().filter_map(|window| gaps.get(*window as usize)).copied().collect();
    Ok((of(&windows.kills), of(&windows.calm), lost))
}

/// Kills servers of our store beside `connections` clients, all but one of them idle.
pub fn ours(kvs: &mut Kvs, victim: Victim, entries: u64, connections: usize, kills: usize) -> Result<Row> {
    let mut idle: Vec<Connection> = (1..connections).map(|_| kvs.store.connect()).collect();
    let address = kvs.store.ready().tcp;
    let (gaps, calm, lost) = beside_client(Speak::Kvs, address, |watch, windows| {
        for _ in 0..kills {
            let servers = kvs.await_whole();
            windows.calm(watch);
            windows.kill(watch, || {
                kvs.kill(victim, servers);
                Ok(())
            })?;
        }
        kvs.await_whole();
        Ok(())
    })?;
    let lost_idle = idle.iter_mut().filter_map(|client| client.ask(&get(b"counter")).err()).count();
    let found = kvs.store.place().statistics()["entries"].as_u64().unwrap_or(0);
    let standby = if kvs.has_standby { "kvs, standby" } else { "kvs, no standby" };
    Ok(Row {
        store: standby.into(),
        victim: victim.name(),
        entries,
        connections,
        gaps,
        calm,
        connections_lost: lost + lost_idle as u64,
        keys_lost: (entries + 1).saturating_sub(found),
    })
}

/// Kills a peer, and starts it again at once.
pub fn peer(peer: &mut Peer, name: &str, entries: u64, kills: usize) -> Result<Row> {
    let (mut keys_lost, speak, address) = (0, peer.speak, peer.address);
    let (gaps, calm, lost) = beside_client(speak, address, |watch, windows| {
        for _ in 0..kills {
            peer.fill_if_empty(entries)?;
            windows.calm(watch);
            windows.kill(watch, || peer.kill_and_start())?;
            keys_lost = keys_lost.max((entries + 1).saturating_sub(peer.keys()?));
        }
        Ok(())
    })?;
    Ok(Row {
        store: name.into(),
        victim: "the server",
        entries,
        connections: PEER_CONNECTIONS,
        gaps,
        calm,
        connections_lost: lost,
        keys_lost: keys_lost.min(entries),
    })
}
