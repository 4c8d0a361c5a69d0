//! Metrics as their readers meet them: the text format of running daemons, the table in docs/metrics.md, and the
//! dashboard in docs/grafana.json.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use granary::metrics::{Gauges, Metrics};
use granary_protocol::token::Permission::{Pull, Push};
use serde_json::Value;

use crate::exposition::{Family, parse};
use crate::rig::{Rig, Sample, bearer};

fn docs(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../docs")
        .join(name)
}

/// What a node and an anchor with two caches in use say.
async fn families() -> (Vec<Family>, Vec<Family>) {
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    rig.cache("secret", false).await;
    let token = rig.token(&[("*", &[Pull, Push])]).await;
    assert_eq!(
        rig.upload(&token, "main", &Sample::new(1, 100_000)).status,
        200
    );
    let scraped = rig.ask(
        "GET",
        "/metrics",
        &[("Authorization", &bearer(&token))],
        b"",
    );
    assert_eq!(scraped.status, 200);
    let anchor = parse(scraped.text());
    assert_eq!(anchor.samples["granary_anchor_paths{cache=\"main\"}"], 1.0);
    // What a running node says is read the same way where one runs (tests/endpoint/routes.rs).
    let node = parse(&Metrics::default().exposition(Gauges::default()));
    (node.families, anchor.families)
}

fn table(families: &[Family]) -> String {
    let mut table = "| name | type | labels | |\n|---|---|---|---|\n".to_owned();
    for family in families {
        let labels = family.labels.iter().map(|(name, values)| {
            // Of these there is one for each cache, bucket or version.
            match name.as_str() {
                "cache" | "le" | "version" => format!("`{name}`"),
                _ => {
                    let values: Vec<_> = values.iter().map(|value| format!("`{value}`")).collect();
                    format!("`{name}`: {}", values.join(", "))
                }
            }
        });
        let labels = labels.collect::<Vec<_>>().join("; ");
        let Family {
            name, kind, help, ..
        } = family;
        table += &format!("| `{name}` | {kind} | {labels} | {help} |\n");
    }
    table
}

/// Replaces what stands between the marks of a table.
fn with_table(text: &str, mark: &str, table: &str) -> String {
    let (before, rest) = text.split_once(&format!("<!-- {mark} -->\n")).unwrap();
    let (_, after) = rest.split_once("<!-- end -->").unwrap();
    format!("{before}<!-- {mark} -->\n{table}<!-- end -->{after}")
}

/// With `GRANARY_UPDATE=1` the tables are written anew.
#[tokio::test(flavor = "multi_thread")]
async fn every_metric_stands_in_the_documentation_and_the_dashboard_names_no_other() {
    let (node, anchor) = families().await;
    let file = docs("metrics.md");
    let text = fs::read_to_string(&file).unwrap();
    let expected = with_table(&text, "node", &table(&node));
    let expected = with_table(&expected, "anchor", &table(&anchor));
    if std::env::var_os("GRANARY_UPDATE").is_some_and(|word| word == "1") {
        fs::write(&file, &expected).unwrap();
    }
    let text = fs::read_to_string(&file).unwrap();
    for (found, expected) in text.lines().zip(expected.lines()) {
        assert_eq!(
            found, expected,
            "docs/metrics.md (GRANARY_UPDATE=1 writes it)"
        );
    }

    let mut names = BTreeSet::new();
    for family in node.iter().chain(&anchor) {
        names.insert(family.name.clone());
        if family.kind == "histogram" {
            let series = ["_bucket", "_sum", "_count"];
            names.extend(series.map(|suffix| format!("{}{suffix}", family.name)));
        }
    }
    let dashboard = fs::read_to_string(docs("grafana.json")).unwrap();
    let dashboard: Value = serde_json::from_str(&dashboard).unwrap();
    let mut queries = 0;
    for panel in dashboard["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().into_iter().flatten() {
            let query = target["expr"].as_str().unwrap();
            let is_part = |character: char| character.is_ascii_alphanumeric() || character == '_';
            let words = query.split(|character| !is_part(character));
            let used: Vec<_> = words.filter(|word| word.starts_with("granary_")).collect();
            assert!(!used.is_empty(), "{query}");
            for name in used {
                assert!(names.contains(name), "{name} in {query}");
            }
            queries += 1;
        }
    }
    assert!(queries >= 10, "{queries} queries");
}
