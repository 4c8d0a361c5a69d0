//! Prometheus' text format (version 0.0.4), read strictly, as its parser does and somewhat more: families are
//! whole, in one piece and said once, no series stands twice, labels are quoted and escaped.

use std::collections::{BTreeMap, BTreeSet};

/// One metric: `# HELP`, `# TYPE`, and its samples.
pub struct Family {
    pub name: String,
    pub kind: String,
    pub help: String,
    /// By the name of a label, the values that stand there.
    pub labels: BTreeMap<String, BTreeSet<String>>,
}

/// Everything that one answer of `/metrics` says.
pub struct Exposition {
    pub families: Vec<Family>,
    /// By the series as it is written: `name{label="value"}`.
    pub samples: BTreeMap<String, f64>,
}

/// Reads an answer; panics at the first line that is wrong.
pub fn parse(text: &str) -> Exposition {
    assert!(text.ends_with('\n'));
    let mut families = Vec::<Family>::new();
    let mut samples = BTreeMap::new();
    let mut helped = None;
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, help) = help.split_once(' ').expect(line);
            assert!(help.ends_with('.') && !help.contains('\\'), "{line}");
            assert!(
                families.iter().all(|family| family.name != name),
                "twice: {line}"
            );
            assert!(
                helped.replace((name.to_owned(), help.to_owned())).is_none(),
                "{line}"
            );
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').expect(line);
            let (helped, help) = helped.take().expect(line);
            assert_eq!(name, helped);
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
            assert!(name.starts_with("granary_") && is_name(name), "{line}");
            families.push(Family {
                name: name.to_owned(),
                kind: kind.to_owned(),
                help,
                labels: BTreeMap::new(),
            });
        } else {
            assert!(helped.is_none(), "{line}");
            let (series, value) = line.rsplit_once(' ').expect(line);
            let family = families.last_mut().expect(line);
            let (name, labels) = match series.split_once('{') {
                Some((name, rest)) => (name, read_labels(rest, line)),
                None => (series, Vec::new()),
            };
            match family.kind.as_str() {
                "histogram" => {
                    let base = ["_bucket", "_sum", "_count"];
                    let base = base.iter().find_map(|suffix| name.strip_suffix(suffix));
                    assert_eq!(base, Some(family.name.as_str()), "{line}");
                }
                _ => assert_eq!(name, family.name, "{line}"),
            }
            for (label, value) in labels {
                family.labels.entry(label).or_default().insert(value);
            }
            let value: f64 = value.parse().expect(line);
            assert!(
                samples.insert(series.to_owned(), value).is_none(),
                "twice: {line}"
            );
        }
    }
    assert!(helped.is_none());
    Exposition { families, samples }
}

fn is_name(name: &str) -> bool {
    name.bytes()
        .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
}

/// Reads what stands between the braces, without the first of them.
fn read_labels(mut rest: &str, line: &str) -> Vec<(String, String)> {
    let mut labels = Vec::<(String, String)>::new();
    loop {
        let (name, after) = rest.split_once("=\"").expect(line);
        assert!(is_name(name) && !name.is_empty(), "{line}");
        assert!(
            labels.iter().all(|(other, _)| other != name),
            "twice: {line}"
        );
        let mut value = String::new();
        let mut characters = after.char_indices();
        let end = loop {
            match characters.next().expect(line) {
                (at, '"') => break at,
                (_, '\\') => match characters.next().expect(line).1 {
                    'n' => value.push('\n'),
                    escaped @ ('\\' | '"') => value.push(escaped),
                    other => panic!("\\{other} in {line}"),
                },
                (_, character) => value.push(character),
            }
        };
        labels.push((name.to_owned(), value));
        match &after[end + 1..] {
            "}" => return labels,
            more => rest = more.strip_prefix(',').expect(line),
        }
    }
}
