//! Markdown, as much of it as the manual needs: fenced blocks, and comments that begin a new part.

/// What a reader copies, or is shown.
#[derive(Debug, PartialEq, Eq)]
pub struct Block<'a> {
    /// The first word after the fence: `console`, `sh`, `toml`, …; empty when there is none.
    pub language: &'a str,
    /// The second word, where the first is `sh`: the machine that it is for.
    pub machine: Option<&'a str>,
    /// Its lines without the indentation of the fence.
    pub lines: Vec<&'a str>,
    /// Of the fence, from 1.
    pub line: usize,
}

/// What stands in a document, in order.
#[derive(Debug, PartialEq, Eq)]
pub enum Part<'a> {
    Block(Block<'a>),
    /// `<!-- new machines -->`: what follows begins with machines that know of nothing.
    NewMachines,
}

pub fn parts(text: &str) -> Vec<Part<'_>> {
    let mut parts = Vec::new();
    let mut open: Option<(Block, usize)> = None;
    for (number, line) in text.lines().enumerate() {
        let indentation = line.len() - line.trim_start().len();
        match (&mut open, line.trim_start().strip_prefix("```")) {
            (Some(_), Some("")) => parts.extend(open.take().map(|(block, _)| Part::Block(block))),
            (Some((block, depth)), _) => block.lines.push(&line[(*depth).min(indentation)..]),
            (None, Some(info)) => {
                let mut words = info.split_whitespace();
                let block = Block {
                    language: words.next().unwrap_or_default(),
                    machine: words.next(),
                    lines: Vec::new(),
                    line: number + 1,
                };
                open = Some((block, indentation));
            }
            (None, None) if line.trim() == "<!-- new machines -->" => {
                parts.push(Part::NewMachines);
            }
            (None, None) => {}
        }
    }
    assert!(open.is_none(), "a block that does not end: {open:?}");
    parts
}

/// Commands with what is shown of their output.
#[derive(Debug, PartialEq, Eq)]
pub struct Step {
    pub machine: String,
    pub is_root: bool,
    pub command: String,
    pub shown: Vec<String>,
    /// Lines after that of the fence.
    pub offset: usize,
}

impl Block<'_> {
    /// The commands of a `console` block, in which `name# ` is root's prompt on a machine and `name$ ` anybody's,
    /// or of an `sh` block, which is root's.
    pub fn steps(&self, machines: &[&str]) -> Vec<Step> {
        let mut steps: Vec<Step> = Vec::new();
        let mut goes_on = false;
        for (offset, line) in self.lines.iter().enumerate() {
            if goes_on && let Some(last) = steps.last_mut() {
                last.command += &format!("\n{line}");
                goes_on = line.ends_with('\\');
                continue;
            }
            let prompt = machines.iter().find_map(|name| {
                let rest = line.strip_prefix(name)?;
                let root = rest.strip_prefix("# ").map(|command| (true, command));
                let (is_root, command) =
                    root.or(rest.strip_prefix("$ ").map(|rest| (false, rest)))?;
                Some((name.to_string(), is_root, command))
            });
            let first = machines.first().copied().unwrap_or_default();
            let (machine, is_root, command) = match (self.language, prompt) {
                ("console", Some(prompt)) => prompt,
                ("console", None) => {
                    let last = steps.last_mut().expect("a console begins with a prompt");
                    last.shown.push((*line).to_owned());
                    continue;
                }
                _ if line.trim().is_empty() || line.starts_with('#') => continue,
                _ => (self.machine.unwrap_or(first).to_owned(), true, *line),
            };
            goes_on = command.ends_with('\\');
            steps.push(Step {
                machine,
                is_root,
                command: command.to_owned(),
                shown: Vec::new(),
                offset: offset + 1,
            });
        }
        steps
    }
}

#[test]
fn blocks_are_found_with_their_prompts_and_output() {
    let text = "a\n\n  ```console\n  desk# one \\\n    more\n  shown\n  nas$ two\n  ```\n<!-- new machines -->\n\
                ```sh nas\n# not this\nthree   # but this\n```\n";
    let parts = parts(text);
    let [Part::Block(first), Part::NewMachines, Part::Block(second)] = &parts[..] else {
        panic!("{parts:?}");
    };
    assert_eq!((first.language, first.line), ("console", 3));
    let machines = ["desk", "nas"];
    let step = |machine: &str, is_root, command: &str, shown: &[&str], offset| Step {
        machine: machine.to_owned(),
        is_root,
        command: command.to_owned(),
        shown: shown.iter().map(|line| (*line).to_owned()).collect(),
        offset,
    };
    assert_eq!(
        first.steps(&machines),
        [
            step("desk", true, "one \\\n  more", &["shown"], 1),
            step("nas", false, "two", &[], 4)
        ]
    );
    assert_eq!(
        second.steps(&machines),
        [step("nas", true, "three   # but this", &[], 2)]
    );
}
