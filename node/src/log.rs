//! What this process says about its work: in which form, and where to.
//!
//! Text for a person, JSON (one object a line) for a program, or fields in systemd's journal, spoken to by its
//! native protocol. The first two go to stderr. `RUST_LOG` chooses what is said
//! (tracing-subscriber's `EnvFilter`), the same in each form. Unless told otherwise a process whose stderr is
//! the journal speaks to it, and any other writes text.

use std::env;
use std::fmt;
use std::io::{self, IsTerminal};

use clap::ValueEnum;
use serde::Deserialize;
use tracing::{error, warn};
use tracing_journald::{Priority, PriorityMappings};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// What is said unless `RUST_LOG` says otherwise.
const FILTER: &str = "warn,granary=info";

/// Before the names of our fields in the journal: `journalctl GRANARY_CACHE=team`.
const JOURNAL_PREFIX: &str = "GRANARY";

/// An error and those of its causes that it does not name itself, on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        cause = error.source();
    }
    text
}

/// The form of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// A line for a person.
    Text,
    /// An object a line, for a program.
    Json,
    /// Entries with fields in systemd's journal.
    Journald,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Text => "text",
            Format::Json => "json",
            Format::Journald => "journald",
        })
    }
}

/// Begins to log, once per process; returns the form, which is text where the journal cannot be reached.
pub fn start(asked: Option<Format>) -> Format {
    let (filter, malformed) = filter();
    let wanted = asked.unwrap_or_else(|| match is_journal() {
        true => Format::Journald,
        false => Format::Text,
    });
    let (format, unreachable) = match wanted {
        Format::Journald => match journal() {
            Ok(layer) => {
                tracing_subscriber::registry()
                    .with(filter)
                    .with(layer)
                    .init();
                (Format::Journald, None)
            }
            Err(source) => {
                write_text(filter);
                (Format::Text, Some(source))
            }
        },
        Format::Json => {
            write_json(filter);
            (Format::Json, None)
        }
        Format::Text => {
            write_text(filter);
            (Format::Text, None)
        }
    };
    if let Some(error) = unreachable {
        warn!(%error, "could not reach the journal, logging as text");
    }
    if let Some((rust_log, error)) = malformed {
        warn!(
            rust_log,
            error, "RUST_LOG is malformed, logging as if it were not set"
        );
    }
    if format != Format::Text {
        std::panic::set_hook(Box::new(|panic| {
            let location = panic.location().map(ToString::to_string);
            let thread = std::thread::current().name().map(str::to_owned);
            error!(location, thread, error = panic.payload_as_str(), "panicked");
        }));
    }
    format
}

/// Whether stderr is the journal: systemd tells units which file that is.
pub fn is_journal() -> bool {
    let Ok(named) = env::var("JOURNAL_STREAM") else {
        return false;
    };
    rustix::fs::fstat(io::stderr())
        .is_ok_and(|file| named == format!("{}:{}", file.st_dev, file.st_ino))
}

/// What to log, and `RUST_LOG` with its problem when it is malformed.
fn filter() -> (EnvFilter, Option<(String, String)>) {
    let default = || EnvFilter::new(FILTER);
    match env::var(EnvFilter::DEFAULT_ENV) {
        Ok(text) if !text.is_empty() => match text.parse() {
            Ok(filter) => (filter, None),
            Err(error) => {
                let error: tracing_subscriber::filter::ParseError = error;
                (default(), Some((text, error.to_string())))
            }
        },
        _ => (default(), None),
    }
}

fn journal() -> io::Result<tracing_journald::Layer> {
    let mappings = PriorityMappings {
        info: Priority::Informational,
        debug: Priority::Debug,
        ..PriorityMappings::new()
    };
    let layer = tracing_journald::layer()?;
    Ok(layer
        .with_field_prefix(Some(JOURNAL_PREFIX.to_owned()))
        .with_syslog_identifier("granary".to_owned())
        .with_priority_mappings(mappings))
}

fn write_json(filter: EnvFilter) {
    tracing_subscriber::fmt()
        .json()
        .flatten_event(true)
        .with_span_list(false)
        .with_env_filter(filter)
        .with_writer(io::stderr)
        // What it would say of a full disk is no JSON.
        .log_internal_errors(false)
        .init();
}

fn write_text(filter: EnvFilter) {
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false)
        .init();
}
