//! `stats`: the counters of a running store.

use kvs_client::Statistic;
use serde_json::{Map, Value};

use crate::figures;
use crate::output::{self, Format, Outcome};
use crate::target::Target;

/// What belongs together, by name, or by the beginning of names where it ends with a `_`; what no group claims comes last.
const GROUPS: [(&str, &[&str]); 6] = [
    ("Instance", &["name", "version", "tcp_address", "unix_path", "uptime_seconds"]),
    ("Processes", &["front_", "data_", "standby_", "workers"]),
    ("Contents", &["entries", "content_bytes", "segment_bytes", "capacity_bytes", "value_bytes_max"]),
    ("Clients", &["connections", "connections_"]),
    ("Held", &["connection_", "descriptors_"]),
    ("Requests", &["requests_"]),
];
/// The group of the rest.
const OTHERS: &str = "Others";

/// Prints the counters.
pub fn run(target: &Target, format: Format) -> anyhow::Result<Outcome> {
    let all = target.connect()?.stats()?;
    match format {
        Format::Text => output::print(table(&all).as_bytes())?,
        Format::Json => output::print_json(&object(&all))?,
    }
    Ok(Outcome::Done)
}

fn object(all: &[(String, Statistic)]) -> Value {
    let value = |value: &Statistic| match value {
        Statistic::Number(number) => (*number).into(),
        Statistic::Text(text) => text.clone().into(),
        _ => Value::Null,
    };
    let object: Map<String, Value> = all.iter().map(|(name, found)| (name.clone(), value(found))).collect();
    object.into()
}

/// The counters under the names of their groups, aligned.
fn table(all: &[(String, Statistic)]) -> String {
    let width = all.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let titles = GROUPS.iter().map(|(title, _)| *title).chain([OTHERS]);
    let mut text = String::new();
    for title in titles {
        let rows: Vec<String> = all
            .iter()
            .filter(|(name, _)| group_of(name) == title)
            .map(|(name, value)| format!("  {name:<width$}  {}\n", shown(name, value)))
            .collect();
        if !rows.is_empty() {
            let gap = if text.is_empty() { "" } else { "\n" };
            text.push_str(&format!("{gap}{title}\n{}", rows.concat()));
        }
    }
    text
}

fn group_of(name: &str) -> &'static str {
    let claims = |known: &&str| name == *known || (known.ends_with('_') && name.starts_with(known));
    let found = GROUPS.iter().find(|(_, known)| known.iter().any(claims));
    found.map_or(OTHERS, |(title, _)| title)
}

/// A value as its name says it is meant.
fn shown(name: &str, value: &Statistic) -> String {
    match value {
        Statistic::Text(text) => output::for_people(text.as_bytes()),
        Statistic::Number(number) if name.ends_with("_pid") => number.to_string(),
        Statistic::Number(number) if name.contains("_bytes") => with_unit(*number, 1000, figures::rounded),
        Statistic::Number(number) if name.ends_with("_seconds") => with_unit(*number, 60, figures::duration),
        Statistic::Number(number) => figures::grouped(*number),
        _ => "none".to_owned(),
    }
}

/// A figure in a unit that suits it, and exactly when that differs.
fn with_unit(number: u64, exact_below: u64, convert: impl Fn(u64) -> String) -> String {
    let converted = convert(number);
    if number < exact_below { converted } else { format!("{converted} ({})", figures::grouped(number)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stats_table_is_grouped_aligned_and_has_units() {
        let all = [
            ("segment_bytes", Statistic::Number(1_610_612_736)),
            ("front_pid", Statistic::Number(123_456)),
            ("standby_pid", Statistic::Absent),
            ("name", Statistic::Text("shop".into())),
            ("uptime_seconds", Statistic::Number(3_661)),
            ("requests_get", Statistic::Number(1_234_567)),
            ("connections", Statistic::Number(3)),
            ("descriptors_front", Statistic::Number(35)),
            ("connection_slots", Statistic::Number(3)),
            ("connection_buffer_bytes", Statistic::Number(65_536)),
            ("novelty", Statistic::Number(7)),
        ];
        let all = all.map(|(name, value)| (name.to_owned(), value));
        let expected = "\
Instance
  name                     shop
  uptime_seconds           1 h 1 min (3,661)

Processes
  front_pid                123456
  standby_pid              none

Contents
  segment_bytes            1.50 GiB (1,610,612,736)

Clients
  connections              3

Held
  descriptors_front        35
  connection_slots         3
  connection_buffer_bytes  64.0 KiB (65,536)

Requests
  requests_get             1,234,567

Others
  novelty                  7
";
        assert_eq!(table(&all), expected);
        assert_eq!(object(&all)["standby_pid"], Value::Null);
    }
}
