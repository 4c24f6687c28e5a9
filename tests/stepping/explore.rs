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
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context as _;
use kvs_core::limits::CAPACITY_BYTES_MIN;
use kvs_core::segment::Segment;
use kvs_core::table::Table;
use kvs_harness::random::Random;

use crate::backup::{Backup, Files, State};
use crate::client::Client;
use crate::judge::{Image, Judge, Judged, no_lock_blocks};
use crate::mutations::Mutation;
use crate::pages::{Pages, Watch, is_lock};
use crate::store::{Expected, Setup};
use crate::tracee::{Event, Path, Tracee};
use crate::violation::demand;

/// Instructions between two looks at everything.
const LOOK_EVERY: u64 = 16;

/// How much of what could be tried is tried.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// Real kills, at points chosen at random when there are more.
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
    /// Kills that left the same image as the stepwise run had there.
    pub same: u64,
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
            same: self.same + other.same,
            walked: self.walked + other.walked,
        }
    }
}

/// A segment in `/dev/shm` that has lost its name already: nothing is left behind, whatever happens.
struct Nameless {
    segment: Segment,
    path: PathBuf,
    file: OwnedFd,
}

impl Nameless {
    fn make(what: &str) -> anyhow::Result<Self> {
        let path = PathBuf::from(format!("/dev/shm/kvs-stepping-{what}-{}", std::process::id()));
        let segment = Segment::open_or_create(&path, CAPACITY_BYTES_MIN)?.segment;
        std::fs::remove_file(&path)?;
        segment.claim_worker(1)?;
        segment.claim_connection(0)?;
        segment.claim_ring(0)?;
        let file = segment.file().context("it has a file")?.as_fd().try_clone_to_owned()?;
        Ok(Self { segment, path, file })
    }
}

/// Everything one mutation needs.
struct Stage {
    shared: Nameless,
    /// The other child's, that recovers.
    recovering: Nameless,
    /// What the shared segment is before each run.
    start: Image,
    pages: Pages,
    requests: tempfile::NamedTempFile,
    backup: Option<(Backup, Files)>,
}

impl Stage {
    fn new(mutation: &Mutation) -> anyhow::Result<(Self, Expected)> {
        let (shared, recovering) = (Nameless::make("served")?, Nameless::make("recovered")?);
        let table = Table::new(&shared.segment)?;
        let mut setup = Setup::new(&table);
        (mutation.before)(&mut setup)
            .with_context(|| format!("filling the store for {:?}", mutation.name))?;
        let asks = (mutation.asks)(&setup);
        let mut expected = Expected::new(setup.model, &asks);
        let mut backup = None;
        if let Some(what) = mutation.backup {
            backup = Some((what, Files::make(&table)?));
            let table = table.backed_up();
            let mut client = Client::greeted(&table)?;
            client.exchange(&expected.requests, &mut Vec::new())?;
            client.close()?;
            expected = expected.all_done();
        }
        let requests = tempfile::NamedTempFile::new()?;
        std::fs::write(requests.path(), &expected.requests)?;
        let pages = Pages::reserved(&shared.segment)?;
        let start = Image::of(&shared.segment, &pages)?;
        Ok((Self { shared, recovering, start, pages, requests, backup }, expected))
    }

    /// A child that is about to begin.
    fn child(&self) -> anyhow::Result<Tracee> {
        self.pages.copy(self.start.segment.memory(), self.shared.segment.memory())?;
        let path = self.shared.path.to_string_lossy();
        if let Some((what, files)) = &self.backup {
            files.restore()?;
            let directory = files.directory().to_string_lossy();
            let arguments = ["backup", "--segment", &path, "--directory", &directory, "--what", what.name()];
            return Tracee::start(&arguments, self.shared.file.as_fd());
        }
        let requests = self.requests.path().to_string_lossy();
        Tracee::start(&["serve", "--segment", &path, "--requests", &requests], self.shared.file.as_fd())
    }

    /// What the backup files are now.
    fn files(&self) -> anyhow::Result<Option<State>> {
        self.backup.as_ref().map(|(_, files)| files.state()).transpose()
    }

    /// Judges the image at hand.
    fn judge(&self, judge: &mut Judge<'_>) -> anyhow::Result<Judged> {
        judge.judge(self.backup.as_ref().map(|(_, files)| files))
    }

    /// A child that is about to recover, again and again.
    fn recoverer(&self) -> anyhow::Result<Tracee> {
        let path = self.recovering.path.to_string_lossy();
        Tracee::start(&["recover", "--segment", &path], self.recovering.file.as_fd())
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
    let (trace, mut judge) = trace(&mut stage, &expected)?;
    let mut tried = Tried { points: trace.path.length() as u64, ..Tried::default() };
    let mut recoveries = Recoveries::new(&stage, &trace)?;
    let walked = walk(&stage, &trace, &mut judge, &mut tried, &mut |judge, done, tried| {
        if effort.recoveries > 0 && random.once_in(effort.recoveries) && !effort.is_over() {
            judge.next_try_succeeds(done)?;
            recoveries.step_through(&stage, judge, done, tried)?;
        }
        Ok(())
    })?;
    kill_everywhere(&stage, &trace, &walked, &mut judge, effort, random, &mut tried)?;
    Ok(tried)
}

/// Finds out which pages the mutation touches, and where the C library's instructions are.
fn trace<'e>(stage: &mut Stage, expected: &'e Expected) -> anyhow::Result<(Trace, Judge<'e>)> {
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
        }
    }
    look(stage, &judge, &mut touched)?;
    Ok((Trace { touched, library: runs, path: Path::new(addresses) }, judge))
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
    tried: &mut Tried,
    on_kind: &mut OnKind<'_>,
) -> anyhow::Result<Walked> {
    let segment = &stage.shared.segment;
    let mut child = stage.child()?;
    judge.begin();
    let mut watch = Watch::new(segment.memory(), &trace.touched)?;
    let (mut walked, mut kinds) = (Walked { points: Vec::new(), lock_steps: Vec::new() }, HashSet::new());
    let (mut step, mut files) = (0, stage.files()?);
    while child.step()? == Event::Stepped {
        step += 1;
        let (mut lock_changed, files_before) = (false, files);
        let changed =
            watch.changed(segment.memory(), |change| lock_changed |= is_lock(segment, change.offset))?;
        files = stage.files()?;
        if !changed && files == files_before {
            continue;
        }
        tried.images += 1;
        judge.take(segment)?;
        let judged = stage.judge(judge).with_context(|| format!("killed after instruction {step}"))?;
        walked.points.push(Point { step, fingerprint: Some(judge.fingerprint(&trace.touched)?) });
        walked.lock_steps.extend(lock_changed.then_some(step));
        if kinds.insert(judged.kind) {
            tried.kinds += 1;
            on_kind(judge, judged.done, tried).with_context(|| format!("killed after instruction {step}"))?;
        }
    }
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
    let (mut points, in_lock) = kill_points(trace, walked);
    demand!(!in_lock.is_empty() || walked.lock_steps.is_empty(), "no lock was found in the C library");
    while points.len() > effort.kills_max {
        points.swap_remove(random.below(points.len() as u64) as usize);
    }
    for point in points {
        if effort.is_over() {
            break;
        }
        let mut child = stage.child()?;
        if !child.follow(&trace.path, point.step as usize)? {
            drop(child);
            child = stage.child()?;
            child.steps(point.step)?;
            tried.walked += 1;
        }
        child.kill()?;
        judge.begin();
        judge.take(&stage.shared.segment)?;
        stage.judge(judge).with_context(|| format!("really killed after instruction {}", point.step))?;
        tried.kills += 1;
        tried.lock_kills += u64::from(in_lock.contains(&point.step));
        if let Some(fingerprint) = point.fingerprint {
            tried.same += u64::from(fingerprint == judge.fingerprint(&trace.touched)?);
        }
        let held = no_lock_blocks(&stage.shared.segment)
            .with_context(|| format!("really killed after instruction {}", point.step))?;
        tried.held += held as u64;
    }
    Ok(())
}

/// Recoveries that are stepped through.
struct Recoveries {
    child: Tracee,
    touched: Pages,
}

impl Recoveries {
    fn new(stage: &Stage, trace: &Trace) -> anyhow::Result<Self> {
        Ok(Self { child: stage.recoverer()?, touched: trace.touched.clone() })
    }

    /// Steps through the recovery of the judge's image, in which `done` requests have happened.
    fn step_through(
        &mut self,
        stage: &Stage,
        judge: &mut Judge<'_>,
        done: usize,
        tried: &mut Tried,
    ) -> anyhow::Result<()> {
        let saved = Image::of(&judge.image.segment, &stage.pages)?;
        // A page that wasn't watched is watched in another try.
        while !self.try_step_through(stage, &saved, judge, done, tried)? {}
        stage.pages.copy(saved.segment.memory(), judge.image.segment.memory())?;
        Ok(())
    }

    fn try_step_through(
        &mut self,
        stage: &Stage,
        image: &Image,
        judge: &mut Judge<'_>,
        done: usize,
        tried: &mut Tried,
    ) -> anyhow::Result<bool> {
        let segment = &stage.recovering.segment;
        stage.pages.copy(image.segment.memory(), segment.memory())?;
        let mut watch = Watch::new(segment.memory(), &self.touched)?;
        let (mut points, mut images) = (0, 0);
        while self.child.step()? == Event::Stepped {
            points += 1;
            if watch.changed(segment.memory(), |_| {})? {
                images += 1;
                judge.take(segment)?;
                judge
                    .judge_recovery(done)
                    .with_context(|| format!("and its recovery killed after instruction {points}"))?;
            }
        }
        // From its second stop to its next first one.
        self.child.run()?;
        let mut complete = true;
        for change in stage.pages.differences(image.segment.memory(), segment.memory())? {
            complete &= !self.touched.add(change.offset);
        }
        if complete {
            tried.recovery_points += points;
            tried.recovery_images += images;
        }
        Ok(complete)
    }
}
