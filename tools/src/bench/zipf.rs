//! Zipf's distribution, exactly and in constant time and memory: rejection-inversion (Hörmann and Derflinger, "Rejection-inversion to
//! generate variates from monotone discrete distributions", 1996).
//!
//! The sum of the weights up to a rank is overlaid by an integral that can be inverted. A random place under the integral names a
//! rank; it is taken at once when it is near enough to the rank's middle, which holds for nearly all, else by comparing.

use rand::Rng;

/// 2 to the power of -53: the step of a random number below 1.
const STEP: f64 = 1.0 / 9_007_199_254_740_992.0;

/// Draws ranks below a count; rank k comes with a weight of k + 1 to the power of minus the exponent.
#[derive(Debug, Clone)]
pub struct Zipf {
    count: f64,
    exponent: f64,
    /// The integral at its two ends.
    from: f64,
    to: f64,
    /// Nearer than this to its middle a rank is taken at once.
    near: f64,
}

impl Zipf {
    /// Of `count` ranks, at least one, with an exponent above 0.
    pub fn new(count: u64, exponent: f64) -> Self {
        let count = count as f64;
        Self {
            count,
            exponent,
            from: integral(1.5, exponent) - 1.0,
            to: integral(count + 0.5, exponent),
            near: 2.0 - inverse(integral(2.5, exponent) - weight(2.0, exponent), exponent),
        }
    }

    /// A rank, 0 being the most frequent.
    #[inline]
    pub fn rank(&self, random: &mut impl Rng) -> u64 {
        loop {
            let part = (random.next_u64() >> 11) as f64 * STEP;
            let place = self.to + part * (self.from - self.to);
            let x = inverse(place, self.exponent);
            let rank = x.round().clamp(1.0, self.count);
            if rank - x <= self.near
                || place >= integral(rank + 0.5, self.exponent) - weight(rank, self.exponent)
            {
                return rank as u64 - 1;
            }
        }
    }
}

/// How often rank `x` comes, against rank 1.
fn weight(x: f64, exponent: f64) -> f64 {
    (-exponent * x.ln()).exp()
}

/// The integral of [`weight`], 0 at 1; for an exponent near 1, where the formula divides by nearly 0, by what it tends to.
fn integral(x: f64, exponent: f64) -> f64 {
    let logarithm = x.ln();
    let power = (1.0 - exponent) * logarithm;
    logarithm * if power.abs() > 1e-8 { power.exp_m1() / power } else { 1.0 + power / 2.0 }
}

/// The inverse of [`integral`].
#[inline]
fn inverse(y: f64, exponent: f64) -> f64 {
    // Rounding may go below what has an inverse.
    let power = (y * (1.0 - exponent)).max(-1.0);
    (y * if power.abs() > 1e-8 { power.ln_1p() / power } else { 1.0 - power / 2.0 }).exp()
}
