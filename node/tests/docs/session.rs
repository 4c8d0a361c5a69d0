//! Following a document: each command in order on its machine, what is shown of it compared, each file written.
//!
//! - A word with `…` in a command or a file stands for what was printed before and looks like it: `granary-ticket-1:…`.
//! - What is shown must be printed, line by line in this order; more may be. In it, `…` is any text.
//! - A command that only looks is asked again for a while, as a person would.
//! - `granary up`, `node` and `anchor` stay until `^C`, or the machine starts the next of them.
//! - A `toml` block that begins with `# /a/file` is written there, and each one must be a configuration.
//! - A `bash` block is a script for a machine that is not here: it must be well-formed, and hold nothing of ours.
//! - An `ini` block that begins with `# nix.conf` must name settings that Nix knows.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use regex::Regex;

use crate::machine::{Lan, NAMES};
use crate::markdown::{Block, Part, Step, parts};

/// How long what is shown may take to come true: mDNS repeats its questions after one and three seconds.
const PATIENCE: Duration = Duration::from_secs(20);

const PAUSE: Duration = Duration::from_millis(200);

/// Commands that change nothing, and may be repeated until they say what is shown.
const LOOKS: &[&str] = &[
    "granary status",
    "granary why",
    "granary doctor",
    "granary cache list",
    "granary cache info",
    "granary-anchor cache list",
    "granary-anchor cache info",
    "nix path-info",
    "nix-store -r",
    "curl",
];

/// Commands that stay in the foreground, and where one is seen to be up.
const STAYS: &[(&str, &str)] = &[
    ("granary up", "127.0.0.1:4726/health"),
    ("granary node", "127.0.0.1:4726/health"),
    ("granary anchor", "127.0.0.1:4730/health"),
];

/// What cannot run here, and why. Of these the part for granary is given to its parser.
const ELSEWHERE: &[(&str, &str)] = &[
    ("git clone", "there is no network but the machines' own"),
    (
        "cargo build",
        "an optimised build takes minutes; boot has put the binary under test where it would be",
    ),
    ("nix run", "the flake needs nixpkgs from the network"),
    ("nix profile", "the flake needs nixpkgs from the network"),
    ("nixos-rebuild", "these machines are Debian"),
    (".ci/test", "it runs this test"),
    ("attic", "Attic's client is not in Debian"),
    (
        "granary anchor import attic",
        "there is no atticd; tests/anchor/import.rs has one's files",
    ),
    (
        "apt install nix-bin",
        "it is there; other packages than ours come from the network",
    ),
];

/// A key, where an example has one that no command printed.
const SAMPLE_KEY: &str = "6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=";

/// A document under way.
pub struct Session<'a> {
    name: &'a str,
    lan: Lan,
    /// Words that were printed, oldest first.
    printed: Vec<String>,
    /// What was run and printed.
    pub transcript: String,
}

impl<'a> Session<'a> {
    pub fn new(name: &'a str) -> Session<'a> {
        Session {
            name,
            lan: Lan::new(),
            printed: Vec::new(),
            transcript: String::new(),
        }
    }

    /// Follows a document; the error says where it is wrong.
    pub fn follow(&mut self, text: &str) -> Result<(), String> {
        for part in parts(text) {
            match part {
                Part::Block(block) => self.block(&block)?,
                Part::NewMachines => self.renew()?,
            }
        }
        Ok(())
    }

    /// Ends what runs, and looks whether it was well; machines that come after know of nothing.
    pub fn renew(&mut self) -> Result<(), String> {
        for machine in self.lan.machines() {
            machine.end();
            let errors = machine.errors();
            if !errors.is_empty() {
                return Err(format!("{} on {}:\n{errors}", self.name, machine.name));
            }
        }
        self.lan = Lan::new();
        self.printed.clear();
        Ok(())
    }

    fn block(&mut self, block: &Block) -> Result<(), String> {
        let (name, line) = (self.name, block.line);
        let at = |offset: usize| format!("{name}:{}", line + offset);
        let place = at(0);
        match block.language {
            "sh" | "console" => {
                for step in block.steps(&NAMES) {
                    let place = at(step.offset);
                    self.step(&step)
                        .map_err(|problem| format!("{place}: {}: {problem}", step.command))?;
                }
                Ok(())
            }
            "toml" => self
                .toml(block)
                .map_err(|problem| format!("{place}: {problem}")),
            "ini" => self
                .ini(block)
                .map_err(|problem| format!("{place}: {problem}")),
            "nix" => nix(block).map_err(|problem| format!("{place}: {problem}")),
            "bash" => bash(block).map_err(|problem| format!("{place}: {problem}")),
            "yaml" | "text" | "json" => Ok(()),
            other => Err(format!(
                "{place}: nobody knows how to try a block of {other:?}"
            )),
        }
    }

    fn step(&mut self, step: &Step) -> Result<(), String> {
        if step.command == "^C" {
            self.lan.machine(&step.machine).end();
            return Ok(());
        }
        let command = step
            .command
            .replace("cargo run --bin granary --", "granary");
        let command = self.filled(&command, None)?;
        // Variables that are set for the command alone.
        let plain = command.trim_start_matches(|c: char| c.is_ascii_uppercase() || c == '_');
        let plain = match plain.strip_prefix('=') {
            Some(rest) => rest.split_once(' ').map_or("", |(_, rest)| rest),
            None => command.as_str(),
        };
        let prompt = if step.is_root { '#' } else { '$' };
        self.transcript += &format!("{}{prompt} {command}\n", step.machine);
        if let Some((_, reason)) = ELSEWHERE.iter().find(|(start, _)| begins(plain, start)) {
            self.transcript += &format!("(not run: {reason})\n");
            return self.parsed(plain);
        }
        let shown = Shown::new(&step.shown);
        let machine = self.lan.machine(&step.machine);
        let stays = STAYS.iter().find(|(start, _)| {
            // `granary anchor rebuild` ends.
            let rest = plain.strip_prefix(start).unwrap_or("?").trim_start();
            rest.is_empty() || rest.starts_with('-') || rest.starts_with('#')
        });
        if let Some((_, health)) = stays {
            if !step.is_root {
                return Err("what stays is run by root".into());
            }
            let outcome = machine.start(&command, |output| shown.is_in(output));
            // An anchor may have a certificate, which is good for another name.
            let probe = format!(
                "for i in $(seq 200); do for scheme in http https; do \
                 curl --silent --fail --insecure $scheme://{health} && exit; done; sleep 0.1; done; exit 1"
            );
            let probe = format!("({probe})");
            let is_up = outcome.status == 0 && machine.run(&probe, true).status == 0;
            self.remember(&outcome.output);
            return match is_up {
                true => Ok(()),
                false => Err(format!(
                    "it did not start, or printed something else:\n{}",
                    outcome.output
                )),
            };
        }
        let may_repeat = LOOKS.iter().any(|start| begins(plain, start));
        let since = Instant::now();
        let outcome = loop {
            let outcome = machine.run(&command, step.is_root);
            let is_good =
                outcome.status == shown.status.unwrap_or(0) && shown.is_in(&outcome.output);
            // Misuse stays misuse.
            if is_good || !may_repeat || outcome.status == 2 || since.elapsed() > PATIENCE {
                break outcome;
            }
            std::thread::sleep(PAUSE);
        };
        self.remember(&outcome.output);
        let said = &outcome.output;
        if !shown.is_in(said) {
            return Err(format!(
                "printed something else (status {}):\n{said}",
                outcome.status
            ));
        }
        // What is meant to fail is followed by a look at its status.
        match outcome.status {
            0 => Ok(()),
            status if shown.status == Some(status) => Ok(()),
            status => Err(format!("ended with status {status}:\n{said}")),
        }
    }

    /// Has granary's parser look at what is granary's of a command: after `granary` or after ` -- `.
    fn parsed(&mut self, command: &str) -> Result<(), String> {
        let own = command.strip_prefix("granary ");
        let Some(arguments) = own.or(command.split_once(" -- ").map(|(_, rest)| rest)) else {
            return Ok(());
        };
        let machine = self.lan.machine(NAMES[0]);
        let outcome = machine.run(
            &format!("/root/granary/target/release/granary {arguments} --help"),
            true,
        );
        match outcome.status {
            0 => Ok(()),
            _ => Err(format!("granary does not take it:\n{}", outcome.output)),
        }
    }

    fn toml(&mut self, block: &Block) -> Result<(), String> {
        let text = self.filled(&block.lines.join("\n"), Some(SAMPLE_KEY))?;
        let machine = self.lan.machine(block.machine.unwrap_or(NAMES[0]));
        let first = block.lines.first().copied().unwrap_or_default();
        let place = first.strip_prefix("# /").map(|place| format!("/{place}"));
        let file = place.as_deref().unwrap_or("/tmp/example.toml");
        // A fragment stands beside what is there already.
        let command = format!(
            "mkdir -p \"$(dirname {file})\" && cat >{file} <<'GRANARY-END'\n{text}\nGRANARY-END\n\
             granary check-config --offline {file}"
        );
        let outcome = machine.run(&command, true);
        match outcome.status {
            0 => Ok(()),
            _ => Err(outcome.output),
        }
    }

    /// Lines of nix.conf are shown, not written: `granary use` writes them.
    fn ini(&mut self, block: &Block) -> Result<(), String> {
        if !block
            .lines
            .first()
            .is_some_and(|line| line.starts_with("# nix.conf"))
        {
            return Ok(());
        }
        let text = self.filled(&block.lines.join("\n"), Some(SAMPLE_KEY))?;
        let machine = self.lan.machine(NAMES[0]);
        let command = format!(
            "NIX_CONFIG={} nix-instantiate --eval --expr 1",
            quoted(&text)
        );
        let outcome = machine.run(&command, true);
        match outcome.status == 0 && !outcome.output.contains("warning") {
            true => Ok(()),
            false => Err(outcome.output),
        }
    }

    /// Puts in what was printed where a word has `…`; `otherwise` where nothing was.
    fn filled(&self, text: &str, otherwise: Option<&str>) -> Result<String, String> {
        let word = Regex::new(r#"([^\s"'`()\[\]{}<>,;=]*)…([^\s"'`()\[\]{}<>,;…]*)"#).unwrap();
        let mut filled = String::new();
        let mut end = 0;
        for found in word.captures_iter(text) {
            let (whole, before, after) = (found.get(0).unwrap(), &found[1], &found[2]);
            let is_it = |printed: &&String| {
                printed.len() > before.len() + after.len()
                    && printed.starts_with(before)
                    && printed.ends_with(after)
            };
            let printed = self.printed.iter().rev().find(is_it);
            filled += &text[end..whole.start()];
            filled += &match (printed, otherwise) {
                (Some(printed), _) => printed.clone(),
                (None, Some(otherwise)) => format!("{before}{otherwise}{after}"),
                (None, None) => return Err(format!("nothing like {} was printed", whole.as_str())),
            };
            end = whole.end();
        }
        Ok(filled + &text[end..])
    }

    fn remember(&mut self, output: &str) {
        self.transcript += output;
        let words = output.split(|c: char| c.is_whitespace() || "\"'`()[]{}<>,;".contains(c));
        let words = words.map(|word| word.trim_end_matches(['.', ':']));
        self.printed
            .extend(words.filter(|word| !word.is_empty()).map(str::to_owned));
    }
}

fn begins(command: &str, start: &str) -> bool {
    command
        .strip_prefix(start)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace))
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// What a document shows of an output.
struct Shown {
    lines: Vec<Regex>,
    /// `(exit status 1)` as the last line.
    status: Option<i32>,
}

impl Shown {
    fn new(lines: &[String]) -> Shown {
        let status = |line: &String| {
            line.strip_prefix("(exit status ")?
                .strip_suffix(')')?
                .parse()
                .ok()
        };
        let shown = lines.iter().filter(|line| status(line).is_none());
        let shown = shown.filter(|line| !matches!(line.trim(), "" | "…"));
        let pattern = |line: &String| {
            // Columns move with what stands in them.
            let words = line.split_whitespace().map(|word| {
                let parts: Vec<_> = word.split('…').map(regex::escape).collect();
                parts.join(".*")
            });
            let words: Vec<_> = words.collect();
            Regex::new(&format!(r"^\s*{}\s*$", words.join(r"\s+"))).unwrap()
        };
        Shown {
            lines: shown.map(pattern).collect(),
            status: lines.last().and_then(status),
        }
    }

    /// Whether the lines stand in this output, in their order.
    fn is_in(&self, output: &str) -> bool {
        let mut printed = output.lines();
        self.lines
            .iter()
            .all(|line| printed.any(|printed| line.is_match(printed)))
    }
}

fn bash(block: &Block) -> Result<(), String> {
    let text = block.lines.join("\n");
    if text.contains("granary") {
        return Err("commands of granary stand in sh or console, where they are run".into());
    }
    let output = Command::new("bash").args(["-n", "-c", &text]).output();
    let output = output.map_err(|error| error.to_string())?;
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

/// A block in Nix's language is one value, and where it is a module its options must be some of ours.
fn nix(block: &Block) -> Result<(), String> {
    let nixos = Path::new(env!("CARGO_MANIFEST_DIR")).join("../nixos");
    let text = block.lines.join("\n");
    let is_module = text.contains("services.granary");
    let expression = match is_module {
        true => format!(
            "let
               nixos = {nixos};
               granary.nixosModules = {{
                 node = nixos + \"/node.nix\"; anchor = nixos + \"/anchor.nix\"; keystone = nixos + \"/keystone.nix\";
               }};
               module = {text};
             in ((import (nixos + \"/tests/evaluate.nix\") {{ }}).evaluate {{ imports = [ {more} module ]; }}).toml",
            nixos = nixos.display(),
            // A fragment stands beside what imports ours.
            more = match text.contains("imports") {
                true => "",
                false => "(nixos + \"/node.nix\") (nixos + \"/anchor.nix\")",
            }
        ),
        false => text,
    };
    let mut command = Command::new("nix-instantiate");
    command.env("NIX_REMOTE", "dummy://");
    match is_module {
        true => command.args(["--eval", "--strict", "--json", "--expr", &expression]),
        false => command.args(["--parse", "--expr", &expression]),
    };
    let output = command.output().map_err(|error| error.to_string())?;
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}
