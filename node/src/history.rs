//! History: from where answers and NARs came, by the hour and by the day.
//!
//! Counters grow from the start of the process; this turns them into what was counted in the last 24 hours and
//! the last 30 days, and goes on after a restart. It knows no clock and no file: it is given the time, and is
//! text for whoever keeps it ([`History::parse`], [`History::to_text`]). Losing it costs a picture.
//!
//! Hours and days are those of UTC, counted since 1970. At most [`HOURS_MAX`] and [`DAYS_MAX`] are kept, those
//! nearest to the present: so what was counted while the clock was wrong, in whatever direction, goes first.

use std::collections::BTreeMap;

use granary_protocol::certificate::UnixTime;
use serde::{Deserialize, Serialize};

use crate::metrics::Metrics;

/// What a person calls today and yesterday's evening.
pub const HOURS_MAX: u64 = 24;

/// A month, which is what a traffic allowance counts.
pub const DAYS_MAX: u64 = 30;

pub const HOUR_SECONDS: u64 = 3_600;
pub const DAY_SECONDS: u64 = 86_400;

/// Longest text of a history: 54 spans of ten numbers with their names.
pub const TEXT_BYTES_MAX: u64 = 64 * 1024;

/// What was counted within some time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Tally {
    /// Narinfos that this store answered.
    pub local: u64,
    /// Narinfos by whom they were found with.
    pub peer: u64,
    pub anchor: u64,
    pub upstream: u64,
    /// Narinfos that nobody had.
    pub absent: u64,
    /// Bytes of NARs, uncompressed, that came from peers.
    pub peer_bytes: u64,
    pub anchor_bytes: u64,
    pub upstream_bytes: u64,
}

impl Tally {
    /// What was counted since the start of the process.
    pub fn of(metrics: &Metrics) -> Tally {
        Tally {
            local: metrics.narinfos_local.get(),
            peer: metrics.narinfos_peer.get(),
            anchor: metrics.narinfos_anchor.get(),
            upstream: metrics.narinfos_upstream.get(),
            absent: metrics.narinfos_absent.get(),
            peer_bytes: metrics.nar_bytes_peer.get(),
            anchor_bytes: metrics.nar_bytes_anchor.get(),
            upstream_bytes: metrics.nar_bytes_upstream.get(),
        }
    }

    fn combine(self, other: Tally, with: fn(u64, u64) -> u64) -> Tally {
        Tally {
            local: with(self.local, other.local),
            peer: with(self.peer, other.peer),
            anchor: with(self.anchor, other.anchor),
            upstream: with(self.upstream, other.upstream),
            absent: with(self.absent, other.absent),
            peer_bytes: with(self.peer_bytes, other.peer_bytes),
            anchor_bytes: with(self.anchor_bytes, other.anchor_bytes),
            upstream_bytes: with(self.upstream_bytes, other.upstream_bytes),
        }
    }

    /// Narinfos that were asked for.
    pub fn lookups(&self) -> u64 {
        [
            self.local,
            self.peer,
            self.anchor,
            self.upstream,
            self.absent,
        ]
        .into_iter()
        .fold(0, u64::saturating_add)
    }

    /// Bytes that came from anywhere.
    pub fn bytes(&self) -> u64 {
        [self.peer_bytes, self.anchor_bytes, self.upstream_bytes]
            .into_iter()
            .fold(0, u64::saturating_add)
    }
}

/// What was counted in one hour or day.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// Its first second, since 1970.
    pub from: u64,
    #[serde(flatten)]
    pub tally: Tally,
}

/// What a person is shown: the spans in which something was counted, oldest first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Spans {
    /// Of the last [`HOURS_MAX`] hours, the present one among them.
    pub hours: Vec<Span>,
    /// Of the last [`DAYS_MAX`] days, today among them.
    pub days: Vec<Span>,
}

impl Spans {
    /// What was counted in all of these together.
    pub fn total(spans: &[Span]) -> Tally {
        spans.iter().fold(Tally::default(), |total, span| {
            total.combine(span.tally, u64::saturating_add)
        })
    }
}

/// What was counted when.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History {
    /// By the number of the hour, and of the day, since 1970.
    hours: BTreeMap<u64, Tally>,
    days: BTreeMap<u64, Tally>,
    /// Since the start of the process, as far as it stands in a span.
    counted: Tally,
}

impl History {
    /// Reads what [`History::to_text`] wrote.
    ///
    /// # Errors
    /// When it is something else.
    pub fn parse(text: &str) -> Result<History, serde_json::Error> {
        let spans: Spans = serde_json::from_str(text)?;
        let numbered = |spans: Vec<Span>, seconds: u64, max: u64| {
            let newest = spans.into_iter().rev().take(max as usize);
            newest
                .map(|span| (span.from / seconds, span.tally))
                .collect()
        };
        Ok(History {
            hours: numbered(spans.hours, HOUR_SECONDS, HOURS_MAX),
            days: numbered(spans.days, DAY_SECONDS, DAYS_MAX),
            counted: Tally::default(),
        })
    }

    /// The same after a restart, but for what the process counted that is not in it yet.
    pub fn to_text(&self) -> String {
        let spans = Spans {
            hours: listed(&self.hours, HOUR_SECONDS, 0..=u64::MAX),
            days: listed(&self.days, DAY_SECONDS, 0..=u64::MAX),
        };
        // No map with keys that are not text, the only thing that can fail.
        serde_json::to_string(&spans).unwrap_or_default()
    }

    /// Puts down what came to the counts since it was last told, all of it to the present hour and day.
    ///
    /// `counts` are those since the start of the process. Returns whether anything came.
    pub fn count(&mut self, counts: Tally, now: UnixTime) -> bool {
        let news = counts.combine(self.counted, u64::saturating_sub);
        if news == Tally::default() {
            return false;
        }
        self.counted = counts;
        add(&mut self.hours, now.0 / HOUR_SECONDS, news, HOURS_MAX);
        add(&mut self.days, now.0 / DAY_SECONDS, news, DAYS_MAX);
        true
    }

    /// What is to be shown at this time; what was counted in other times or in the future is left out.
    pub fn spans(&self, now: UnixTime) -> Spans {
        let last = |seconds: u64, max: u64| {
            let present = now.0 / seconds;
            present.saturating_sub(max - 1)..=present
        };
        Spans {
            hours: listed(&self.hours, HOUR_SECONDS, last(HOUR_SECONDS, HOURS_MAX)),
            days: listed(&self.days, DAY_SECONDS, last(DAY_SECONDS, DAYS_MAX)),
        }
    }
}

fn listed(
    tallies: &BTreeMap<u64, Tally>,
    seconds: u64,
    numbers: std::ops::RangeInclusive<u64>,
) -> Vec<Span> {
    let span = |(number, tally): (&u64, &Tally)| Span {
        from: number.saturating_mul(seconds),
        tally: *tally,
    };
    tallies.range(numbers).map(span).collect()
}

fn add(tallies: &mut BTreeMap<u64, Tally>, present: u64, news: Tally, max: u64) {
    let tally = tallies.entry(present).or_default();
    *tally = tally.combine(news, u64::saturating_add);
    while tallies.len() as u64 > max {
        let furthest = tallies.keys().max_by_key(|number| number.abs_diff(present));
        let Some(furthest) = furthest.copied() else {
            return;
        };
        tallies.remove(&furthest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A day's beginning.
    const DAY: u64 = 20_000 * DAY_SECONDS;

    fn peers(narinfos: u64, bytes: u64) -> Tally {
        Tally {
            peer: narinfos,
            peer_bytes: bytes,
            ..Tally::default()
        }
    }

    fn hours(history: &History, now: u64) -> Vec<(u64, u64)> {
        let spans = history.spans(UnixTime(now));
        let hour = |span: &Span| ((span.from - DAY) / HOUR_SECONDS, span.tally.peer_bytes);
        spans.hours.iter().map(hour).collect()
    }

    #[test]
    fn what_came_since_the_last_time_belongs_to_the_present_hour_and_day() {
        let mut history = History::default();
        assert!(!history.count(Tally::default(), UnixTime(DAY)));
        assert!(history.count(peers(1, 100), UnixTime(DAY + 10)));
        assert!(history.count(peers(3, 150), UnixTime(DAY + 3_599)));
        assert!(!history.count(peers(3, 150), UnixTime(DAY + 3_600)));
        assert!(history.count(peers(4, 157), UnixTime(DAY + 3_600)));
        assert_eq!(hours(&history, DAY + 3_600), [(0, 150), (1, 7)]);
        let days = history.spans(UnixTime(DAY + 3_600)).days;
        assert_eq!(
            days,
            [Span {
                from: DAY,
                tally: peers(4, 157)
            }]
        );
    }

    #[test]
    fn the_last_24_hours_and_30_days_are_kept_and_shown() {
        let mut history = History::default();
        for hour in 0..24 * 40 {
            history.count(peers(0, hour + 1), UnixTime(DAY + hour * HOUR_SECONDS));
        }
        let now = DAY + (24 * 40 - 1) * HOUR_SECONDS;
        let shown = history.spans(UnixTime(now));
        assert_eq!((shown.hours.len(), shown.days.len()), (24, 30));
        assert_eq!(shown.hours[0].from, now - 23 * HOUR_SECONDS);
        assert_eq!(shown.days[0].from, DAY + 10 * DAY_SECONDS);
        assert_eq!(Spans::total(&shown.days).peer_bytes, 30 * 24);
        // A machine that was off for a week.
        let later = history.spans(UnixTime(now + 7 * DAY_SECONDS));
        assert_eq!((later.hours.len(), later.days.len()), (0, 23));
    }

    #[test]
    fn a_restart_goes_on_where_it_was_and_counts_nothing_twice() {
        let mut history = History::default();
        history.count(peers(5, 500), UnixTime(DAY));
        let mut history = History::parse(&history.to_text()).unwrap();
        // The counters of the new process begin at 0.
        history.count(peers(1, 20), UnixTime(DAY + 60));
        assert_eq!(hours(&history, DAY + 60), [(0, 520)]);
    }

    #[test]
    fn a_clock_that_was_wrong_costs_no_more_than_what_it_dated() {
        let mut history = History::default();
        let mut bytes = 0;
        let mut count = |history: &mut History, at: u64| {
            bytes += 1;
            history.count(peers(0, bytes), UnixTime(at));
        };
        for hour in 0..20 {
            count(&mut history, DAY + hour * HOUR_SECONDS);
        }
        // Some hours in 2099, and a start in 1970.
        for hour in 0..10 {
            count(&mut history, 4_070_908_800 + hour * HOUR_SECONDS);
        }
        count(&mut history, 5);
        assert!(hours(&history, DAY + 20 * HOUR_SECONDS).len() >= 13);
        for hour in 20..60 {
            count(&mut history, DAY + hour * HOUR_SECONDS);
        }
        let expected: Vec<_> = (36..60).map(|hour| (hour, 1)).collect();
        assert_eq!(hours(&history, DAY + 59 * HOUR_SECONDS), expected);
        // Set back by an hour: the one that is to come again is not shown, and goes on when it comes.
        assert_eq!(hours(&history, DAY + 58 * HOUR_SECONDS).len(), 23);
        count(&mut history, DAY + 59 * HOUR_SECONDS);
        assert_eq!(hours(&history, DAY + 59 * HOUR_SECONDS)[23], (59, 2));
    }

    #[test]
    fn whatever_stands_in_the_file_is_a_history_or_an_error() {
        let check = |text: &str, is_one: bool| {
            assert_eq!(History::parse(text).is_ok(), is_one, "{text}");
        };
        check("", false);
        check("{\"hours\": [{\"peer\": 1}]}", false);
        check("{\"hours\": [{\"from\": -1}]}", false);
        check("{}", true);
        // Of another version.
        check(
            "{\"hours\": [{\"from\": 3600, \"moon\": 1}], \"weeks\": []}",
            true,
        );
        let span = |from: u64| format!("{{\"from\":{from},\"peer_bytes\":{}}}", u64::MAX);
        let many: Vec<_> = (0..100).map(|hour| span(hour * HOUR_SECONDS)).collect();
        let text = format!("{{\"hours\":[{},{}]}}", many.join(","), span(u64::MAX));
        let mut history = History::parse(&text).unwrap();
        history.count(peers(1, 1), UnixTime(99 * HOUR_SECONDS));
        let shown = history.spans(UnixTime(99 * HOUR_SECONDS));
        assert_eq!(shown.hours.last().unwrap().tally.peer_bytes, u64::MAX);
        assert_eq!(Spans::total(&shown.hours).bytes(), u64::MAX);
        assert!(history.to_text().len() as u64 <= TEXT_BYTES_MAX);
    }

    #[test]
    fn the_longest_history_is_short_enough_to_be_read_again() {
        let most = Tally {
            local: u64::MAX,
            peer: u64::MAX,
            anchor: u64::MAX,
            upstream: u64::MAX,
            absent: u64::MAX,
            peer_bytes: u64::MAX,
            anchor_bytes: u64::MAX,
            upstream_bytes: u64::MAX,
        };
        let far = u64::MAX / DAY_SECONDS - 100;
        let history = History {
            hours: (0..HOURS_MAX).map(|hour| (far + hour, most)).collect(),
            days: (0..DAYS_MAX).map(|day| (far + day, most)).collect(),
            counted: Tally::default(),
        };
        assert!(history.to_text().len() as u64 <= TEXT_BYTES_MAX);
    }
}
