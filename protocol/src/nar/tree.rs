//! Tree: a file tree in memory, whole with its contents.
//!
//! For tests and for the in-memory twin of the store; a node reads real trees through a
//! [`Layout`] and never holds one.

use std::collections::BTreeMap;

use super::{FileIndex, Layout, LayoutBuilder, LayoutError, Segment};

/// A regular file, a symlink, or a directory of such.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tree {
    Regular { executable: bool, contents: Vec<u8> },
    Symlink { target: Vec<u8> },
    Directory(BTreeMap<Vec<u8>, Tree>),
}

impl Tree {
    /// Returns the layout of this tree.
    ///
    /// # Errors
    /// [`LayoutError`] when a name, a target or the depth is one that no NAR can hold.
    pub fn layout(&self) -> Result<Layout, LayoutError> {
        let mut builder = LayoutBuilder::new();
        self.add_to(&mut builder, b"")?;
        builder.finish()
    }

    /// Returns the whole NAR of this tree.
    pub fn nar(&self) -> Result<Vec<u8>, LayoutError> {
        let layout = self.layout()?;
        let mut nar = Vec::new();
        for segment in layout.segments(0) {
            match segment {
                Segment::Framing(bytes) => nar.extend_from_slice(&bytes),
                Segment::Contents { file, .. } => {
                    nar.extend_from_slice(self.contents(&layout, file));
                }
            }
        }
        Ok(nar)
    }

    /// Returns the contents of a file that `layout`, made from this tree, names; empty for others.
    pub fn contents(&self, layout: &Layout, file: FileIndex) -> &[u8] {
        match self.node(layout, file) {
            Some(Tree::Regular { contents, .. }) => contents,
            _ => &[],
        }
    }

    fn node(&self, layout: &Layout, file: FileIndex) -> Option<&Tree> {
        match layout.parent(file) {
            None => Some(self),
            Some(parent) => match self.node(layout, parent)? {
                Tree::Directory(entries) => entries.get(layout.name(file)),
                Tree::Regular { .. } | Tree::Symlink { .. } => None,
            },
        }
    }

    fn add_to(&self, builder: &mut LayoutBuilder, name: &[u8]) -> Result<(), LayoutError> {
        match self {
            Tree::Regular {
                executable,
                contents,
            } => builder
                .regular(name, *executable, contents.len() as u64)
                .map(drop),
            Tree::Symlink { target } => builder.symlink(name, target),
            Tree::Directory(entries) => {
                builder.directory(name)?;
                for (name, tree) in entries {
                    tree.add_to(builder, name)?;
                }
                builder.end()
            }
        }
    }
}
