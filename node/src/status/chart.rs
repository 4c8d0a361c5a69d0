//! The chart: a history as bars, and as the numbers that they stand for.
//!
//! Inline SVG without a style of its own, since the policy of a page allows none; what each bar is worth stands in
//! its title and in a table, for whoever cannot see bars or tell their colours apart.

use granary_protocol::certificate::UnixTime;
use maud::{Markup, html};

use super::{date, human_bytes};
use crate::history::{DAY_SECONDS, DAYS_MAX, HOUR_SECONDS, HOURS_MAX, Span, Spans, Tally};

/// Units of the drawing from the baseline to the top, and from one bar to the next.
const HEIGHT: u64 = 1000;
const STEP: u64 = 10;

/// Height of the least that is not nothing.
const HEIGHT_MIN: u64 = 20;

/// A source: its class in the style, its name, and what was counted for it.
type Source = (&'static str, &'static str, fn(&Tally) -> u64);

/// Where bytes came from, from the baseline up.
const BYTES: [Source; 3] = [
    ("peer", "peers", |tally| tally.peer_bytes),
    ("anchor", "anchors", |tally| tally.anchor_bytes),
    ("upstream", "upstreams", |tally| tally.upstream_bytes),
];

/// Who answered lookups.
const LOOKUPS: [Source; 5] = [
    ("local", "this store", |tally| tally.local),
    ("peer", "peers", |tally| tally.peer),
    ("anchor", "anchors", |tally| tally.anchor),
    ("upstream", "upstreams", |tally| tally.upstream),
    ("nowhere", "nobody", |tally| tally.absent),
];

/// What is counted, and how its numbers are written.
struct Measure {
    name: &'static str,
    sources: &'static [Source],
    total: fn(&Tally) -> u64,
    write: fn(u64) -> String,
}

const MEASURES: [Measure; 2] = [
    Measure {
        name: "Bytes of NARs",
        sources: &BYTES,
        total: Tally::bytes,
        write: human_bytes,
    },
    Measure {
        name: "Lookups",
        sources: &LOOKUPS,
        total: Tally::lookups,
        write: |count| count.to_string(),
    },
];

/// Spans of one length, until the present one.
struct Row<'a> {
    title: &'static str,
    spans: &'a [Span],
    count: u64,
    seconds: u64,
    now: UnixTime,
}

/// The section about a history.
pub fn history(spans: &Spans, now: UnixTime) -> Markup {
    let rows = [
        Row {
            title: "Last 24 hours",
            spans: &spans.hours,
            count: HOURS_MAX,
            seconds: HOUR_SECONDS,
            now,
        },
        Row {
            title: "Last 30 days",
            spans: &spans.days,
            count: DAYS_MAX,
            seconds: DAY_SECONDS,
            now,
        },
    ];
    html! {
        section #history.wide {
            h2 { "Over time" }
            @if spans.days.is_empty() { p.dim { "Nothing was counted in the last 30 days." } }
            @else {
                p.legend aria-hidden="true" {
                    @for (class, name, _) in LOOKUPS {
                        span { svg viewBox="0 0 1 1" { rect class=(class) width="1" height="1" {} } " " (name) }
                    }
                }
                div.charts { @for row in &rows { (row.figure()) } }
                details #numbers {
                    summary { "In numbers" }
                    @for row in &rows { (row.table()) }
                }
            }
        }
    }
}

impl Row<'_> {
    fn figure(&self) -> Markup {
        let total = Spans::total(self.spans);
        html! {
            figure {
                figcaption {
                    strong { (self.title) } ": " (human_bytes(total.peer_bytes)) " came from peers, not over the internet"
                }
                @for measure in &MEASURES { (self.bars(measure)) }
                div.axis aria-hidden="true" { span { (self.label(self.first())) } span { (self.label(self.present())) } }
            }
        }
    }

    fn bars(&self, measure: &Measure) -> Markup {
        let highest = self
            .spans
            .iter()
            .max_by_key(|span| (measure.total)(&span.tally));
        let most = highest.map_or(0, |span| (measure.total)(&span.tally));
        let most_text = (measure.write)(most);
        let when = highest.map(|span| format!(", {}", self.label(span.from)));
        let spoken = format!(
            "{}, {}: at most {most_text}{}",
            measure.name,
            self.title,
            when.unwrap_or_default()
        );
        let view = format!("0 0 {} {HEIGHT}", self.count * STEP);
        html! {
            div.axis aria-hidden="true" { span { (measure.name) } span { "up to " (most_text) } }
            svg viewBox=(view) preserveAspectRatio="none" role="img" aria-label=(spoken) {
                @for span in self.spans {
                    g {
                        title { (self.label(span.from)) ": " (words(measure, &span.tally)) }
                        @for (class, bottom, height) in stack(measure, &span.tally, most) {
                            rect class=(class) x=(self.place(span.from)) y=(HEIGHT - bottom - height) width=(STEP - 2) height=(height) {}
                        }
                    }
                }
            }
        }
    }

    fn table(&self) -> Markup {
        html! {
            h3 { (self.title) }
            @if self.spans.is_empty() { p.dim { "Nothing." } }
            @else {
                div.scroll tabindex="0" role="region" aria-label=(self.title) {
                    table {
                        tr { th { "When" } @for (_, name, _) in LOOKUPS { th.number { (name) } } }
                        @for span in self.spans.iter().rev() {
                            tr {
                                th scope="row" { (self.label(span.from)) }
                                @for (class, _, count) in LOOKUPS {
                                    @let bytes = BYTES.iter().find(|(other, _, _)| *other == class);
                                    td.number {
                                        (count(&span.tally))
                                        @if let Some((_, _, bytes)) = bytes { @if bytes(&span.tally) > 0 { ", " (human_bytes(bytes(&span.tally))) } }
                                    }
                                }
                            }
                        }
                    }
                }
            }
        }
    }

    fn present(&self) -> u64 {
        self.now.0 / self.seconds * self.seconds
    }

    fn first(&self) -> u64 {
        self.present()
            .saturating_sub((self.count - 1) * self.seconds)
    }

    /// Where a bar stands.
    fn place(&self, from: u64) -> u64 {
        let number = from.saturating_sub(self.first()) / self.seconds;
        number.min(self.count - 1) * STEP + 1
    }

    /// When that was.
    fn label(&self, from: u64) -> String {
        let ago = self.present().saturating_sub(from) / self.seconds;
        match (self.seconds, ago) {
            (HOUR_SECONDS, 0) => "this hour".to_owned(),
            (HOUR_SECONDS, ago) => format!("{ago} h ago"),
            (_, 0) => "today".to_owned(),
            (_, ago) => {
                // "Wed, 25 Nov 2026 00:00:00 GMT", as far as a person needs it.
                let date = date(from).and_then(|date| Some(date.get(5..11)?.to_owned()));
                date.unwrap_or_else(|| format!("{ago} days ago"))
            }
        }
    }
}

/// What the parts of a bar are: class, distance from the baseline, height.
fn stack(measure: &Measure, tally: &Tally, most: u64) -> Vec<(&'static str, u64, u64)> {
    let mut bottom = 0;
    let mut parts = Vec::new();
    for (class, _, count) in measure.sources {
        let count = count(tally);
        if count == 0 {
            continue;
        }
        let height = u128::from(count) * u128::from(HEIGHT) / u128::from(most.max(count));
        // Not more than HEIGHT, so it fits.
        let height = (height as u64).max(HEIGHT_MIN).min(HEIGHT - bottom);
        parts.push((*class, bottom, height));
        bottom += height;
    }
    parts
}

/// A bar in words.
fn words(measure: &Measure, tally: &Tally) -> String {
    let counted = measure
        .sources
        .iter()
        .filter(|(_, _, count)| count(tally) > 0);
    let said =
        counted.map(|(_, name, count)| format!("{} from {name}", (measure.write)(count(tally))));
    said.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_as_high_as_its_parts_and_never_higher_than_the_picture() {
        let tally = |peer_bytes, anchor_bytes, upstream_bytes| Tally {
            peer_bytes,
            anchor_bytes,
            upstream_bytes,
            ..Tally::default()
        };
        let check = |tally: Tally, most: u64, expected: &[(&str, u64, u64)]| {
            assert_eq!(stack(&MEASURES[0], &tally, most), expected, "{tally:?}");
        };
        check(tally(0, 0, 0), 0, &[]);
        check(
            tally(50, 25, 0),
            100,
            &[("peer", 0, 500), ("anchor", 500, 250)],
        );
        // The least is seen, and what is on top of a full bar stays inside.
        check(
            tally(1, 99_999, 1),
            100_001,
            &[("peer", 0, 20), ("anchor", 20, 980), ("upstream", 1000, 0)],
        );
        check(
            tally(u64::MAX, 0, u64::MAX),
            u64::MAX,
            &[("peer", 0, 1000), ("upstream", 1000, 0)],
        );
    }

    #[test]
    fn bars_stand_where_their_time_is_and_say_when_that_was() {
        let now = UnixTime(20_000 * DAY_SECONDS + 5 * HOUR_SECONDS + 7);
        let row = |seconds, count| Row {
            title: "",
            spans: &[],
            count,
            seconds,
            now,
        };
        let hours = row(HOUR_SECONDS, HOURS_MAX);
        let check = |row: &Row<'_>, from: u64, place: u64, label: &str| {
            assert_eq!((row.place(from), &row.label(from)[..]), (place, label));
        };
        check(&hours, hours.present(), 231, "this hour");
        check(&hours, hours.present() - 2 * HOUR_SECONDS, 211, "2 h ago");
        check(&hours, hours.first(), 1, "23 h ago");
        let days = row(DAY_SECONDS, DAYS_MAX);
        check(&days, days.present(), 291, "today");
        check(&days, days.present() - DAY_SECONDS, 281, "03 Oct");
        // What a broken file says is drawn somewhere.
        check(&days, 0, 1, "01 Jan");
        check(&days, u64::MAX, 291, "today");
    }
}
