//! `granary completions` and `granary man`: what packages install beside the binary.
//!
//! Both are made out of the tree that parses the command line, so they cannot tell another story; the page of
//! the configuration out of the table that the manual is made of.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, CommandFactory};
use clap_complete::Shell;
use clap_mangen::roff::{Roff, bold, italic, roman};

use super::print;
use crate::config::keys::{Fallback, SECTIONS};

#[derive(Args)]
pub struct CompletionsArguments {
    /// The shell that completes.
    shell: Shell,
}

#[derive(Args)]
pub struct ManArguments {
    /// The folder to write granary.1, granary-push.1 and so on into; made if it is missing.
    folder: PathBuf,
}

/// Prints what a shell sources to complete `granary`.
pub fn completions(arguments: &CompletionsArguments) -> Result<()> {
    let mut script = Vec::new();
    let mut command = super::Arguments::command();
    clap_complete::generate(arguments.shell, &mut command, "granary", &mut script);
    print(&String::from_utf8(script).context("the script is not UTF-8")?)
}

/// Writes a page for the command itself, one for each command below it, and one for the configuration.
pub fn man(arguments: &ManArguments) -> Result<()> {
    let folder = &arguments.folder;
    let cannot = || format!("cannot write man pages into {}", folder.display());
    fs::create_dir_all(folder).with_context(cannot)?;
    clap_mangen::generate_to(super::Arguments::command(), folder).with_context(cannot)?;
    fs::write(folder.join("granary.toml.5"), configuration().to_roff()).with_context(cannot)
}

/// granary.toml(5).
fn configuration() -> Roff {
    let mut page = Roff::new();
    let source = concat!("granary ", env!("CARGO_PKG_VERSION"));
    page.control("TH", ["granary.toml", "5", "", source])
        .control("SH", ["NAME"])
        .text([roman("granary.toml - what a node and an anchor of Granary are told")])
        .control("SH", ["DESCRIPTION"])
        .text([roman(
            "/etc/granary/granary.toml, unless --config or GRANARY_CONFIG names another. Every key has a default; an \
             unknown one is an error. ",
        )])
        .text([bold("granary check-config"), roman(" checks a file.")]);
    for section in SECTIONS {
        page.control(
            "SH",
            [match section.header {
                "" => "KEYS BEFORE THE FIRST TABLE",
                header => header,
            }],
        );
        page.text([roman(plain(section.about))]);
        for key in section.keys {
            let default = match key.default {
                Fallback::Value(value) => format!("default {value}"),
                Fallback::Words(words) => format!("default: {}", plain(words)),
                Fallback::Required => "required".to_owned(),
            };
            let unit = match key.unit {
                "" => String::new(),
                unit => format!(" ({})", plain(unit)),
            };
            page.control("TP", [])
                .text([bold(key.name)])
                .text([roman(plain(key.about))])
                .control("br", [])
                .text([italic(format!("{}{unit}; {default}", key.kind))]);
        }
    }
    page.control("SH", ["SEE ALSO"])
        .text([bold("granary"), roman("(1)")]);
    page
}

/// Markdown without its marks.
fn plain(text: &str) -> String {
    text.replace('`', "")
}
