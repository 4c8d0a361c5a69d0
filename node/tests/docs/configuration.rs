//! docs/configuration.md: every key is written out of `config::keys`, and that table is what the parser takes.

use std::fs;
use std::path::{Path, PathBuf};

use granary::config::Config;
use granary::config::keys::{Fallback, Key, SECTIONS, Section};

/// A `[[…]]` needs its url, and some keys make sense beside others only.
const COMPANIONS: &[(&str, &str)] = &[
    ("tls-cert", "tls-key = \"/key\""),
    ("tls-key", "tls-cert = \"/cert\""),
    (
        "cache",
        "[[anchor]]\nurl = \"https://nas.lan:4730/main\"\ntoken-file = \"/t\"",
    ),
];

/// What a `[[anchor-server.oidc]]` needs.
const OF_OIDC: &[(&str, &str)] = &[
    ("issuer", "issuer = \"https://x\""),
    ("audience", "audience = \"x\""),
    ("claims", "claims = { sub = \"x\" }"),
    ("caches", "caches = [\"x\"]"),
];

/// A file with this line in this table, and what must stand beside it.
fn file(section: &Section, line: &str, key: &Key) -> String {
    let needed = match section.header {
        "[[anchor-server.oidc]]" => OF_OIDC,
        header if header.starts_with("[[") => &[("url", "url = \"http://x/main\"")],
        _ => &[],
    };
    let needed = needed.iter().filter(|(name, _)| *name != key.name);
    let url: Vec<_> = needed.map(|(_, line)| *line).collect();
    let url = url.join("\n");
    let companion = COMPANIONS.iter().find(|(name, _)| *name == key.name);
    let companion = companion.map_or("", |(_, text)| text);
    format!("{}\n{url}\n{line}\n{companion}\n", section.header)
}

fn parsed(text: &str) -> String {
    match Config::parse(text) {
        Ok(config) => format!("{config:?}"),
        Err(problem) => panic!("{text}: {problem}"),
    }
}

fn keys() -> impl Iterator<Item = (&'static Section, &'static Key)> {
    SECTIONS
        .iter()
        .flat_map(|section| section.keys.iter().map(move |key| (section, key)))
}

#[test]
fn the_table_of_keys_has_what_the_parser_takes_and_nothing_else() {
    let tables = SECTIONS
        .iter()
        .map(|section| section.header.trim_matches(['[', ']']));
    let tables: Vec<_> = tables.collect();
    for section in SECTIONS {
        // The parser names all keys of a table when it meets one that it does not know.
        let problem = Config::parse(&format!("{}\nno-such-key = 1\n", section.header)).unwrap_err();
        let (_, expected) = problem.split_once("expected").expect(&problem);
        let expected = expected.split("\nhint").next().unwrap();
        let mut taken: Vec<_> = expected.split('`').skip(1).step_by(2).collect();
        let own = section.header.trim_matches(['[', ']']);
        // Tables within tables are sections of their own.
        taken.retain(|name| {
            let nested = match own {
                "" => (*name).to_owned(),
                own => format!("{own}.{name}"),
            };
            !tables.contains(&nested.as_str())
        });
        let listed: Vec<_> = section.keys.iter().map(|key| key.name).collect();
        taken.sort_unstable();
        let mut sorted = listed.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, taken, "{}", section.header);
    }
}

#[test]
fn defaults_change_nothing_and_examples_do() {
    for (section, key) in keys() {
        let without = match key.default {
            Fallback::Required => {
                let problem = Config::parse(&file(section, "", key)).expect_err(key.name);
                assert!(problem.contains(key.name), "{problem}");
                parsed("")
            }
            _ => match key.name {
                // One without the other is no configuration.
                "tls-cert" | "tls-key" => parsed(""),
                _ => parsed(&file(section, "", key)),
            },
        };
        if let Fallback::Value(value) = key.default {
            let with = parsed(&file(section, &format!("{} = {value}", key.name), key));
            assert_eq!(with, without, "{} {}", section.header, key.name);
        }
        let line = format!("{} = {}", key.name, key.example);
        let with = parsed(&file(section, &line, key));
        assert_ne!(with, without, "{} {line}", section.header);
    }
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

fn tables() -> String {
    let mut text = String::new();
    for section in SECTIONS {
        text += &match section.header {
            "" => format!("\n{}\n\n", section.about),
            header => format!("\n## `{header}`\n\n{}\n\n", section.about),
        };
        text += "| key | type | unit | default | |\n|---|---|---|---|---|\n";
        for key in section.keys {
            let default = match key.default {
                Fallback::Value(value) => format!("`{value}`"),
                Fallback::Words(words) => words.to_owned(),
                Fallback::Required => "must be given".to_owned(),
            };
            let cells = [key.kind, key.unit, &default, key.about].map(cell);
            text += &format!("| `{}` | {} |\n", key.name, cells.join(" | "));
        }
    }
    text
}

/// With `GRANARY_UPDATE=1` the tables are written anew.
#[test]
fn every_key_stands_in_the_manual_as_in_the_code() {
    let file: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/configuration.md");
    let text = fs::read_to_string(&file).unwrap();
    let (before, rest) = text.split_once("<!-- keys -->\n").unwrap();
    let (_, after) = rest.split_once("<!-- end -->").unwrap();
    let expected = format!("{before}<!-- keys -->\n{}\n<!-- end -->{after}", tables());
    if std::env::var_os("GRANARY_UPDATE").is_some_and(|word| word == "1") {
        fs::write(&file, &expected).unwrap();
    }
    let text = fs::read_to_string(&file).unwrap();
    for (found, expected) in text.lines().zip(expected.lines()) {
        assert_eq!(
            found, expected,
            "docs/configuration.md (GRANARY_UPDATE=1 writes it)"
        );
    }
    assert_eq!(text.len(), expected.len());
}
