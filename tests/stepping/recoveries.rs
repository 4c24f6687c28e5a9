//! Recovery of an image, instruction by instruction: what one that was killed leaves is recovered in turn.

use anyhow::Context as _;

use crate::explore::Tried;
use crate::image::Image;
use crate::judge::Judge;
use crate::pages::{Pages, Watch};
use crate::stage::Stage;
use crate::tracee::{Event, Tracee};

/// Recoveries that are stepped through.
pub struct Recoveries {
    child: Tracee,
    touched: Pages,
}

impl Recoveries {
    /// Of images of a mutation that touches these pages.
    ///
    /// # Errors
    /// When the child can't be started.
    pub fn new(stage: &Stage, touched: &Pages) -> anyhow::Result<Self> {
        Ok(Self { child: stage.recoverer()?, touched: touched.clone() })
    }

    /// Steps through the recovery of the judge's image, in which `done` requests have happened.
    ///
    /// # Errors
    /// A violation.
    pub fn step_through(
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
