//! nix.conf: the few lines that make Nix ask this node, put in and taken out again.
//!
//! Nix reads a line at a time: `name = value`, where a later line wins and `extra-name = value` adds to
//! what stands before it; `include file` and `!include file` (which may be missing) read another file in
//! their place; `#` begins a comment. (Nix manual, command-ref/conf-file; `libutil/config.cc`.)
//!
//! Invariants: every line that is added ends in [`MARK`], and a line that is changed is followed by one
//! that says so; so taking all of it out gives the bytes that were there before, whatever else was
//! changed meanwhile. Lines that are not ours are kept as they are, understood or not.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// What ends each line of ours.
pub const MARK: &str = "# granary use";

const MADE: &str = "# this file was made by `granary use` # granary use";
const NO_NEWLINE: &str = "# the line above had no end # granary use";
const FIRST: &str =
    "# was put first in the line above by `granary use`, which `--undo` takes back:";

/// How deep files may include each other; Nix has no limit and ends at the stack's.
const INCLUDES_MAX: usize = 16;

/// Largest file read; a real one has some kilobytes.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// What Nix asks when nothing is said.
pub const DEFAULT_SUBSTITUTER: &str = "https://cache.nixos.org/";
pub const DEFAULT_KEY: &str = "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=";

/// Seconds after which Nix asks again for what was not there; an hour by default.
pub const NEGATIVE_TTL: u64 = 10;
const DEFAULT_NEGATIVE_TTL: u64 = 3600;

/// What is wanted of Nix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// The address of the endpoint: `http://127.0.0.1:4726`.
    pub substituter: String,
    /// Keys in Nix's format.
    pub keys: Vec<String>,
}

/// What Nix makes of a file and those that it includes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Effective {
    pub substituters: Vec<String>,
    pub keys: Vec<String>,
    pub negative_ttl: u64,
    /// Where `substituters` was set last, if it was: in the file itself, at this line, or elsewhere.
    set_at: Option<SetAt>,
    is_extended: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SetAt {
    Line(usize),
    Included,
}

/// Why a file cannot be read as Nix would.
#[derive(Debug, thiserror::Error)]
pub enum NixConfError {
    #[error("cannot read {path}: {source}", path = .path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("files include each other more than {INCLUDES_MAX} deep at {path}", path = .path.display())]
    Depth { path: PathBuf },
}

/// Reads a file; nothing when there is none.
pub fn read(path: &Path) -> Result<Option<String>, NixConfError> {
    let failed = |source| NixConfError::Read {
        path: path.to_owned(),
        source,
    };
    match fs::metadata(path) {
        Ok(metadata) if metadata.len() > FILE_BYTES_MAX => Err(failed(io::Error::other(format!(
            "it has more than {FILE_BYTES_MAX} bytes"
        )))),
        Ok(_) => fs::read_to_string(path).map(Some).map_err(failed),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed(error)),
    }
}

impl Effective {
    /// Reads a text as the file at `path`, with what it includes.
    pub fn of(text: &str, path: &Path) -> Result<Effective, NixConfError> {
        let mut effective = Effective {
            substituters: vec![DEFAULT_SUBSTITUTER.to_owned()],
            keys: vec![DEFAULT_KEY.to_owned()],
            negative_ttl: DEFAULT_NEGATIVE_TTL,
            set_at: None,
            is_extended: false,
        };
        effective.take(text, path, 0)?;
        Ok(effective)
    }

    fn take(&mut self, text: &str, path: &Path, depth: usize) -> Result<(), NixConfError> {
        if depth > INCLUDES_MAX {
            let path = path.to_owned();
            return Err(NixConfError::Depth { path });
        }
        for (number, line) in text.lines().enumerate() {
            let line = line.split('#').next().unwrap_or_default();
            let words: Vec<&str> = line.split_whitespace().collect();
            match words.as_slice() {
                ["include", file] | ["!include", file] => {
                    let folder = path.parent().unwrap_or(Path::new("/"));
                    let included = folder.join(file);
                    let missing = || NixConfError::Read {
                        path: included.clone(),
                        source: io::ErrorKind::NotFound.into(),
                    };
                    match read(&included) {
                        Ok(Some(text)) => self.take(&text, &included, depth + 1)?,
                        // Nix passes over one that it may not read as well.
                        Ok(None) | Err(_) if words[0] == "!include" => {}
                        Ok(None) => return Err(missing()),
                        Err(error) => return Err(error),
                    }
                }
                [name, "=", values @ ..] => {
                    let at = match depth {
                        0 => SetAt::Line(number),
                        _ => SetAt::Included,
                    };
                    self.set(name, values, at);
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn set(&mut self, name: &str, values: &[&str], at: SetAt) {
        let owned = || values.iter().map(|value| (*value).to_owned());
        match name {
            "substituters" | "binary-caches" => {
                self.substituters = owned().collect();
                self.set_at = Some(at);
            }
            "extra-substituters" | "extra-binary-caches" => {
                self.substituters.extend(owned());
                self.is_extended = true;
            }
            "trusted-public-keys" | "binary-cache-public-keys" => self.keys = owned().collect(),
            "extra-trusted-public-keys" | "extra-binary-cache-public-keys" => {
                self.keys.extend(owned());
            }
            "narinfo-cache-negative-ttl" => {
                if let [value] = values
                    && let Ok(seconds) = value.parse()
                {
                    self.negative_ttl = seconds;
                }
            }
            _ => {}
        }
    }

    /// Whether this address is asked, however its end is written.
    pub fn asks(&self, substituter: &str) -> bool {
        let same = |one: &String| one.trim_end_matches('/') == substituter.trim_end_matches('/');
        self.substituters.iter().any(same)
    }

    pub fn trusts(&self, key: &str) -> bool {
        self.keys.iter().any(|one| one == key)
    }
}

/// Returns the text with what is wanted in it; `text` is `None` when there is no file yet.
///
/// The same again when nothing is missing.
pub fn put_in(text: Option<&str>, path: &Path, wanted: &Wanted) -> Result<String, NixConfError> {
    // What an earlier version or configuration put in goes first.
    let before = match text {
        Some(text) => take_out(text),
        None => None,
    };
    let is_new = before.is_none();
    let before = before.unwrap_or_default();
    let effective = Effective::of(&before, path)?;
    let mut lines: Vec<String> = before.lines().map(str::to_owned).collect();
    let mut head = Vec::new();
    let mut tail = Vec::new();
    if is_new {
        head.push(MADE.to_owned());
    } else if !before.is_empty() && !before.ends_with('\n') {
        tail.push(NO_NEWLINE.to_owned());
    }
    let ours = &wanted.substituter;
    let ours_last = |name: &str| format!("{name} = {ours} {MARK}");
    let is_first = effective.substituters.first() == Some(ours);
    match effective.set_at {
        _ if is_first => {}
        Some(SetAt::Line(number)) => {
            if let Some(line) = lines.get_mut(number)
                && let Some(equals) = line.find('=')
            {
                line.insert_str(equals + 1, &format!(" {ours}"));
                lines.insert(number + 1, format!("{FIRST} {ours} {MARK}"));
            }
        }
        // Another file's line cannot be changed, and is not repeated here, where it would hide changes of it. Nix
        // sorts by priority, so the place does not matter.
        Some(SetAt::Included) => tail.push(ours_last("extra-substituters")),
        // Before lines that add to it, which it would take back.
        None if effective.is_extended => {
            let line = format!("substituters = {ours} {DEFAULT_SUBSTITUTER} {MARK}");
            head.push(line);
        }
        None => {
            let line = format!("substituters = {ours} {DEFAULT_SUBSTITUTER} {MARK}");
            tail.push(line);
        }
    }
    let untrusted = wanted.keys.iter().filter(|key| !effective.trusts(key));
    let untrusted: Vec<&str> = untrusted.map(String::as_str).collect();
    if !untrusted.is_empty() {
        let keys = untrusted.join(" ");
        tail.push(format!("extra-trusted-public-keys = {keys} {MARK}"));
    }
    if effective.negative_ttl > NEGATIVE_TTL {
        tail.push(format!(
            "narinfo-cache-negative-ttl = {NEGATIVE_TTL} {MARK}"
        ));
    }
    if head.iter().chain(&tail).all(|line| line == NO_NEWLINE)
        && lines.len() == before.lines().count()
    {
        return Ok(before);
    }
    // Line ends of the original that `lines` does not show, as in a file of Windows, stay with their lines.
    let mut out = String::new();
    let mut originals = before.split_inclusive('\n');
    for line in &head {
        out.push_str(line);
        out.push('\n');
    }
    for line in &lines {
        if line.ends_with(MARK) && line.starts_with(FIRST) {
            out.push_str(line);
            out.push('\n');
            continue;
        }
        let original = originals.next().unwrap_or_default();
        let end = &original[original.trim_end_matches(['\r', '\n']).len()..];
        out.push_str(line);
        out.push_str(end);
        if end.is_empty() {
            out.push('\n');
        }
    }
    for line in &tail {
        out.push_str(line);
        out.push('\n');
    }
    Ok(out)
}

/// Returns the text without what was put in; `None` when nothing is left of a file that was made.
pub fn take_out(text: &str) -> Option<String> {
    let mut lines: Vec<String> = Vec::new();
    let mut was_made = false;
    for line in text.split_inclusive('\n') {
        let bare = line.trim_end();
        if bare == MADE {
            was_made = true;
        } else if bare == NO_NEWLINE {
            if let Some(last) = lines.last_mut() {
                last.truncate(last.trim_end_matches(['\r', '\n']).len());
            }
        } else if let Some(ours) = bare
            .strip_prefix(FIRST)
            .and_then(|rest| rest.strip_suffix(MARK))
        {
            let ours = format!("= {}", ours.trim());
            if let Some(last) = lines.last_mut()
                && let Some(at) = last.find(&ours)
            {
                last.replace_range(at + 1..at + ours.len(), "");
            }
        } else if !bare.ends_with(MARK) {
            lines.push(line.to_owned());
        }
    }
    let text = lines.concat();
    match was_made && text.is_empty() {
        true => None,
        false => Some(text),
    }
}

/// The lines as they stand in a nix.conf that has nothing else.
pub fn for_nix_conf(wanted: &Wanted) -> String {
    format!(
        "substituters = {} {DEFAULT_SUBSTITUTER}\ntrusted-public-keys = {}\nnarinfo-cache-negative-ttl = {NEGATIVE_TTL}\n",
        wanted.substituter,
        wanted.keys.join(" "),
    )
}

/// The same for a machine whose nix.conf NixOS writes.
pub fn for_nixos(wanted: &Wanted) -> String {
    let quoted = |values: &[String]| {
        let quoted: Vec<String> = values.iter().map(|value| format!("\"{value}\"")).collect();
        quoted.join(" ")
    };
    format!(
        "nix.settings = {{\n  substituters = lib.mkBefore [ \"{}\" ];\n  \
         trusted-public-keys = [ {} ];\n  narinfo-cache-negative-ttl = {NEGATIVE_TTL};\n}};\n",
        wanted.substituter,
        quoted(&wanted.keys),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: &str = "http://127.0.0.1:4726";
    const KEY: &str = "main-1:aGVsbG8=";

    fn wanted() -> Wanted {
        Wanted {
            substituter: OURS.to_owned(),
            keys: vec![DEFAULT_KEY.to_owned(), KEY.to_owned()],
        }
    }

    /// Puts in, twice, and takes out; returns what Nix makes of the text in between.
    fn check(text: Option<&str>, path: &Path) -> (String, Effective) {
        let put = put_in(text, path, &wanted()).unwrap();
        assert_eq!(put_in(Some(&put), path, &wanted()).unwrap(), put);
        assert_eq!(take_out(&put).as_deref(), text, "{put}");
        let effective = Effective::of(&put, path).unwrap();
        assert!(effective.asks(OURS) && effective.trusts(KEY) && effective.trusts(DEFAULT_KEY));
        assert_eq!(effective.negative_ttl, NEGATIVE_TTL, "{put}");
        (put, effective)
    }

    fn first(text: &str) -> Vec<String> {
        let (put, effective) = check(Some(text), Path::new("/nowhere/nix.conf"));
        assert_eq!(effective.substituters[0], OURS, "{put}");
        effective.substituters[1..].to_vec()
    }

    #[test]
    fn what_was_there_comes_back_to_the_byte() {
        let key = format!("trusted-public-keys = {DEFAULT_KEY}");
        for text in [
            "",
            "\n\n",
            "# a comment",
            "sandbox = false\n",
            "substituters = https://a https://b\n",
            "substituters = https://a",
            "  substituters   =    https://a   https://b   # with words\nx = y",
            "substituters = https://a\nsubstituters = https://b\n",
            "substituters =\n",
            "binary-caches = https://a\n",
            "substituters = https://a\r\nsandbox = true\r\n",
            "narinfo-cache-negative-ttl = 0\n",
            "!include missing.conf\nextra-substituters = https://e\n",
            &key,
        ] {
            if text.contains("ttl") {
                let put = put_in(Some(text), Path::new("/nowhere/x"), &wanted()).unwrap();
                assert_eq!(take_out(&put).as_deref(), Some(text));
                // A lower one is better still.
                assert!(!put.contains("ttl = 10"), "{put}");
            } else {
                check(Some(text), Path::new("/nowhere/nix.conf"));
            }
        }
        check(None, Path::new("/nowhere/nix.conf"));
    }

    #[test]
    fn ours_is_asked_first_and_the_others_after_it() {
        let default = DEFAULT_SUBSTITUTER;
        assert_eq!(first(""), [default]);
        assert_eq!(
            first("substituters = https://a https://b\n"),
            ["https://a", "https://b"]
        );
        assert_eq!(
            first("substituters = https://a\nsubstituters = https://b"),
            ["https://b"]
        );
        assert_eq!(
            first("extra-substituters = https://e\n"),
            [default, "https://e"]
        );
        assert_eq!(
            first("substituters = https://a\nextra-substituters = https://e"),
            ["https://a", "https://e"]
        );
        assert_eq!(first("substituters =\n"), [] as [&str; 0]);
    }

    #[test]
    fn an_included_file_has_its_say() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("nix.conf");
        fs::write(
            folder.path().join("more.conf"),
            "substituters = https://m\n",
        )
        .unwrap();
        let (put, effective) = check(Some("!include more.conf\n"), &path);
        assert_eq!(effective.substituters, ["https://m", OURS], "{put}");
        // One that includes itself is an error and no endless loop.
        fs::write(folder.path().join("more.conf"), "include more.conf\n").unwrap();
        assert!(put_in(Some("include more.conf\n"), &path, &wanted()).is_err());
        assert!(put_in(Some("include none.conf\n"), &path, &wanted()).is_err());
    }

    #[test]
    fn changes_made_meanwhile_stay() {
        let path = Path::new("/nowhere/nix.conf");
        let put = put_in(Some("substituters = https://a\n"), path, &wanted()).unwrap();
        let changed = format!("max-jobs = 3\n{put}cores = 2\n").replace("https://a", "https://z");
        assert_eq!(
            take_out(&changed).unwrap(),
            "max-jobs = 3\nsubstituters = https://z\ncores = 2\n"
        );
    }

    #[test]
    fn what_is_there_already_is_not_put_in_and_not_taken_out() {
        let path = Path::new("/nowhere/nix.conf");
        let text = format!(
            "substituters = {OURS} https://a\ntrusted-public-keys = {DEFAULT_KEY} {KEY}\n\
             narinfo-cache-negative-ttl = 5"
        );
        assert_eq!(put_in(Some(&text), path, &wanted()).unwrap(), text);
        assert_eq!(take_out(&text), Some(text));
    }

    #[test]
    fn nixos_is_told_in_its_own_language() {
        let text = for_nixos(&wanted());
        assert!(text.contains("lib.mkBefore [ \"http://127.0.0.1:4726\" ]"));
        assert!(text.contains(&format!("\"{DEFAULT_KEY}\" \"{KEY}\"")));
    }
}
