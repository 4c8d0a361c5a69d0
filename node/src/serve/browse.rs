//! Browsing: the files of a local store path, for a person with a browser: `/serve/<hash>/…`.
//!
//! Files are cut out of the path's NAR, so what can be reached is what the NAR holds and nothing
//! else: no symlink is followed here, it is shown as a link. Names and contents are a stranger's
//! text: names are escaped, and every answer forbids scripts, forms, and anything from elsewhere.

use std::fmt::Write;
use std::sync::Arc;

use futures::StreamExt;
use granary_protocol::nar::{FileIndex, Kind, Layout};
use granary_protocol::store_path::{StoreDir, StorePath, StorePathHash};
use http::header::{
    ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_SECURITY_POLICY, CONTENT_TYPE,
    REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode};

use super::decoded_bytes;
use super::nar::Part;
use super::respond::{self, Body};
use crate::store::{LocalStore, PathInfo, StoreError};

/// Entries of one folder that are shown; a page of more is no help to a person.
const ENTRIES_MAX: usize = 10_000;

/// Levels of a path below a store path; a NAR has no more.
const COMPONENTS_MAX: usize = granary_protocol::nar::LEVELS_MAX;

/// What a page from the store may do: look like itself. `sandbox` also takes its origin from it, so
/// that it cannot ask this endpoint for anything.
const POLICY: &str = "default-src 'none'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; \
                      font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; sandbox";

/// A path below a store path: names that a file may have, none of them `.` or `..`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilePath {
    names: Vec<Vec<u8>>,
    /// Whether the URL ended with a slash, on which relative links in a page depend.
    ends_with_slash: bool,
}

impl FilePath {
    /// The store path itself, as a URL without a slash behind its hash names it.
    pub const fn root() -> FilePath {
        FilePath {
            names: Vec::new(),
            ends_with_slash: false,
        }
    }

    /// Reads what follows `/serve/<hash>/` in a URL.
    pub fn parse(text: &str) -> Option<FilePath> {
        let ends_with_slash = text.is_empty() || text.ends_with('/');
        let text = text.strip_suffix('/').unwrap_or(text);
        let mut names = Vec::new();
        for name in text.split('/').filter(|_| !text.is_empty()) {
            let name = decoded_bytes(name)?;
            let is_name = !matches!(&name[..], b"" | b"." | b"..")
                && !name.contains(&b'/')
                && !name.contains(&0);
            if !is_name || names.len() == COMPONENTS_MAX {
                return None;
            }
            names.push(name);
        }
        Some(FilePath {
            names,
            ends_with_slash,
        })
    }
}

/// Answers with a file, or with a page about a folder or symlink; 404 when there is none of them.
pub async fn answer(
    store: &Arc<dyn LocalStore>,
    hash: StorePathHash,
    path: FilePath,
    method: &Method,
    headers: &HeaderMap,
) -> Result<Response<Body>, StoreError> {
    let Some(info) = store.path_info(hash).await? else {
        return Ok(respond::not_found(false));
    };
    let Some(nar) = store.nar(&info).await? else {
        return Ok(respond::not_found(false));
    };
    let dir = store.dir().clone();
    let (nar, view) = tokio::task::spawn_blocking(move || {
        let view = nar
            .layout()
            .and_then(|layout| View::of(layout, &info, &dir, &path));
        (nar, view)
    })
    .await
    .map_err(|_| StoreError::Stopped)?;
    let response = match view {
        None => return Ok(respond::not_found(false)),
        Some(View::Page(html)) => respond::small(StatusCode::OK, "text/html; charset=utf-8", html),
        Some(View::File {
            content_type,
            contents,
        }) => {
            let size = contents.end - contents.start;
            let part = Part::of(headers, size);
            let bytes = part.bytes(size);
            let body = if *method == Method::HEAD || bytes.is_empty() {
                Body::default()
            } else {
                let from = contents.start;
                respond::stream(nar.stream(from + bytes.start..from + bytes.end).fuse())
            };
            file(&part, size, content_type, body)
        }
    };
    Ok(guarded(response))
}

/// What there is at a path.
enum View {
    Page(String),
    File {
        content_type: &'static str,
        /// Where in the NAR.
        contents: std::ops::Range<u64>,
    },
}

impl View {
    fn of(layout: &Layout, info: &PathInfo, dir: &StoreDir, path: &FilePath) -> Option<View> {
        let mut file = FileIndex::ROOT;
        for name in &path.names {
            file = layout.entry(file, name)?;
        }
        Some(match layout.kind(file) {
            Kind::Directory => View::Page(folder_page(layout, file, info, dir, path)),
            Kind::Symlink => View::Page(symlink_page(layout, file, info, dir, path)),
            Kind::Regular | Kind::Executable => View::File {
                content_type: content_type(layout.name(file)),
                contents: layout.contents(file),
            },
        })
    }
}

fn folder_page(
    layout: &Layout,
    folder: FileIndex,
    info: &PathInfo,
    dir: &StoreDir,
    path: &FilePath,
) -> String {
    let mut page = page_head(info, dir, path);
    // Links are relative, so that they hold behind any prefix.
    let base = match (path.ends_with_slash, path.names.last()) {
        (true, _) => String::new(),
        (false, Some(name)) => format!("{}/", encoded(name)),
        (false, None) => format!("{}/", info.store_path.hash()),
    };
    page.push_str("<ul>\n");
    if !path.names.is_empty() {
        let up = if path.ends_with_slash { "../" } else { "./" };
        page.push_str(&format!("<li><a href=\"{up}\">..</a></li>\n"));
    }
    let mut entries = layout.entries(folder);
    for entry in entries.by_ref().take(ENTRIES_MAX) {
        let name = layout.name(entry);
        let (slash, about) = match layout.kind(entry) {
            Kind::Directory => ("/", String::new()),
            Kind::Symlink => ("", format!(" → {}", escaped(layout.target(entry)))),
            Kind::Regular => ("", format!(" {} bytes", layout.size(entry))),
            Kind::Executable => ("", format!(" {} bytes, executable", layout.size(entry))),
        };
        // Writing to text does not fail.
        let _ = writeln!(
            page,
            "<li><a href=\"{base}{}{slash}\">{}{slash}</a>{about}</li>",
            encoded(name),
            escaped(name),
        );
    }
    let left = entries.count();
    if left > 0 {
        let _ = writeln!(page, "<li>and {left} more</li>");
    }
    page.push_str("</ul>\n");
    page
}

fn symlink_page(
    layout: &Layout,
    link: FileIndex,
    info: &PathInfo,
    dir: &StoreDir,
    path: &FilePath,
) -> String {
    let mut page = page_head(info, dir, path);
    let target = layout.target(link);
    let shown = escaped(target);
    // From `/serve/<hash>/a/b`, which stands in the folder `a`, two levels up to `/serve/`.
    let up = "../".repeat(path.names.len() + usize::from(path.ends_with_slash));
    let place = match place_of(target, dir, path) {
        Some(Place::Here(names)) => Some((info.store_path.hash(), names)),
        Some(Place::Other(hash, names)) => Some((hash, names)),
        None => None,
    };
    // Writing to text does not fail.
    let _ = match place {
        Some((hash, names)) => {
            let below: Vec<_> = names.iter().map(|name| encoded(name)).collect();
            let below = below.join("/");
            writeln!(
                page,
                "<p>a symlink to <a href=\"{up}{hash}/{below}\">{shown}</a></p>"
            )
        }
        None => writeln!(page, "<p>a symlink to {shown}</p>"),
    };
    page
}

/// Where a symlink leads, as far as its text tells.
enum Place {
    /// Names below the same store path.
    Here(Vec<Vec<u8>>),
    /// Names below another one.
    Other(StorePathHash, Vec<Vec<u8>>),
}

/// `None` when it leads out of the store.
fn place_of(target: &[u8], dir: &StoreDir, path: &FilePath) -> Option<Place> {
    let in_store = target
        .strip_prefix(dir.as_str().as_bytes())
        .and_then(|rest| rest.strip_prefix(b"/"));
    let (mut names, text) = match in_store {
        Some(text) => (Vec::new(), text),
        None if target.starts_with(b"/") => return None,
        // Relative to the folder of the symlink.
        None => (
            path.names[..path.names.len().checked_sub(1)?].to_vec(),
            target,
        ),
    };
    for name in text.split(|byte| *byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => {
                names.pop()?;
            }
            name => names.push(name.to_vec()),
        }
    }
    if in_store.is_none() {
        return Some(Place::Here(names));
    }
    let first = names.first()?;
    let store_path = StorePath::from_base_name(str::from_utf8(first).ok()?).ok()?;
    Some(Place::Other(store_path.hash(), names.split_off(1)))
}

fn page_head(info: &PathInfo, dir: &StoreDir, path: &FilePath) -> String {
    let mut title = dir.display(&info.store_path);
    for name in &path.names {
        title.push('/');
        title.push_str(&String::from_utf8_lossy(name));
    }
    let title = escaped(title.as_bytes());
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><meta charset=\"utf-8\"><title>{title}</title>\n<h1>{title}</h1>\n"
    )
}

/// The head of an answer with `part` of a file.
fn file(part: &Part, size: u64, content_type: &'static str, body: Body) -> Response<Body> {
    let bytes = part.bytes(size);
    let mut response = respond::sized(content_type, bytes.end - bytes.start, body);
    let (status, range) = match part {
        Part::Whole => (StatusCode::OK, None),
        Part::Range(range) => {
            let range = format!("bytes {}-{}/{size}", range.start, range.end - 1);
            (StatusCode::PARTIAL_CONTENT, Some(range))
        }
        Part::Unsatisfiable => (
            StatusCode::RANGE_NOT_SATISFIABLE,
            Some(format!("bytes */{size}")),
        ),
    };
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    if let Some(range) = range.and_then(|range| HeaderValue::from_str(&range).ok()) {
        headers.insert(CONTENT_RANGE, range);
    }
    response
}

fn guarded(mut response: Response<Body>) -> Response<Body> {
    debug_assert!(response.headers().contains_key(CONTENT_TYPE));
    debug_assert!(response.headers().contains_key(CONTENT_LENGTH));
    let headers = response.headers_mut();
    headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    response
}

/// The type of a file by its name's ending. What is not known is shown as text when its name has no
/// ending, as `README` and most of `/bin` have none, and is bytes otherwise.
fn content_type(name: &[u8]) -> &'static str {
    let name = name.to_ascii_lowercase();
    let ending = match name.iter().rposition(|byte| *byte == b'.') {
        Some(dot) if dot > 0 => &name[dot + 1..],
        _ => b"",
    };
    match ending {
        b"html" | b"htm" => "text/html; charset=utf-8",
        b"css" => "text/css; charset=utf-8",
        b"js" | b"mjs" => "text/javascript; charset=utf-8",
        b"json" => "application/json",
        b"xml" => "text/xml; charset=utf-8",
        b"svg" => "image/svg+xml",
        b"png" => "image/png",
        b"jpg" | b"jpeg" => "image/jpeg",
        b"gif" => "image/gif",
        b"webp" => "image/webp",
        b"ico" => "image/vnd.microsoft.icon",
        b"woff" => "font/woff",
        b"woff2" => "font/woff2",
        b"ttf" => "font/ttf",
        b"pdf" => "application/pdf",
        b"gz" => "application/gzip",
        b"zip" => "application/zip",
        b"" | b"txt" | b"md" | b"rst" | b"nix" | b"sh" | b"py" | b"rs" | b"c" | b"h" | b"conf"
        | b"toml" | b"yaml" | b"yml" | b"ini" | b"service" | b"pc" | b"log" | b"drv" | b"patch" => {
            respond::TEXT
        }
        _ => "application/octet-stream",
    }
}

/// A name as text of HTML, also inside a quoted attribute.
fn escaped(name: &[u8]) -> String {
    let mut text = String::new();
    for character in String::from_utf8_lossy(name).chars() {
        match character {
            '&' => text.push_str("&amp;"),
            '<' => text.push_str("&lt;"),
            '>' => text.push_str("&gt;"),
            '"' => text.push_str("&quot;"),
            '\'' => text.push_str("&#39;"),
            // A line break in a name would look like the end of an entry.
            character if character.is_control() => text.push(char::REPLACEMENT_CHARACTER),
            character => text.push(character),
        }
    }
    text
}

/// A name as one component of a URL.
fn encoded(name: &[u8]) -> String {
    let mut text = String::new();
    for byte in name {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                text.push(char::from(*byte));
            }
            byte => {
                let _ = write!(text, "%{byte:02X}");
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> Option<Vec<Vec<u8>>> {
        FilePath::parse(text).map(|path| path.names)
    }

    #[test]
    fn paths_are_names_and_nothing_else() {
        assert_eq!(names(""), Some(vec![]));
        assert_eq!(
            names("bin/a%20b/"),
            Some(vec![b"bin".to_vec(), b"a b".to_vec()])
        );
        assert_eq!(names("%ff"), Some(vec![vec![0xff]]));
        for text in [
            "..",
            "a/../b",
            "%2e%2e/a",
            "a/.",
            "a//b",
            "//",
            "a%2fb",
            "a%00",
            "a%",
            "a%4",
            "a%zz",
            &"a/".repeat(65),
        ] {
            assert_eq!(names(text), None, "{text}");
        }
    }

    #[test]
    fn symlinks_lead_to_where_their_text_says_and_never_out_of_the_store() {
        let path = FilePath::parse("lib/link").unwrap();
        let hash = "00bgd045z0d4icpbc2yyz4gx48ak44la";
        let at = |target: &str| match place_of(target.as_bytes(), &StoreDir::default(), &path) {
            Some(Place::Here(names)) => {
                format!("here {}", String::from_utf8(names.join(&b'/')).unwrap())
            }
            Some(Place::Other(hash, names)) => {
                format!("{hash} {}", String::from_utf8(names.join(&b'/')).unwrap())
            }
            None => "nowhere".into(),
        };
        assert_eq!(at("libfoo.so.1"), "here lib/libfoo.so.1");
        assert_eq!(at("../bin/./foo"), "here bin/foo");
        assert_eq!(at(".."), "here ");
        assert_eq!(at("../.."), "nowhere");
        assert_eq!(at("../../etc/passwd"), "nowhere");
        assert_eq!(at("/etc/passwd"), "nowhere");
        assert_eq!(
            at(&format!("/nix/store/{hash}-foo/bin/x")),
            format!("{hash} bin/x")
        );
        assert_eq!(at(&format!("/nix/store/{hash}-foo/../../x")), "nowhere");
        assert_eq!(at("/nix/store"), "nowhere");
        assert_eq!(at("/nix/storefront"), "nowhere");
    }

    #[test]
    fn names_are_text_wherever_they_are_put() {
        assert_eq!(
            escaped(b"<script>\"'&\n\xff"),
            "&lt;script&gt;&quot;&#39;&amp;\u{fffd}\u{fffd}"
        );
        assert_eq!(encoded(b"a b\"<%\xff?#"), "a%20b%22%3C%25%FF%3F%23");
    }

    #[test]
    fn types_follow_from_endings() {
        assert_eq!(content_type(b"a.HTML"), "text/html; charset=utf-8");
        assert_eq!(content_type(b"README"), respond::TEXT);
        assert_eq!(content_type(b".hidden"), respond::TEXT);
        assert_eq!(content_type(b"libc.so.6"), "application/octet-stream");
    }
}
