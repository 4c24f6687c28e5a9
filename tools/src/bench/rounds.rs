//! Rounds: all targets are measured in turn, again and again, so that what a machine does for a while befalls all of them.

use anyhow::Context as _;

use super::results::Series;
use super::target::{Measurement, Span, Target};

/// Measures each target in each round, the next round beginning with the next target. `told` hears which is measured now.
///
/// # Errors
/// A target can't be measured, or the user wants the end.
pub fn measure(
    targets: &mut [Box<dyn Target>],
    rounds: usize,
    span: &Span,
    told: &dyn Fn(&str, usize),
) -> anyhow::Result<Vec<Series>> {
    let mut series: Vec<Series> =
        targets.iter().map(|target| Series::new(target.name(), target.unit())).collect();
    for round in 0..rounds {
        for turn in 0..targets.len() {
            let at = (turn + round) % targets.len();
            span.interrupted.check()?;
            told(targets[at].name(), round);
            let measurement = targets[at].measure(span);
            match measurement.with_context(|| format!("{} can't be measured", targets[at].name()))? {
                Measurement::Load(sample) => series[at].add(&sample),
                Measurement::Figure(value) => series[at].values.push(value),
            }
        }
    }
    Ok(series)
}

#[cfg(test)]
mod tests {
    //! Goal: no target has the better place. Method: targets that note when they are measured.

    use std::cell::RefCell;
    use std::rc::Rc;
    use std::time::Duration;

    use super::*;
    use crate::bench::target::Interrupted;

    struct Noted(&'static str, Rc<RefCell<Vec<&'static str>>>);

    impl Target for Noted {
        fn name(&self) -> &str {
            self.0
        }

        fn measure(&mut self, _span: &Span) -> anyhow::Result<Measurement> {
            self.1.borrow_mut().push(self.0);
            Ok(Measurement::Figure(self.1.borrow().len() as f64))
        }
    }

    fn span() -> Span {
        Span { warm_up: Duration::ZERO, duration: Duration::ZERO, interrupted: Interrupted::default() }
    }

    #[test]
    fn rounds_begin_with_each_target_in_turn() {
        let order = Rc::new(RefCell::new(Vec::new()));
        let mut targets: Vec<Box<dyn Target>> =
            ["a", "b", "c"].map(|name| Box::new(Noted(name, Rc::clone(&order))) as Box<dyn Target>).into();
        let series = measure(&mut targets, 3, &span(), &|_, _| {}).expect("measured");
        assert_eq!(*order.borrow(), ["a", "b", "c", "b", "c", "a", "c", "a", "b"]);
        assert_eq!(series[0].values, [1.0, 6.0, 8.0]);
    }

    #[test]
    fn rounds_end_when_the_user_wants_it() {
        let span = span();
        span.interrupted.flag().store(true, std::sync::atomic::Ordering::Relaxed);
        let order = Rc::new(RefCell::new(Vec::new()));
        let mut targets: Vec<Box<dyn Target>> = vec![Box::new(Noted("a", Rc::clone(&order)))];
        assert!(measure(&mut targets, 3, &span, &|_, _| {}).is_err());
        assert!(order.borrow().is_empty());
    }
}
