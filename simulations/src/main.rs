//! The command line: run scenarios, replay one run event by event, compare two reports.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use clap::{Args, Parser, Subcommand};
use granary_simulations::report::compare::compare;
use granary_simulations::report::{Summary, picture};
use granary_simulations::scenario::Scenario;
use granary_simulations::world::World;

/// Simulates meshes of Granary nodes: the mind that ships, in virtual time, from one seed.
#[derive(Parser)]
#[command(name = "granary-simulations")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs a scenario and reports; fails when a promise is broken.
    Run(Run),
    /// Runs a scenario once and writes every event, one a line; sha256sum of it is the trace hash.
    Replay {
        #[command(flatten)]
        which: Which,
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Where to write; standard output if left out.
        #[arg(long)]
        output: Option<PathBuf>,
    },
    /// Shows how figures changed; fails when one got worse by more than its margin.
    Compare { base: PathBuf, new: PathBuf },
}

#[derive(Args)]
struct Which {
    /// A built-in scenario (office-10, …) or a file that ends in .toml.
    scenario: String,
    /// Runs it with another number of machines.
    #[arg(long)]
    nodes: Option<usize>,
}

#[derive(Args)]
struct Run {
    #[command(flatten)]
    which: Which,
    #[arg(long, default_value_t = 1, conflicts_with = "seeds")]
    seed: u64,
    /// Several seeds, A..B without B.
    #[arg(long, value_parser = parse_seeds)]
    seeds: Option<Range<u64>>,
    /// Prints reports as JSON, one array.
    #[arg(long)]
    json: bool,
    /// Draws the run with the first seed.
    #[arg(long)]
    svg: Option<PathBuf>,
    /// Runs under way at once, when there are several seeds.
    #[arg(long, default_value_t = 1)]
    jobs: usize,
}

type Error = Box<dyn std::error::Error + Send + Sync>;

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Run(arguments) => run(&arguments),
        Command::Replay {
            which,
            seed,
            output,
        } => replay(&which, seed, output.as_deref()),
        Command::Compare { base, new } => compare_files(&base, &new),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("granary-simulations: {error}");
            ExitCode::from(2)
        }
    }
}

impl Which {
    fn load(&self) -> Result<Scenario, Error> {
        let scenario = Scenario::load(&self.scenario)?;
        Ok(match self.nodes {
            Some(nodes) => scenario.with_nodes(nodes)?,
            None => scenario,
        })
    }
}

/// Runs every seed; true when all promises were kept.
fn run(arguments: &Run) -> Result<bool, Error> {
    let scenario = arguments.which.load()?;
    let seeds = arguments
        .seeds
        .clone()
        .unwrap_or(arguments.seed..arguments.seed + 1);
    let next = AtomicU64::new(seeds.start);
    let done = Mutex::new(Vec::new());
    let failure = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..arguments.jobs.clamp(1, 64) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if !seeds.contains(&seed) {
                        return;
                    }
                    let svg = arguments.svg.as_deref().filter(|_| seed == seeds.start);
                    match run_once(&scenario, seed, svg) {
                        Ok(summary) => {
                            if !arguments.json {
                                print!("{}", summary.to_text());
                            }
                            done.lock().expect("no run panicked").push(summary);
                        }
                        Err(error) => *failure.lock().expect("no run panicked") = Some(error),
                    }
                }
            });
        }
    });
    if let Some(error) = failure.into_inner().expect("no run panicked") {
        return Err(error);
    }
    let mut summaries: Vec<Summary> = done.into_inner().expect("no run panicked");
    summaries.sort_by_key(|summary| summary.seed);
    if arguments.json {
        serde_json::to_writer_pretty(io::stdout().lock(), &summaries)?;
        println!();
    }
    let failed: Vec<String> = summaries
        .iter()
        .filter(|summary| summary.violation.is_some())
        .map(|summary| summary.seed.to_string())
        .collect();
    if !failed.is_empty() {
        eprintln!(
            "{} of {} seeds failed: {}",
            failed.len(),
            summaries.len(),
            failed.join(" ")
        );
    }
    Ok(failed.is_empty())
}

fn run_once(scenario: &Scenario, seed: u64, svg: Option<&Path>) -> Result<Summary, Error> {
    let outcome = World::new(scenario.clone(), seed, None).run()?;
    if let Some(path) = svg {
        std::fs::write(path, picture::draw(&outcome.report))?;
    }
    Ok(outcome.report.summary())
}

fn replay(which: &Which, seed: u64, output: Option<&Path>) -> Result<bool, Error> {
    let copy: Box<dyn Write> = match output {
        Some(path) => Box::new(BufWriter::new(File::create(path)?)),
        None => Box::new(BufWriter::new(io::stdout())),
    };
    let outcome = World::new(which.load()?, seed, Some(copy)).run()?;
    eprint!("{}", outcome.report.summary().to_text());
    Ok(outcome.violation.is_none())
}

fn compare_files(base: &Path, new: &Path) -> Result<bool, Error> {
    let read = |path: &Path| -> Result<Vec<Summary>, Error> {
        let named = |error: Error| -> Error { format!("{}: {error}", path.display()).into() };
        let text = std::fs::read_to_string(path).map_err(|error| named(error.into()))?;
        serde_json::from_str(&text).map_err(|error| named(error.into()))
    };
    let comparison = compare(&read(base)?, &read(new)?);
    print!("{}", comparison.text);
    Ok(comparison.worse == 0)
}

fn parse_seeds(text: &str) -> Result<Range<u64>, String> {
    let bounds = text.split_once("..").ok_or("expected A..B")?;
    let number = |text: &str| {
        text.parse::<u64>()
            .map_err(|error| format!("{text:?}: {error}"))
    };
    let seeds = number(bounds.0)?..number(bounds.1)?;
    if seeds.is_empty() {
        Err("no seed is in that range".to_owned())
    } else {
        Ok(seeds)
    }
}
