//! Trace: everything that happens in a run as lines of text, and their hash.
//!
//! What is hashed is exactly what `replay` prints, so `sha256sum` of that output is the trace hash. A
//! line holds virtual nanoseconds, the machine's number, a word and facts; messages appear as
//! their kind, length and the hash of their encoding; peers as machine numbers.

use std::fmt::{self, Write as _};
use std::io;
use std::time::Duration;

use sha2::{Digest, Sha256};

/// The hash of a finished trace.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct TraceHash([u8; 32]);

impl fmt::Display for TraceHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for TraceHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TraceHash({self})")
    }
}

/// Takes lines, hashes them, and passes them on where they are wanted.
pub struct Trace {
    digest: Sha256,
    line: String,
    lines: u64,
    copy: Option<Box<dyn io::Write>>,
    /// A copy that cannot be written ends the copying; whoever asked for it is told.
    failed: Option<io::Error>,
}

impl Trace {
    pub fn new(copy: Option<Box<dyn io::Write>>) -> Trace {
        Trace {
            digest: Sha256::new(),
            line: String::new(),
            lines: 0,
            copy,
            failed: None,
        }
    }

    pub fn record(&mut self, now: Duration, machine: usize, facts: fmt::Arguments<'_>) {
        self.line.clear();
        writeln!(self.line, "{} {machine} {facts}", now.as_nanos())
            .expect("writing to a string succeeds");
        self.digest.update(self.line.as_bytes());
        self.lines += 1;
        if let Some(copy) = &mut self.copy
            && let Err(error) = copy.write_all(self.line.as_bytes())
        {
            self.failed = Some(error);
            self.copy = None;
        }
    }

    pub fn lines(&self) -> u64 {
        self.lines
    }

    /// Ends the trace.
    ///
    /// # Errors
    /// When the copy could not be written.
    pub fn finish(mut self) -> io::Result<TraceHash> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        if let Some(copy) = &mut self.copy {
            copy.flush()?;
        }
        Ok(TraceHash(self.digest.finalize().into()))
    }
}
