//! Listing: the `.ls` JSON that tells what a NAR holds and where.
//!
//! Version 1 as `nix copy --to file://…?write-nar-listing=true` writes it: a tree of nodes with
//! `type`, `size`, `executable` (only when true), `narOffset` of a file's contents, `target` and
//! `entries`. Keys are sorted, as current Nix writes them. CppNix writes listings and never reads
//! them; other tools use them to fetch one file of a NAR by its range.

use super::{
    Printable,
    layout::{Described, Kind, Layout},
};

/// Why a tree has no listing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ListingError {
    /// JSON holds only Unicode. Nix 2.8 writes the raw bytes, which no JSON parser accepts;
    /// replacing them would list names that do not exist and could make two entries one. So such a
    /// tree has no listing, and a cache answers 404 for it.
    #[error("{path} is not UTF-8, so the tree cannot be listed as JSON")]
    NotUtf8 { path: Printable },
}

impl Layout {
    /// Returns the listing as one line of JSON.
    ///
    /// # Errors
    /// [`ListingError::NotUtf8`] when a name or a symlink's target is not UTF-8.
    pub fn listing(&self) -> Result<String, ListingError> {
        let mut out = String::from("{\"root\":");
        let mut open = 0;
        let mut index = 0;
        while let Some(node) = self.describe(index) {
            end_directories(&mut out, open - node.depth);
            if node.depth > 0 {
                if !out.ends_with('{') {
                    out.push(',');
                }
                self.put_text(&mut out, &node, node.name)?;
                out.push(':');
            }
            match node.kind {
                Kind::Directory => out.push_str("{\"entries\":{"),
                Kind::Regular | Kind::Executable => {
                    let executable = match node.kind {
                        Kind::Executable => "\"executable\":true,",
                        _ => "",
                    };
                    out.push_str(&format!(
                        "{{{executable}\"narOffset\":{},\"size\":{},\"type\":\"regular\"}}",
                        node.contents_offset, node.size,
                    ));
                }
                Kind::Symlink => {
                    out.push_str("{\"target\":");
                    self.put_text(&mut out, &node, node.target)?;
                    out.push_str(",\"type\":\"symlink\"}");
                }
            }
            open = node.depth + usize::from(node.kind == Kind::Directory);
            index += 1;
        }
        end_directories(&mut out, open);
        out.push_str(",\"version\":1}");
        Ok(out)
    }

    fn put_text(
        &self,
        out: &mut String,
        node: &Described<'_>,
        bytes: &[u8],
    ) -> Result<(), ListingError> {
        let text = str::from_utf8(bytes).map_err(|_| ListingError::NotUtf8 {
            path: Printable(self.path(node.file)),
        })?;
        out.push_str(&serde_json::Value::from(text).to_string());
        Ok(())
    }
}

fn end_directories(out: &mut String, count: usize) {
    for _ in 0..count {
        out.push_str("},\"type\":\"directory\"}");
    }
}
