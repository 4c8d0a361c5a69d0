//! `granary doctor`: what is wrong with this machine's set-up, and how to mend it.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;

use super::nix_conf::{default_place, wanted};
use super::{ConfigFile, print};
use crate::doctor::{Finding, Patient, Verdict, examine};

#[derive(Args)]
pub struct Arguments {
    /// Print JSON, for scripts.
    #[arg(long)]
    json: bool,
    /// Nix's configuration; default as for `granary use`.
    #[arg(long, value_name = "FILE")]
    nix_conf: Option<PathBuf>,
    #[command(flatten)]
    config: ConfigFile,
}

pub async fn run(arguments: Arguments) -> Result<()> {
    let nix_conf = match arguments.nix_conf {
        Some(path) => path,
        None => default_place()?,
    };
    let findings = match arguments.config.load() {
        Ok(config) => {
            let patient = Patient {
                config: &config,
                wanted: wanted(&config).map_err(|error| format!("{error:#}")),
                nix_conf: &nix_conf,
            };
            examine(&patient).await
        }
        Err(error) => vec![Finding::failed(
            "configuration",
            format!("{error:#}"),
            "mend the file; man granary.toml has all keys",
        )],
    };
    if arguments.json {
        print(&format!("{}\n", serde_json::to_string_pretty(&findings)?))?;
    } else {
        print(&findings.iter().map(described).collect::<String>())?;
    }
    let failed = findings.iter().filter(|one| one.verdict == Verdict::Failed);
    match failed.count() {
        0 => Ok(()),
        1 => bail!("1 thing is wrong"),
        count => bail!("{count} things are wrong"),
    }
}

fn described(finding: &Finding) -> String {
    let word = match finding.verdict {
        Verdict::Fine => "ok  ",
        Verdict::Note => "note",
        Verdict::Failed => "FAIL",
    };
    let mut text = format!("{word}  {}: {}\n", finding.subject, finding.found);
    if let Some(advice) = &finding.advice {
        text.push_str(&format!("      {advice}\n"));
    }
    if let Some(command) = &finding.command {
        text.push_str(&format!("      run: {command}\n"));
    }
    text
}
