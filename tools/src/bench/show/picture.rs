//! The distribution of latencies, drawn as SVG: a panel for each case, percentiles from left to right. As in the plots that are usual
//! for such histograms, each step to the right leaves a tenth of the requests: 90%, 99%, 99.9%.

use std::fmt::Write as _;

use crate::bench::results::Series;
use crate::bench::run::{Measured, Run};

/// Places in the picture.
const LEFT: f64 = 78.0;
const WIDTH: f64 = 640.0;
const LEGEND: f64 = 130.0;
const TOP: f64 = 52.0;
const HEIGHT: f64 = 210.0;
const GAP: f64 = 88.0;
/// Points of a curve.
const POINTS: u32 = 120;
/// Tenths of tenths that are shown: up to 99.999%.
const NINES: f64 = 5.0;

/// Colours in the middle between black and white, so that they can be read on both.
const INK: &str = "#7a7f87";
/// Those of the targets, by the beginning of their names, and for others.
const COLOURS: [(&str, &str); 5] = [
    ("kvs", "#2a8fbd"),
    ("redis", "#c2703d"),
    ("memcached", "#4f9a55"),
    ("lmdb", "#4f9a55"),
    ("null", "#7a7f87"),
];
const MORE_COLOURS: [&str; 5] = ["#2a8fbd", "#8f6bb3", "#b0894a", "#d33f49", "#5c7fd6"];

/// A panel's scale of latency, in powers of ten of a nanosecond.
#[derive(Clone, Copy)]
struct Scale {
    top: f64,
    least: i32,
    most: i32,
}

impl Scale {
    fn y(&self, latency_ns: f64) -> f64 {
        let power = latency_ns.max(1.0).log10().clamp(f64::from(self.least), f64::from(self.most));
        self.top + HEIGHT * (f64::from(self.most) - power) / f64::from(self.most - self.least)
    }
}

/// The picture.
pub fn svg(run: &Run) -> String {
    let panels: Vec<&Measured> =
        run.cases.iter().filter(|measured| drawn(measured).next().is_some()).collect();
    let (width, height) = (LEFT + WIDTH + LEGEND, TOP + panels.len() as f64 * (HEIGHT + GAP));
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" \
         font-family=\"system-ui, sans-serif\" font-size=\"12\" fill=\"{INK}\">\n"
    );
    for (at, measured) in panels.into_iter().enumerate() {
        panel(&mut text, measured, TOP + at as f64 * (HEIGHT + GAP));
    }
    text.push_str("</svg>\n");
    text
}

/// The targets that have latencies.
fn drawn(measured: &Measured) -> impl Iterator<Item = &Series> {
    measured.series.iter().filter(|series| !series.latency.is_empty())
}

fn panel(text: &mut String, measured: &Measured, top: f64) {
    let least = drawn(measured).map(|series| series.latency.min()).min().unwrap_or(1).max(1);
    let most = drawn(measured).map(highest).max().unwrap_or(1);
    let (least, most) = (least.ilog10() as i32, most.ilog10() as i32 + 1);
    let scale = Scale { top, least, most };
    scales(text, measured, scale);
    for (at, series) in drawn(measured).enumerate() {
        curve(text, series, at, scale);
    }
}

/// The highest latency that is drawn.
fn highest(series: &Series) -> u64 {
    series.latency.value_at_quantile(1.0 - 10f64.powf(-NINES)).max(1)
}

/// Where the share of requests that are slower is, in powers of a tenth.
fn x(nines: f64) -> f64 {
    LEFT + WIDTH * nines / NINES
}

fn scales(text: &mut String, measured: &Measured, scale: Scale) {
    _ = writeln!(
        text,
        "<text x=\"{LEFT}\" y=\"{:.0}\" font-size=\"15\" font-weight=\"600\">{}</text>\
         <text x=\"{LEFT}\" y=\"{:.0}\">{}</text>",
        scale.top - 28.0,
        escaped(&measured.case.name),
        scale.top - 11.0,
        escaped(&measured.case.describe())
    );
    for power in scale.least..=scale.most {
        let at = scale.y(10f64.powi(power));
        _ = writeln!(
            text,
            "<path d=\"M{LEFT} {at:.1}h{WIDTH}\" stroke=\"{INK}\" stroke-opacity=\".3\" stroke-width=\".6\"/>\
             <text x=\"{:.0}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 8.0,
            at + 4.0,
            power_name(power)
        );
    }
    for (nines, name) in (0..).zip(["0%", "90%", "99%", "99.9%", "99.99%", "99.999%"]) {
        _ = writeln!(
            text,
            "<path d=\"M{:.1} {:.1}v{HEIGHT}\" stroke=\"{INK}\" stroke-opacity=\".3\" stroke-width=\".6\"/>\
             <text x=\"{:.1}\" y=\"{:.0}\" text-anchor=\"middle\">{name}</text>",
            x(f64::from(nines)),
            scale.top,
            x(f64::from(nines)),
            scale.top + HEIGHT + 18.0
        );
    }
}

/// A power of ten of a nanosecond, for people.
fn power_name(power: i32) -> String {
    let (unit, rest) = match power {
        ..3 => ("ns", power),
        3..6 => ("µs", power - 3),
        6..9 => ("ms", power - 6),
        _ => ("s", power - 9),
    };
    format!("{} {unit}", 10u64.pow(rest as u32))
}

fn curve(text: &mut String, series: &Series, at: usize, scale: Scale) {
    // Where fewer requests than one would be left, there is nothing to show.
    let end = (series.latency.len() as f64).log10().min(NINES);
    let colour = colour(&series.target, at);
    let mut path = String::new();
    for point in 0..=POINTS {
        let nines = end * f64::from(point) / f64::from(POINTS);
        let latency_ns = series.latency.value_at_quantile(1.0 - 10f64.powf(-nines));
        let y = scale.y(latency_ns as f64);
        _ = write!(path, "{}{:.1} {y:.1}", if point == 0 { "M" } else { "L" }, x(nines));
    }
    _ = writeln!(text, "<path d=\"{path}\" stroke=\"{colour}\" stroke-width=\"1.6\" fill=\"none\"/>");
    let legend = scale.top + 14.0 + at as f64 * 18.0;
    _ = writeln!(
        text,
        "<path d=\"M{:.1} {:.1}h18\" stroke=\"{colour}\" stroke-width=\"2.4\"/>\
         <text x=\"{:.1}\" y=\"{:.1}\" fill=\"{colour}\">{}</text>",
        LEFT + WIDTH + 12.0,
        legend - 4.0,
        LEFT + WIDTH + 36.0,
        legend,
        escaped(&series.target)
    );
}

fn colour(target: &str, at: usize) -> &'static str {
    let own = COLOURS.iter().find(|(name, _)| target.starts_with(name));
    own.map_or(MORE_COLOURS[at % MORE_COLOURS.len()], |(_, colour)| colour)
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn picture_scale_names_powers_in_their_units() {
        let names: Vec<String> = [0, 2, 3, 5, 6, 9, 10].into_iter().map(power_name).collect();
        assert_eq!(names, ["1 ns", "100 ns", "1 µs", "100 µs", "1 ms", "1 s", "10 s"]);
    }

    #[test]
    fn picture_places_are_between_the_ends_of_the_scale() {
        let scale = Scale { top: 10.0, least: 3, most: 6 };
        assert_eq!((scale.y(1e3), scale.y(1e6)), (10.0 + HEIGHT, 10.0));
        assert_eq!((scale.y(0.0), scale.y(1e12)), (10.0 + HEIGHT, 10.0));
        assert_eq!((x(0.0), x(NINES)), (LEFT, LEFT + WIDTH));
    }
}
