//! `granary completions` and `granary man`: what packages install beside the binary.
//!
//! Both are made out of the tree that parses the command line, so they cannot tell another story.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::print;

#[derive(Args)]
pub struct CompletionsArguments {
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

/// Writes a page for the command itself and one for each command below it.
pub fn man(arguments: &ManArguments) -> Result<()> {
    let folder = &arguments.folder;
    let cannot = || format!("cannot write man pages into {}", folder.display());
    fs::create_dir_all(folder).with_context(cannot)?;
    clap_mangen::generate_to(super::Arguments::command(), folder).with_context(cannot)
}
