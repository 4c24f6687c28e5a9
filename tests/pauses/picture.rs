//! Latency over time with the kills marked, drawn as SVG: ours above, Redis below, on the same scales.

use std::fmt::Write as _;
use std::path::Path;
use std::sync::Mutex;
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use kvs_harness::wait::SetOnDrop;

use super::figures::{grouped, readable};
use super::peers::{Peer, is_installed};
use super::speak::Speak;
use super::standbys;
use super::stores::{Kvs, Victim};
use super::watch::{Point, Watch};

/// What the picture shows, in seconds, and when servers are killed.
const SECONDS: f64 = 6.0;
const KILLS_OURS: [(f64, Victim); 5] = [
    (1.0, Victim::Data),
    (2.0, Victim::Front),
    (3.0, Victim::Data),
    (4.0, Victim::Both),
    (5.0, Victim::Data),
];
const KILL_REDIS: f64 = 1.0;

/// Places in the picture.
const LEFT: f64 = 78.0;
const WIDTH: f64 = 760.0;
const TOP: f64 = 66.0;
const HEIGHT: f64 = 190.0;
const GAP: f64 = 90.0;
/// Columns of a panel, each of which shows the median and the most of its time.
const COLUMNS: usize = 760;
/// The scale of latency, in powers of ten of a microsecond: 1 µs to 10 s.
const LEAST: f64 = 0.0;
const MOST: f64 = 7.0;

/// Colours in the middle between black and white, so that they can be read on both.
const INK: &str = "#7a7f87";
const OURS: &str = "#2a8fbd";
const THEIRS: &str = "#c2703d";
const KILL: &str = "#d33f49";

/// What one client has seen.
struct Run {
    title: String,
    colour: &'static str,
    begun: Instant,
    points: Vec<Point>,
    kills: Vec<(Instant, &'static str)>,
}

/// Measures both and draws them.
pub fn draw(file: &Path, entries: u64) -> Result<()> {
    ensure!(is_installed(Speak::Redis), "the picture shows Redis too, and redis-server is not installed");
    let runs = [ours(entries)?, redis(entries)?];
    for run in &runs {
        let longest = run.points.iter().map(|point| point.took).max().context("the client had no answer")?;
        println!("{}: {} answers, longest {}", run.title, run.points.len(), readable(longest));
    }
    std::fs::write(file, svg(&runs)).with_context(|| file.display().to_string())
}

fn ours(entries: u64) -> Result<Run> {
    let standby = standbys()[0];
    let mut kvs = Kvs::start(standby, entries)?;
    let title = format!("kvs, {} entries", grouped(entries));
    let address = kvs.store.ready().tcp;
    watched(Speak::Kvs, address, title, OURS, |begun, kills| {
        for (at, victim) in KILLS_OURS {
            let servers = kvs.await_whole();
            if victim == Victim::Both && servers.standby.is_none() {
                continue;
            }
            await_second(begun, at);
            kills.push((Instant::now(), victim.name()));
            kvs.kill(victim, servers);
        }
        Ok(())
    })
}

fn redis(entries: u64) -> Result<Run> {
    let mut peer = Peer::start(Speak::Redis, entries)?;
    let title = format!("Redis with its append-only file, {} entries", grouped(entries));
    let address = peer.address;
    watched(Speak::Redis, address, title, THEIRS, |begun, kills| {
        await_second(begun, KILL_REDIS);
        kills.push((Instant::now(), "redis-server"));
        peer.kill_and_start()
    })
}

fn await_second(begun: Instant, at: f64) {
    sleep(Duration::from_secs_f64(at).saturating_sub(begun.elapsed()));
}

/// Lets a client ask while `deeds` are done, and until the picture ends.
fn watched(
    speak: Speak,
    address: std::net::SocketAddr,
    title: String,
    colour: &'static str,
    deeds: impl FnOnce(Instant, &mut Vec<(Instant, &'static str)>) -> Result<()>,
) -> Result<Run> {
    let (watch, points, mut kills) = (Watch::default(), Mutex::new(Vec::new()), Vec::new());
    let begun = scope(|scope| {
        let _ends = SetOnDrop(watch.over());
        scope.spawn(|| watch.run(speak, address, Some(&mut points.lock().expect("only this thread has it"))));
        watch.await_answers(Instant::now(), Duration::from_millis(500));
        let begun = Instant::now();
        deeds(begun, &mut kills)?;
        await_second(begun, SECONDS);
        anyhow::Ok(begun)
    })?;
    watch.into_gaps()?;
    Ok(Run { title, colour, begun, points: points.into_inner().expect("the thread has ended"), kills })
}

/// Where a moment is, from left to right.
fn x(seconds: f64) -> f64 {
    LEFT + WIDTH * seconds / SECONDS
}

/// Where a latency is, from the top of a panel.
fn y(top: f64, took: Duration) -> f64 {
    let power = (took.as_secs_f64() * 1e6).max(1.0).log10().clamp(LEAST, MOST);
    top + HEIGHT * (MOST - power) / (MOST - LEAST)
}

fn svg(runs: &[Run]) -> String {
    let (width, height) = (LEFT + WIDTH + 20.0, TOP + runs.len() as f64 * (HEIGHT + GAP) - GAP + 30.0);
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" \
         font-family=\"system-ui, sans-serif\" font-size=\"12\" fill=\"{INK}\">\n"
    );
    for (at, run) in runs.iter().enumerate() {
        let top = TOP + at as f64 * (HEIGHT + GAP);
        scales(&mut text, top, run);
        curve(&mut text, top, run);
        marks(&mut text, top, run);
    }
    text.push_str("</svg>\n");
    text
}

/// Title, lines of the scales and what they say.
fn scales(text: &mut String, top: f64, run: &Run) {
    _ = writeln!(
        text,
        "<text x=\"{LEFT}\" y=\"{:.0}\" font-size=\"15\" font-weight=\"600\" fill=\"{}\">{}</text>",
        top - 40.0,
        run.colour,
        run.title
    );
    for (power, name) in (0..).zip(["1 µs", "10 µs", "100 µs", "1 ms", "10 ms", "100 ms", "1 s", "10 s"]) {
        let at = y(top, Duration::from_secs_f64(10f64.powi(power) / 1e6));
        _ = writeln!(
            text,
            "<path d=\"M{LEFT} {at:.1}h{WIDTH}\" stroke=\"{INK}\" stroke-opacity=\".3\" stroke-width=\".6\"/>\
             <text x=\"{:.0}\" y=\"{:.1}\" text-anchor=\"end\">{name}</text>",
            LEFT - 8.0,
            at + 4.0
        );
    }
    for second in 0..=SECONDS as u32 {
        _ = writeln!(
            text,
            "<text x=\"{:.1}\" y=\"{:.0}\" text-anchor=\"middle\">{second} s</text>",
            x(f64::from(second)),
            top + HEIGHT + 18.0
        );
    }
}

/// For each column a line from the median of its answers to the slowest, and the medians joined.
fn curve(text: &mut String, top: f64, run: &Run) {
    let mut columns: Vec<Vec<Duration>> = vec![Vec::new(); COLUMNS];
    for point in &run.points {
        let column = point.at.saturating_duration_since(run.begun).as_secs_f64() / SECONDS * COLUMNS as f64;
        if point.at >= run.begun && column < COLUMNS as f64 {
            columns[column as usize].push(point.took);
        }
    }
    let (mut bars, mut medians, mut joined) = (String::new(), String::new(), false);
    for (column, answers) in columns.iter_mut().enumerate() {
        answers.sort_unstable();
        let Some(most) = answers.last() else {
            // Nothing was answered here: the line breaks.
            joined = false;
            continue;
        };
        let at = x((column as f64 + 0.5) / COLUMNS as f64 * SECONDS);
        let (median, most) = (y(top, answers[answers.len() / 2]), y(top, *most));
        _ = write!(bars, "M{at:.1} {median:.1}V{most:.1}");
        _ = write!(medians, "{}{at:.1} {median:.1}", if joined { "L" } else { "M" });
        joined = true;
    }
    let colour = run.colour;
    _ = writeln!(text, "<path d=\"{bars}\" stroke=\"{colour}\" stroke-opacity=\".55\" fill=\"none\"/>");
    _ = writeln!(text, "<path d=\"{medians}\" stroke=\"{colour}\" stroke-width=\"1.6\" fill=\"none\"/>");
    silence(text, top, run);
}

/// Where nothing was answered for long, what that looks like to the client.
fn silence(text: &mut String, top: f64, run: &Run) {
    let long = run.points.iter().filter(|point| point.at >= run.begun && point.took.as_millis() >= 100);
    for point in long {
        let (from, to) = (point.at - point.took, point.at);
        let at = |moment: Instant| x(moment.saturating_duration_since(run.begun).as_secs_f64().min(SECONDS));
        let level = y(top, point.took);
        _ = writeln!(
            text,
            "<rect x=\"{:.1}\" y=\"{top}\" width=\"{:.1}\" height=\"{HEIGHT}\" fill=\"{KILL}\" fill-opacity=\".12\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\">no answer for {}</text>",
            at(from),
            at(to) - at(from),
            at(from) + 8.0,
            level - 6.0,
            readable(point.took)
        );
    }
}

/// The kills, each with what the client waited around it.
fn marks(text: &mut String, top: f64, run: &Run) {
    for (moment, whom) in &run.kills {
        let at = x(moment.saturating_duration_since(run.begun).as_secs_f64());
        let near = run.points.iter().filter(|point| {
            point.at >= *moment && point.at - point.took <= *moment + Duration::from_millis(100)
        });
        let wait = near.map(|point| point.took).max().map_or_else(String::new, readable);
        _ = writeln!(
            text,
            "<path d=\"M{at:.1} {:.0}V{:.0}\" stroke=\"{KILL}\" stroke-width=\"1.2\" stroke-dasharray=\"4 3\"/>\
             <text text-anchor=\"middle\" fill=\"{KILL}\"><tspan x=\"{at:.1}\" y=\"{:.0}\">kill -9 {whom}</tspan>\
             <tspan x=\"{at:.1}\" y=\"{:.0}\">{wait}</tspan></text>",
            top - 4.0,
            top + HEIGHT,
            top - 21.0,
            top - 8.0
        );
    }
}
