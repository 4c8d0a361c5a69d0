//! Layout: where each byte of a NAR comes from, found without producing the bytes before it.
//!
//! A walk over a tree (or the events of a [`Decoder`](super::Decoder)) feeds a [`LayoutBuilder`]
//! in NAR order. The finished [`Layout`] keeps 32 bytes a node plus its name; a node's entry holds
//! the offset of its first NAR byte, so the node at an offset is one binary search away.
//!
//! The bytes of one node are its *opening* (everything up to its contents), its *contents*, and its
//! *closing*: padding, its own parentheses, and those of the directories that end right after it.
//! The closing follows from the depths of this node and the next one, so no entry is kept for an end.

use super::{
    LEVELS_MAX, MAGIC, NODES_MAX, NameError, Printable, SIZE_MAX, TargetError, check_name,
    check_target, decoder::Event, padding, string_bytes,
};

/// One file tree without its contents, from which its NAR can be produced at any offset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// In NAR order; `start` is strictly ascending. The root is first, so never empty.
    nodes: Vec<Node>,
    /// Each node's name, followed by its target if it is a symlink.
    names: Vec<u8>,
    nar_size: u64,
}

/// One node, 32 bytes. `size` is the length of a file's contents or of a symlink's target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Node {
    start: u64,
    size: u64,
    name_start: u32,
    parent: u32,
    name_length: u8,
    depth: u8,
    kind: Kind,
}

const _: () = assert!(size_of::<Node>() == 32);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Directory,
    Regular,
    Executable,
    Symlink,
}

/// Names a node of one [`Layout`]: in practice a regular file, whose contents are to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileIndex(u32);

impl FileIndex {
    /// The root node of every layout.
    pub const ROOT: FileIndex = FileIndex(0);
}

/// A piece of a NAR.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Segment {
    /// Bytes of the format itself; never empty, at most [`FRAMING_BYTES_MAX`].
    Framing(Vec<u8>),
    /// `length` > 0 bytes of a file's contents, from byte `offset` of the file to its end.
    Contents {
        file: FileIndex,
        offset: u64,
        length: u64,
    },
}

/// Bytes of one [`Segment::Framing`]: neighbouring nodes are joined up to half of this, and one
/// more node (a name, a target, the ends of 64 levels) needs less than the other half.
pub const FRAMING_BYTES_MAX: usize = 16 * 1024;

impl Layout {
    /// Returns the size of the whole NAR in bytes, at most [`SIZE_MAX`].
    pub fn nar_size(&self) -> u64 {
        self.nar_size
    }

    /// Returns the pieces of the NAR from byte `from` to its end; none when `from` ≥ `nar_size`.
    ///
    /// Finding the first piece costs a binary search over the nodes.
    pub fn segments(&self, from: u64) -> Segments<'_> {
        // The root starts at 0, so at least one node starts at or before `from`.
        let node = self.nodes.partition_point(|node| node.start <= from) - 1;
        Segments {
            layout: self,
            node: if from < self.nar_size {
                node
            } else {
                self.nodes.len()
            },
            part: Part::Opening,
            skip: from - self.nodes[node].start,
        }
    }

    /// Returns the path of a node below the root, components joined by `/`; empty for the root.
    pub fn path(&self, file: FileIndex) -> Vec<u8> {
        let mut names = Vec::new();
        let mut file = file;
        while let Some(parent) = self.parent(file) {
            names.push(self.name(file));
            file = parent;
        }
        names.reverse();
        names.join(&b'/')
    }

    /// Returns a node's name in its directory; empty for the root.
    pub fn name(&self, file: FileIndex) -> &[u8] {
        self.node_name(self.node(file))
    }

    /// Returns the directory that holds a node; `None` for the root.
    pub fn parent(&self, file: FileIndex) -> Option<FileIndex> {
        (file != FileIndex::ROOT).then(|| FileIndex(self.node(file).parent))
    }

    /// Returns the length of a file's contents; 0 for a directory.
    pub fn size(&self, file: FileIndex) -> u64 {
        let node = self.node(file);
        match node.kind {
            Kind::Directory => 0,
            Kind::Regular | Kind::Executable | Kind::Symlink => node.size,
        }
    }

    /// Returns the memory that this layout holds, for caches bounded by bytes.
    pub fn memory_bytes(&self) -> usize {
        size_of::<Layout>() + self.nodes.capacity() * size_of::<Node>() + self.names.capacity()
    }

    /// Returns the number of nodes: directories, files and symlinks.
    pub fn node_count(&self) -> usize {
        self.nodes.len()
    }

    /// Returns what a node is, its depth (the root's is 0) and its NAR offset of contents.
    pub(super) fn describe(&self, index: usize) -> Option<Described<'_>> {
        let node = self.nodes.get(index)?;
        Some(Described {
            kind: node.kind,
            depth: usize::from(node.depth),
            file: FileIndex(index as u32),
            name: self.node_name(node),
            size: node.size,
            contents_offset: node.start + opening_bytes(node),
            target: self.node_target(node),
        })
    }

    fn node(&self, file: FileIndex) -> &Node {
        &self.nodes[file.0 as usize]
    }

    fn node_name(&self, node: &Node) -> &[u8] {
        let start = node.name_start as usize;
        &self.names[start..start + usize::from(node.name_length)]
    }

    fn node_target(&self, node: &Node) -> &[u8] {
        match node.kind {
            Kind::Symlink => {
                let start = node.name_start as usize + usize::from(node.name_length);
                &self.names[start..start + node.size as usize]
            }
            Kind::Directory | Kind::Regular | Kind::Executable => &[],
        }
    }

    /// Returns how many nodes end right after this one's contents, itself included.
    fn ends_after(&self, index: usize) -> usize {
        let depth = usize::from(self.nodes[index].depth);
        match self.nodes.get(index + 1) {
            Some(next) => depth + 1 - usize::from(next.depth),
            None => depth + 1,
        }
    }

    fn put_opening(&self, out: &mut Vec<u8>, node: &Node) {
        if node.depth == 0 {
            out.extend_from_slice(ROOT_OPENING);
        } else {
            out.extend_from_slice(ENTRY_NAME);
            put_string(out, self.node_name(node));
            out.extend_from_slice(ENTRY_NODE);
        }
        match node.kind {
            Kind::Directory => out.extend_from_slice(DIRECTORY),
            Kind::Regular | Kind::Executable => {
                out.extend_from_slice(if node.kind == Kind::Executable {
                    EXECUTABLE
                } else {
                    REGULAR
                });
                out.extend_from_slice(&node.size.to_le_bytes());
            }
            Kind::Symlink => {
                out.extend_from_slice(SYMLINK);
                put_string(out, self.node_target(node));
            }
        }
    }

    fn put_closing(&self, out: &mut Vec<u8>, index: usize) {
        let node = &self.nodes[index];
        let zeros = padding(contents_bytes(node)) as usize;
        out.extend_from_slice(&[0; 8][..zeros]);
        for depth in (0..=node.depth).rev().take(self.ends_after(index)) {
            out.extend_from_slice(if depth == 0 { CLOSE } else { CLOSE_ENTRY });
        }
    }
}

/// A node as the listing wants it.
pub(super) struct Described<'a> {
    pub kind: Kind,
    pub depth: usize,
    pub file: FileIndex,
    pub name: &'a [u8],
    pub size: u64,
    pub contents_offset: u64,
    pub target: &'a [u8],
}

/// The pieces of a NAR from one offset on; see [`Layout::segments`].
#[derive(Debug, Clone)]
pub struct Segments<'a> {
    layout: &'a Layout,
    node: usize,
    part: Part,
    /// Bytes of the next parts that lie before the first byte asked for.
    skip: u64,
}

#[derive(Debug, Clone, Copy)]
enum Part {
    Opening,
    Contents,
    Closing,
}

impl Iterator for Segments<'_> {
    type Item = Segment;

    fn next(&mut self) -> Option<Segment> {
        let mut framing = Vec::new();
        // Only the first part can be skipped in part, and then `framing` holds nothing else.
        while let Some(node) = self.layout.nodes.get(self.node) {
            let before = framing.len() as u64;
            match self.part {
                Part::Opening if framing.len() >= FRAMING_BYTES_MAX / 2 => break,
                Part::Opening => {
                    self.layout.put_opening(&mut framing, node);
                    self.part = Part::Contents;
                }
                Part::Contents => {
                    let length = contents_bytes(node);
                    if length > self.skip {
                        if !framing.is_empty() {
                            break;
                        }
                        let offset = std::mem::take(&mut self.skip);
                        self.part = Part::Closing;
                        return Some(Segment::Contents {
                            file: FileIndex(self.node as u32),
                            offset,
                            length: length - offset,
                        });
                    }
                    self.skip -= length;
                    self.part = Part::Closing;
                    continue;
                }
                Part::Closing => {
                    self.layout.put_closing(&mut framing, self.node);
                    self.part = Part::Opening;
                    self.node += 1;
                }
            }
            let skipped = self.skip.min(framing.len() as u64 - before);
            framing.drain(..skipped as usize);
            self.skip -= skipped;
        }
        (!framing.is_empty()).then_some(Segment::Framing(framing))
    }
}

/// Builds a [`Layout`] from nodes given in NAR order: a directory, its entries, its [`end`](Self::end).
///
/// The root's name is empty. After an error the builder must be dropped.
#[derive(Debug, Default)]
pub struct LayoutBuilder {
    nodes: Vec<Node>,
    names: Vec<u8>,
    nar_size: u64,
    open: Vec<OpenDirectory>,
}

/// A directory that has not ended, and the last entry it got.
#[derive(Debug)]
struct OpenDirectory {
    node: u32,
    last: Option<u32>,
}

/// What is wrong with a tree that should be laid out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    #[error(transparent)]
    Name(#[from] NameError),
    #[error(transparent)]
    Target(#[from] TargetError),
    #[error("entry {name} does not sort after {previous}, its predecessor")]
    Unsorted {
        name: Printable,
        previous: Printable,
    },
    #[error("the root of a tree has no name, but got {0}")]
    NamedRoot(Printable),
    #[error("node {0} comes after the end of the tree")]
    AfterEnd(Printable),
    #[error("a directory ends that never started")]
    EndWithoutDirectory,
    #[error("the tree is incomplete: {open} directories have not ended")]
    Incomplete { open: usize },
    #[error("the tree is empty: not even its root was given")]
    Empty,
    #[error("node {0} is deeper than {LEVELS_MAX} levels")]
    TooDeep(Printable),
    #[error("the tree has more than {NODES_MAX} nodes")]
    TooManyNodes,
    #[error("the names and symlink targets of the tree exceed {max} bytes", max = u32::MAX)]
    TooManyNames,
    #[error("the nar would exceed {SIZE_MAX} bytes")]
    TooLarge,
}

impl LayoutBuilder {
    pub fn new() -> LayoutBuilder {
        LayoutBuilder::default()
    }

    /// Starts a directory; its entries follow, strictly ascending by the bytes of their names.
    pub fn directory(&mut self, name: &[u8]) -> Result<(), LayoutError> {
        let node = self.push(name, Kind::Directory, 0, &[])?;
        self.open.push(OpenDirectory {
            node: node.0,
            last: None,
        });
        Ok(())
    }

    /// Ends the directory that was started last.
    pub fn end(&mut self) -> Result<(), LayoutError> {
        let directory = self.open.pop().ok_or(LayoutError::EndWithoutDirectory)?;
        self.close(self.nodes[directory.node as usize].depth)
    }

    /// Adds a regular file of `size` bytes.
    pub fn regular(
        &mut self,
        name: &[u8],
        executable: bool,
        size: u64,
    ) -> Result<FileIndex, LayoutError> {
        let kind = if executable {
            Kind::Executable
        } else {
            Kind::Regular
        };
        if size > SIZE_MAX {
            return Err(LayoutError::TooLarge);
        }
        let file = self.push(name, kind, size, &[])?;
        self.grow(size + padding(size))?;
        self.close(self.nodes[file.0 as usize].depth)?;
        Ok(file)
    }

    /// Adds a symlink.
    pub fn symlink(&mut self, name: &[u8], target: &[u8]) -> Result<(), LayoutError> {
        check_target(target)?;
        let file = self.push(name, Kind::Symlink, target.len() as u64, target)?;
        self.close(self.nodes[file.0 as usize].depth)
    }

    /// Returns the layout of the one tree that was given.
    pub fn finish(mut self) -> Result<Layout, LayoutError> {
        if !self.open.is_empty() {
            return Err(LayoutError::Incomplete {
                open: self.open.len(),
            });
        }
        if self.nodes.is_empty() {
            return Err(LayoutError::Empty);
        }
        self.nodes.shrink_to_fit();
        self.names.shrink_to_fit();
        Ok(Layout {
            nodes: self.nodes,
            names: self.names,
            nar_size: self.nar_size,
        })
    }

    fn push(
        &mut self,
        name: &[u8],
        kind: Kind,
        size: u64,
        target: &[u8],
    ) -> Result<FileIndex, LayoutError> {
        let index = self.nodes.len() as u32;
        let depth = self.open.len();
        let parent = match self.open.last() {
            Some(directory) => {
                check_name(name)?;
                if let Some(last) = directory.last {
                    let last = &self.nodes[last as usize];
                    let start = last.name_start as usize;
                    let previous = &self.names[start..start + usize::from(last.name_length)];
                    if previous >= name {
                        return Err(LayoutError::Unsorted {
                            name: name.into(),
                            previous: previous.into(),
                        });
                    }
                }
                directory.node
            }
            None if index != 0 => return Err(LayoutError::AfterEnd(name.into())),
            None if !name.is_empty() => return Err(LayoutError::NamedRoot(name.into())),
            None => 0,
        };
        if depth >= LEVELS_MAX {
            return Err(LayoutError::TooDeep(name.into()));
        }
        if self.nodes.len() >= NODES_MAX {
            return Err(LayoutError::TooManyNodes);
        }
        let name_start = u32::try_from(self.names.len()).map_err(|_| LayoutError::TooManyNames)?;
        let node = Node {
            start: self.nar_size,
            size,
            name_start,
            parent,
            name_length: name.len() as u8,
            depth: depth as u8,
            kind,
        };
        if let Some(directory) = self.open.last_mut() {
            directory.last = Some(index);
        }
        self.names.extend_from_slice(name);
        self.names.extend_from_slice(target);
        self.nodes.push(node);
        self.grow(opening_bytes(&node))?;
        Ok(FileIndex(index))
    }

    fn close(&mut self, depth: u8) -> Result<(), LayoutError> {
        let closing = if depth == 0 { CLOSE } else { CLOSE_ENTRY };
        self.grow(closing.len() as u64)
    }

    fn grow(&mut self, bytes: u64) -> Result<(), LayoutError> {
        self.nar_size = match self.nar_size.checked_add(bytes) {
            Some(nar_size) if nar_size <= SIZE_MAX => nar_size,
            _ => return Err(LayoutError::TooLarge),
        };
        Ok(())
    }
}

/// Turns a decoder's events into a layout: what an anchor keeps of a NAR that it received.
///
/// Memory grows with the nodes actually received, each of which took more bytes as NAR than here.
#[derive(Debug, Default)]
pub struct LayoutRecorder {
    builder: LayoutBuilder,
    name: Vec<u8>,
}

impl LayoutRecorder {
    pub fn new() -> LayoutRecorder {
        LayoutRecorder::default()
    }

    /// Takes the next event of one decoder.
    ///
    /// # Errors
    /// Only [`LayoutError::TooManyNodes`], `TooManyNames` and `TooLarge`: the decoder checked the rest.
    pub fn record(&mut self, event: &Event<'_>) -> Result<(), LayoutError> {
        match event {
            Event::Entry { name } => {
                self.name.clear();
                self.name.extend_from_slice(name);
            }
            Event::Directory => self.builder.directory(&self.name)?,
            Event::Regular { executable, size } => {
                self.builder.regular(&self.name, *executable, *size)?;
            }
            Event::Symlink { target } => self.builder.symlink(&self.name, target)?,
            Event::EndDirectory => self.builder.end()?,
            Event::Contents(_) | Event::End => {}
        }
        Ok(())
    }

    /// Returns the layout after [`Event::End`].
    pub fn finish(self) -> Result<Layout, LayoutError> {
        self.builder.finish()
    }
}

fn contents_bytes(node: &Node) -> u64 {
    match node.kind {
        Kind::Regular | Kind::Executable => node.size,
        Kind::Directory | Kind::Symlink => 0,
    }
}

/// The length of what [`Layout::put_opening`] writes.
fn opening_bytes(node: &Node) -> u64 {
    let place = if node.depth == 0 {
        ROOT_OPENING.len() as u64
    } else {
        (ENTRY_NAME.len() + ENTRY_NODE.len()) as u64 + string_bytes(u64::from(node.name_length))
    };
    let kind = match node.kind {
        Kind::Directory => DIRECTORY.len() as u64,
        Kind::Regular => REGULAR.len() as u64 + 8,
        Kind::Executable => EXECUTABLE.len() as u64 + 8,
        Kind::Symlink => SYMLINK.len() as u64 + string_bytes(node.size),
    };
    place + kind
}

fn put_string(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
    out.extend_from_slice(bytes);
    out.extend_from_slice(&[0; 8][..padding(bytes.len() as u64) as usize]);
}

// The fixed runs of strings between names, targets and contents.
const ROOT_OPENING: &[u8] = &strings::<56>(&[MAGIC, "(", "type"]);
const ENTRY_NAME: &[u8] = &strings::<48>(&["entry", "(", "name"]);
const ENTRY_NODE: &[u8] = &strings::<48>(&["node", "(", "type"]);
const DIRECTORY: &[u8] = &strings::<24>(&["directory"]);
const REGULAR: &[u8] = &strings::<32>(&["regular", "contents"]);
const EXECUTABLE: &[u8] = &strings::<64>(&["regular", "executable", "", "contents"]);
const SYMLINK: &[u8] = &strings::<32>(&["symlink", "target"]);
const CLOSE: &[u8] = &strings::<16>(&[")"]);
const CLOSE_ENTRY: &[u8] = &strings::<32>(&[")", ")"]);

/// Encodes a run of short strings at compile time; `N` must be its exact length.
const fn strings<const N: usize>(strings: &[&str]) -> [u8; N] {
    let mut out = [0; N];
    let mut at = 0;
    let mut i = 0;
    while i < strings.len() {
        let bytes = strings[i].as_bytes();
        out[at] = bytes.len() as u8;
        let mut j = 0;
        while j < bytes.len() {
            out[at + 8 + j] = bytes[j];
            j += 1;
        }
        at += string_bytes(bytes.len() as u64) as usize;
        i += 1;
    }
    assert!(at == N);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(
        build: impl FnOnce(&mut LayoutBuilder) -> Result<(), LayoutError>,
        expected: LayoutError,
    ) {
        let mut builder = LayoutBuilder::new();
        let result = build(&mut builder).and_then(|()| builder.finish().map(drop));
        assert_eq!(result, Err(expected));
    }

    #[test]
    fn trees_that_no_nar_can_hold_are_refused() {
        let name = |name: &[u8]| Printable::from(name);
        check(|_| Ok(()), LayoutError::Empty);
        check(|b| b.end(), LayoutError::EndWithoutDirectory);
        check(|b| b.directory(b""), LayoutError::Incomplete { open: 1 });
        check(
            |b| b.directory(b"root"),
            LayoutError::NamedRoot(name(b"root")),
        );
        check(
            |b| {
                b.symlink(b"", b"x")?;
                b.symlink(b"y", b"x")
            },
            LayoutError::AfterEnd(name(b"y")),
        );
        check(
            |b| b.symlink(b"", b""),
            LayoutError::Target(TargetError::Empty),
        );
        check(
            |b| b.regular(b"", false, u64::MAX).map(drop),
            LayoutError::TooLarge,
        );
        check(
            |b| b.regular(b"", false, SIZE_MAX).map(drop),
            LayoutError::TooLarge,
        );
        check(
            |b| {
                b.directory(b"")?;
                b.symlink(b"..", b"x")
            },
            LayoutError::Name(NameError::Dots(name(b".."))),
        );
        check(
            |b| {
                b.directory(b"")?;
                b.symlink(b"b", b"x")?;
                b.regular(b"a", false, 0).map(drop)
            },
            LayoutError::Unsorted {
                name: name(b"a"),
                previous: name(b"b"),
            },
        );
        check(
            |b| {
                b.directory(b"")?;
                b.directory(b"a")?;
                b.end()?;
                b.directory(b"a")
            },
            LayoutError::Unsorted {
                name: name(b"a"),
                previous: name(b"a"),
            },
        );
    }

    #[test]
    fn sixty_four_levels_fit_and_no_more() {
        let levels = |count: usize| {
            let mut builder = LayoutBuilder::new();
            for level in 0..count {
                builder.directory(if level == 0 { b"" } else { b"d" })?;
            }
            for _ in 0..count {
                builder.end()?;
            }
            builder.finish()
        };
        assert_eq!(levels(64).unwrap().node_count(), 64);
        assert_eq!(
            levels(65),
            Err(LayoutError::TooDeep(b"d".as_slice().into()))
        );
    }

    #[test]
    fn order_is_that_of_unsigned_bytes() {
        let mut builder = LayoutBuilder::new();
        builder.directory(b"").unwrap();
        for name in [
            &b"A"[..],
            b"Z",
            b"a",
            b"a\n",
            b"a.b",
            b"a0",
            b"\x7f",
            b"\xff",
        ] {
            builder.regular(name, false, 1).unwrap();
        }
        builder.end().unwrap();
        builder.finish().unwrap();
    }
}
