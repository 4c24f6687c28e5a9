//! One mutation, instruction by instruction.
//!
//! It is executed several times by a child on a segment of its own, from the same beginning:
//! 1. at full speed and then stepwise with a look at everything now and then: which pages it touches, which instructions are
//!    the C library's;
//! 2. stepwise with a look at those pages after each instruction; each image goes to the [`Judge`]. At the end everything is
//!    looked at once more: nothing else may have changed;
//! 3. up to each instruction after which the image is another, and each within a lock or an unlock; there it is really killed;
//! 4. recovery of each image, executed by another child, likewise: what it leaves at each instruction is recovered in turn.

use std::collections::HashSet;
use std::ops::Range;
use std::time::Instant;

use anyhow::Context as _;
use kvs_harness::random::Random;

use crate::image::no_lock_blocks;
use crate::judge::Judge;
use crate::mutations::Mutation;
use crate::pages::{Pages, Watch, is_lock};
use crate::recoveries::Recoveries;
use crate::stage::Stage;
use crate::store::Expected;
use crate::tracee::{Event, Path};
use crate::violation::demand;

/// Instructions between two looks at everything.
const LOOK_EVERY: u64 = 16;

/// How much of what could be tried is tried.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// Real kills within a lock or an unlock, at points chosen at random when there are more.
    pub lock_kills_max: usize,
    /// Real kills elsewhere, likewise.
    pub kills_max: usize,
    /// Every so many-th recovery is stepped; none when 0.
    pub recoveries: u64,
    /// When to stop beginning anything new.
    pub until: Option<Instant>,
}

impl Effort {
    fn is_over(&self) -> bool {
        self.until.is_some_and(|until| until <= Instant::now())
    }
}

/// What was tried.
#[derive(Debug, Default, Clone, Copy)]
pub struct Tried {
    /// Instructions of the mutation after which the segment was looked at.
    pub points: u64,
    /// Of those, after which it, or the backup file, was another: each recovered and judged.
    pub images: u64,
    /// Of those, which recovery can tell apart.
    pub kinds: u64,
    /// Instructions of recovery after which its segment was looked at.
    pub recovery_points: u64,
    /// Of those, after which it was another: each recovered again and judged.
    pub recovery_images: u64,
    /// Real kills.
    pub kills: u64,
    /// Of those, within a lock or an unlock.
    pub lock_kills: u64,
    /// Of those, that left a lock held.
    pub held: u64,
    /// Of those, that were stepped to all the way.
    pub walked: u64,
    /// Of those at an image, that left another one than the stepwise run had there.
    pub other: u64,
}

impl Tried {
    /// Both together.
    pub fn plus(self, other: Self) -> Self {
        Self {
            points: self.points + other.points,
            images: self.images + other.images,
            kinds: self.kinds + other.kinds,
            recovery_points: self.recovery_points + other.recovery_points,
            recovery_images: self.recovery_images + other.recovery_images,
            kills: self.kills + other.kills,
            lock_kills: self.lock_kills + other.lock_kills,
            held: self.held + other.held,
            other: self.other + other.other,
            walked: self.walked + other.walked,
        }
    }
}

/// The instructions that a mutation executes.
struct Trace {
    /// Pages it touches.
    touched: Pages,
    /// Runs of the C library's instructions.
    library: Vec<Range<u64>>,
    path: Path,
}

/// A point worth a kill.
struct Point {
    step: u64,
    fingerprint: Option<u64>,
}

/// What the stepwise run found.
struct Walked {
    points: Vec<Point>,
    /// Steps at which a lock changed.
    lock_steps: Vec<u64>,
}

/// Tries `mutation`.
///
/// # Errors
/// A violation, or what kept it from being tried.
pub fn explore(mutation: &Mutation, effort: Effort, random: &mut Random) -> anyhow::Result<Tried> {
    let (mut stage, expected) = Stage::new(mutation)?;
    let mut tried = Tried::default();
    let Some((trace, mut judge)) = trace(&mut stage, &expected, effort)? else { return Ok(tried) };
    let mut recoveries = Recoveries::new(&stage, &trace.touched)?;
    let walked = walk(&stage, &trace, &mut judge, effort, &mut tried, &mut |judge, done, tried| {
        if effort.recoveries > 0 && random.once_in(effort.recoveries) && !effort.is_over() {
            judge.next_try_succeeds(done)?;
            recoveries.step_through(&stage, judge, done, tried)?;
        }
        Ok(())
    })?;
    kill_everywhere(&stage, &trace, &walked, &mut judge, effort, random, &mut tried)?;
    Ok(tried)
}

/// Finds out which pages the mutation touches, and where the C library's instructions are. None when the time is over.
fn trace<'e>(
    stage: &mut Stage,
    expected: &'e Expected,
    effort: Effort,
) -> anyhow::Result<Option<(Trace, Judge<'e>)>> {
    let mut child = stage.child()?;
    child.run()?;
    // What it takes from the kernel.
    for &page in Pages::reserved(&stage.shared.segment)?.offsets() {
        stage.pages.add(page);
    }
    child.kill()?;
    let mut child = stage.child()?;
    let judge = Judge::new(&stage.shared.segment, &stage.pages, expected)?;
    let regions = stage.shared.segment.regions();
    let mut touched = Pages::default();
    // A lock that is taken and freed leaves no trace.
    touched.add(0);
    for index in 0..regions.shard_count {
        touched.add(regions.shard(index).bytes());
    }
    let library = child.c_library()?;
    let (mut steps, mut runs, mut addresses) = (0, Vec::<Range<u64>>::new(), Vec::new());
    loop {
        let address = child.instruction()?;
        addresses.push(address);
        if library.contains(&address) {
            match runs.last_mut() {
                Some(run) if run.end == steps => run.end = steps + 1,
                _ => runs.push(steps..steps + 1),
            }
        }
        if child.step()? == Event::Stopped {
            break;
        }
        steps += 1;
        if steps % LOOK_EVERY == 0 {
            look(stage, &judge, &mut touched)?;
            if effort.is_over() {
                return Ok(None);
            }
        }
    }
    look(stage, &judge, &mut touched)?;
    Ok(Some((Trace { touched, library: runs, path: Path::new(addresses) }, judge)))
}

fn look(stage: &Stage, judge: &Judge<'_>, touched: &mut Pages) -> anyhow::Result<()> {
    for change in judge.changes_in(&stage.shared.segment)? {
        touched.add(change.offset);
    }
    Ok(())
}

type OnKind<'f> = dyn FnMut(&mut Judge<'_>, usize, &mut Tried) -> anyhow::Result<()> + 'f;

/// Steps through the mutation and judges each image; `on_kind` gets one of each kind.
fn walk(
    stage: &Stage,
    trace: &Trace,
    judge: &mut Judge<'_>,
    effort: Effort,
    tried: &mut Tried,
    on_kind: &mut OnKind<'_>,
) -> anyhow::Result<Walked> {
    let segment = &stage.shared.segment;
    let mut child = stage.child()?;
    judge.begin();
    let mut watch = Watch::new(segment.memory(), &trace.touched)?;
    let (mut walked, mut kinds) = (Walked { points: Vec::new(), lock_steps: Vec::new() }, HashSet::new());
    let (mut step, mut files, mut changes) = (0, stage.files()?, Vec::new());
    while child.step()? == Event::Stepped {
        step += 1;
        tried.points = step;
        if step % LOOK_EVERY == 0 && effort.is_over() {
            return Ok(walked);
        }
        let files_before = files;
        changes.clear();
        watch.changed(segment.memory(), |change| changes.push(change))?;
        files = stage.files()?;
        if changes.is_empty() && files == files_before {
            continue;
        }
        tried.images += 1;
        judge.take(segment)?;
        judge.follow(&changes).with_context(|| format!("after instruction {step}"))?;
        let judged = stage.judge(judge).with_context(|| format!("killed after instruction {step}"))?;
        walked.points.push(Point { step, fingerprint: Some(judge.fingerprint(&trace.touched)?) });
        let lock_changed = changes.iter().any(|change| is_lock(segment, change.offset));
        walked.lock_steps.extend(lock_changed.then_some(step));
        if kinds.insert(judged.kind) {
            tried.kinds += 1;
            on_kind(judge, judged.done, tried).with_context(|| format!("killed after instruction {step}"))?;
        }
    }
    let (has, known) = (stage.shared.memory_bytes()?, stage.pages.bytes());
    demand!(has <= known, "the segment has {has} bytes of memory, its header knows of {known}");
    for change in judge.changes_in(segment)? {
        demand!(!trace.touched.clone().add(change.offset), "page {:#x} changed unnoticed", change.offset);
    }
    Ok(walked)
}

/// The points of `walked`, and all those within a lock or an unlock.
fn kill_points(trace: &Trace, walked: &Walked) -> (Vec<Point>, HashSet<u64>) {
    let locking = |run: &&Range<u64>| walked.lock_steps.iter().any(|step| run.contains(&(step - 1)));
    let in_lock: HashSet<u64> =
        trace.library.iter().filter(locking).flat_map(|run| run.start..run.end + 1).collect();
    let changed: HashSet<u64> = walked.points.iter().map(|point| point.step).collect();
    let mut points: Vec<Point> = in_lock
        .difference(&changed)
        .map(|&step| Point { step, fingerprint: None })
        .chain(walked.points.iter().map(|point| Point { ..*point }))
        .collect();
    points.sort_unstable_by_key(|point| point.step);
    (points, in_lock)
}

/// Really kills a child at each point.
fn kill_everywhere(
    stage: &Stage,
    trace: &Trace,
    walked: &Walked,
    judge: &mut Judge<'_>,
    effort: Effort,
    random: &mut Random,
    tried: &mut Tried,
) -> anyhow::Result<()> {
    let (points, in_lock) = kill_points(trace, walked);
    demand!(!in_lock.is_empty() || walked.lock_steps.is_empty(), "no lock was found in the C library");
    let (mut locking, mut others): (Vec<_>, Vec<_>) =
        points.into_iter().partition(|point| in_lock.contains(&point.step));
    choose(&mut locking, effort.lock_kills_max, random);
    choose(&mut others, effort.kills_max, random);
    for point in locking.into_iter().chain(others) {
        if effort.is_over() {
            break;
        }
        // A new backup file has the time of day in it, so its images differ from run to run.
        let killed = kill(stage, trace, &point, judge, tried, true).and_then(|same| {
            if same || stage.has_files() { Ok(same) } else { kill(stage, trace, &point, judge, tried, false) }
        });
        let same = killed.with_context(|| format!("really killed after instruction {}", point.step))?;
        tried.lock_kills += u64::from(in_lock.contains(&point.step));
        tried.other += u64::from(!same);
    }
    Ok(())
}

/// Really kills a child at `point`, to which it is brought fast or by stepping all the way; whether it left the image that the
/// stepwise run had there.
fn kill(
    stage: &Stage,
    trace: &Trace,
    point: &Point,
    judge: &mut Judge<'_>,
    tried: &mut Tried,
    fast: bool,
) -> anyhow::Result<bool> {
    let mut child = stage.child()?;
    if !(fast && child.follow(&trace.path, point.step as usize)?) {
        drop(child);
        child = stage.child()?;
        child.steps(point.step)?;
        tried.walked += 1;
    }
    child.kill()?;
    judge.begin();
    judge.take(&stage.shared.segment)?;
    stage.judge(judge)?;
    tried.kills += 1;
    let found = judge.fingerprint(&trace.touched)?;
    tried.held += no_lock_blocks(&stage.shared.segment)? as u64;
    Ok(point.fingerprint.is_none_or(|fingerprint| fingerprint == found))
}

/// Leaves at most `count` of the points, chosen at random.
fn choose(points: &mut Vec<Point>, count: usize, random: &mut Random) {
    while points.len() > count {
        points.swap_remove(random.below(points.len() as u64) as usize);
    }
}
