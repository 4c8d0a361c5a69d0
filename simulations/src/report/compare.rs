//! Compare: what changed between two reports of the same scenario and seed.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::{Summary, shown};

/// The differences as text, and how many figures got worse by more than their margin.
pub struct Comparison {
    pub text: String,
    pub worse: usize,
}

/// Compares runs by scenario, seed and number of machines; one that is missing on a side is named.
pub fn compare(base: &[Summary], new: &[Summary]) -> Comparison {
    let key = |summary: &Summary| (summary.scenario.clone(), summary.machines, summary.seed);
    let base: BTreeMap<_, &Summary> = base.iter().map(|summary| (key(summary), summary)).collect();
    let mut comparison = Comparison {
        text: String::new(),
        worse: 0,
    };
    let mut seen = 0;
    for summary in new {
        let line = format!(
            "{} · {} machines · seed {}",
            summary.scenario, summary.machines, summary.seed
        );
        let Some(before) = base.get(&key(summary)) else {
            comparison.say(&format!("{line}: not in the base"));
            continue;
        };
        seen += 1;
        comparison.say(&line);
        if summary.violation.is_some() && before.violation.is_none() {
            comparison.worse += 1;
            comparison.say(&format!(
                "  WORSE  it fails: {}",
                summary.violation.as_deref().unwrap_or_default()
            ));
        }
        comparison.figures(before, summary);
    }
    for _ in seen..base.len() {
        comparison.say("a run of the base is missing");
        comparison.worse += 1;
    }
    comparison
}

impl Comparison {
    fn say(&mut self, line: &str) {
        writeln!(self.text, "{line}").expect("writing to a string succeeds");
    }

    fn figures(&mut self, before: &Summary, after: &Summary) {
        for (name, old) in &before.figures {
            let Some(new) = after.figures.get(name) else {
                self.worse += 1;
                self.say(&format!(
                    "  WORSE  {name} is not measured any more, was {}",
                    shown(old)
                ));
                continue;
            };
            if new.value == old.value {
                continue;
            }
            let is_worse = old.margin_percent.is_some_and(|margin| {
                new.value
                    > old
                        .value
                        .saturating_add(old.value.saturating_mul(margin) / 100)
            });
            self.worse += usize::from(is_worse);
            let word = if is_worse { "WORSE " } else { "      " };
            let percent =
                (new.value as i128 - old.value as i128) * 100 / i128::from(old.value.max(1));
            self.say(&format!(
                "  {word} {name:<28} {:>12} -> {:>12}  {percent:+} %",
                shown(old),
                shown(new)
            ));
        }
    }
}
