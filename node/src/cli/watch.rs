//! `granary status --watch`: the glance of `granary status`, drawn anew about every second.
//!
//! On the terminal's other screen, so that what stood there is there again afterwards. Keys are read without
//! echo; the terminal is as before when this ends, by `q`, Ctrl-C, a signal or a panic, and while it is suspended.
//! Whatever comes from the node is text: control characters are shown as `?`.

use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Signal, getpid, kill_process};
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::ask;
use crate::config::Config;
use crate::status::Report;

const PERIOD: Duration = Duration::from_secs(1);

/// After so long without an answer the node counts as away. It answers within milliseconds, as a rule.
const PATIENCE: Duration = Duration::from_secs(2);

/// Of a terminal that does not say how large it is.
const USUAL_COLUMNS: usize = 80;
const USUAL_ROWS: usize = 24;

/// Below the word at the beginning of a line of the report, where its facts go on.
const INDENT: usize = 10;

const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";
const HOME: &str = "\x1b[H";
const END_OF_LINE: &str = "\x1b[K";
const END_OF_SCREEN: &str = "\x1b[J";

/// Watches until somebody wants to leave.
pub async fn run(config: &Config) -> Result<()> {
    if !io::stdout().is_terminal() {
        bail!("standard output is no terminal, refusing to draw on it; granary status prints once");
    }
    let address = config.substituter.listen.first();
    let address = address.context("substituter.listen is empty")?.to_string();
    let mut interrupted = signal(SignalKind::interrupt())?;
    let mut terminated = signal(SignalKind::terminate())?;
    let mut hung_up = signal(SignalKind::hangup())?;
    let mut resized = signal(SignalKind::window_change())?;
    let mut suspended = signal(SignalKind::from_raw(Signal::TSTP.as_raw()))?;
    let mut keys = keys();
    let mut period = interval(PERIOD);
    period.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut glance = Glance {
        address,
        report: None,
        problem: Some("Asking the node.".to_owned()),
    };
    let screen = Screen::enter()?;
    loop {
        screen.draw(&glance)?;
        let asking = async {
            period.tick().await;
            let answer = timeout(PATIENCE, ask(config, "/api/v1/status"));
            answer.await
        };
        let mut asking = std::pin::pin!(asking);
        loop {
            tokio::select! {
                answer = asking.as_mut() => {
                    glance.learn(answer);
                    break;
                }
                _ = resized.recv() => screen.draw(&glance)?,
                _ = suspended.recv() => {
                    screen.leave();
                    // Returns when the shell has us go on.
                    kill_process(getpid(), Signal::STOP)?;
                    screen.take()?;
                    screen.draw(&glance)?;
                }
                Some(key) = keys.recv() => if matches!(key, b'q' | b'Q') { return Ok(()) },
                _ = interrupted.recv() => return Ok(()),
                _ = terminated.recv() => return Ok(()),
                _ = hung_up.recv() => return Ok(()),
            }
        }
    }
}

/// What is typed. The thread that reads it ends with the process.
fn keys() -> mpsc::Receiver<u8> {
    let (pressed, keys) = mpsc::channel(16);
    if io::stdin().is_terminal() {
        std::thread::spawn(move || {
            let mut key = [0];
            while let Ok(1) = io::stdin().read(&mut key) {
                if pressed.blocking_send(key[0]).is_err() {
                    return;
                }
            }
        });
    }
    keys
}

/// What is known, and since when it is not.
struct Glance {
    address: String,
    /// The last one that there was.
    report: Option<String>,
    /// Why it is not the present one.
    problem: Option<String>,
}

type Answered = Result<Result<Option<String>>, tokio::time::error::Elapsed>;

impl Glance {
    fn learn(&mut self, answer: Answered) {
        let report = match answer {
            Err(_) => Err(format!("The node does not answer within {PATIENCE:?}.")),
            Ok(Err(error)) => Err(format!("The node is away: {error:#}.")),
            Ok(Ok(None)) => Err("The node is still opening its store.".to_owned()),
            Ok(Ok(Some(text))) => serde_json::from_str::<Report>(&text)
                .map_err(|error| format!("The answer is no status report: {error}.")),
        };
        match report {
            Ok(report) => {
                self.report = Some(report.to_string());
                self.problem = None;
            }
            Err(problem) => self.problem = Some(problem),
        }
    }

    /// The lines that fit, each at most so many characters long.
    fn lines(&self, columns: usize, rows: usize) -> Vec<String> {
        let mut text = format!("granary at {}, q quits\n", self.address);
        if let Some(problem) = &self.problem {
            text.push_str(&format!("{problem}\n"));
            if self.report.is_some() {
                text.push_str("What stands below is old, and asked for again each second.\n");
            }
        }
        text.push('\n');
        text.push_str(self.report.as_deref().unwrap_or_default());
        let mut lines: Vec<_> = text
            .lines()
            .flat_map(|line| folded(line, columns))
            .collect();
        if lines.len() > rows {
            lines.truncate(rows.saturating_sub(1));
            lines.push(clipped("… the window is too low for the rest", columns));
        }
        lines
    }
}

/// A line in pieces that fit, the later ones indented; long words are cut.
fn folded(line: &str, columns: usize) -> Vec<String> {
    let line: String = line
        .chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect();
    let columns = columns.max(1);
    // In a narrow column the indent must not be all there is.
    let indent = INDENT.min(columns / 4);
    let mut pieces = Vec::new();
    let mut rest: Vec<char> = line.chars().collect();
    let mut before = 0;
    loop {
        let room = columns - before;
        if rest.len() <= room {
            let text: String = rest.iter().collect();
            pieces.push(format!("{:before$}{text}", "").trim_end().to_owned());
            return pieces;
        }
        // At the last gap; what stands before it is text, or the piece would be empty.
        let is_gap = |at: &usize| rest[*at] == ' ' && rest[..*at].iter().any(|c| *c != ' ');
        let at = (0..=room).rev().find(is_gap).unwrap_or(room);
        let text: String = rest[..at].iter().collect();
        pieces.push(format!("{:before$}{text}", "").trim_end().to_owned());
        let skipped = rest[at..].iter().take_while(|c| **c == ' ').count();
        rest.drain(..at + skipped);
        before = indent;
    }
}

fn clipped(text: &str, columns: usize) -> String {
    text.chars().take(columns).collect()
}

/// The terminal, while it is ours.
struct Screen {
    /// How the keys were; `None` where nothing is typed.
    before: Option<Termios>,
}

impl Screen {
    fn enter() -> Result<Screen> {
        let before = match io::stdin().is_terminal() {
            true => Some(tcgetattr(io::stdin()).context("cannot ask the terminal for its state")?),
            false => None,
        };
        let screen = Screen { before };
        screen.take()?;
        Ok(screen)
    }

    fn take(&self) -> Result<()> {
        if let Some(before) = &self.before {
            let mut own = before.clone();
            // Ctrl-C and Ctrl-Z stay signals.
            own.local_modes
                .remove(LocalModes::ICANON | LocalModes::ECHO);
            tcsetattr(io::stdin(), OptionalActions::Now, &own)
                .context("cannot set the state of the terminal")?;
        }
        write(ENTER)
    }

    fn leave(&self) {
        // A terminal that is gone needs no mending.
        let _ = write(LEAVE);
        if let Some(before) = &self.before {
            let _ = tcsetattr(io::stdin(), OptionalActions::Flush, before);
        }
    }

    fn draw(&self, glance: &Glance) -> Result<()> {
        let (columns, rows) = size(io::stdout());
        let lines = glance.lines(columns, rows);
        let mut frame = HOME.to_owned();
        for (number, line) in lines.iter().enumerate() {
            if number > 0 {
                frame.push_str("\r\n");
            }
            frame.push_str(line);
            // In the last column this would take the last character with it.
            if line.chars().count() < columns {
                frame.push_str(END_OF_LINE);
            }
        }
        if lines.len() < rows {
            frame.push_str("\r\n");
            frame.push_str(END_OF_SCREEN);
        }
        write(&frame)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.leave();
    }
}

fn size(terminal: impl AsFd) -> (usize, usize) {
    match tcgetwinsize(terminal) {
        Ok(size) if size.ws_col > 0 && size.ws_row > 0 => (size.ws_col.into(), size.ws_row.into()),
        _ => (USUAL_COLUMNS, USUAL_ROWS),
    }
}

fn write(text: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    Ok(stdout.flush()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_folded_at_gaps_and_long_words_cut() {
        let check = |line: &str, columns: usize, expected: &[&str]| {
            assert_eq!(folded(line, columns), expected, "{line:?} at {columns}");
        };
        check("", 10, &[""]);
        check("peer      desk", 20, &["peer      desk"]);
        check(
            "peer      desk linked 12400 paths",
            24,
            &["peer      desk linked", "      12400 paths"],
        );
        check(
            "peer      12D3KooWabc",
            12,
            &["peer", "   12D3KooWa", "   bc"],
        );
        check(
            "  sending x",
            1,
            &["", "s", "e", "n", "d", "i", "n", "g", "x"],
        );
        check("a\x1b[31mb\n", 10, &["a?[31mb?"]);
    }

    #[test]
    fn no_line_is_longer_than_the_window_whatever_its_size() {
        let glance = Glance {
            address: "127.0.0.1:4726".to_owned(),
            report: Some("peer      linked    desk   192.168.1.20:4727   ↑ 3.0 MiB\n".repeat(9)),
            problem: Some("The node is away.".to_owned()),
        };
        for columns in 1..100 {
            for rows in [1, 2, 10, 50] {
                let lines = glance.lines(columns, rows);
                assert!(lines.len() <= rows);
                let fits = |line: &String| line.chars().count() <= columns;
                assert!(lines.iter().all(fits), "{columns}: {lines:?}");
            }
        }
    }
}
