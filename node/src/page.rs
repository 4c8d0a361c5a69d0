//! Pages for a browser: the frame, style and script that those of a node and of an anchor have in common.
//!
//! A page is written whole by the server; a little script asks for it again every two seconds and puts what
//! changed in its place. Everything in it that others chose (names, addresses, messages) is text to maud, which
//! escapes it. The policy allows the one style and the one script that stand here, by their hashes, and requests
//! and forms to where the page came from alone.

use std::sync::LazyLock;

use data_encoding::BASE64;
use granary_protocol::hash::sha256;
use maud::{DOCTYPE, Markup, PreEscaped, html};

const STYLE: &str = include_str!("page/page.css");
const SCRIPT: &str = include_str!("page/page.js");

/// The value of `Content-Security-Policy` for these pages.
pub fn policy() -> &'static str {
    static POLICY: LazyLock<String> = LazyLock::new(|| {
        let hash = |text: &str| BASE64.encode(&sha256(text.as_bytes()));
        format!(
            "default-src 'none'; style-src 'sha256-{}'; script-src 'sha256-{}'; connect-src 'self'; \
             img-src data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
            hash(STYLE),
            hash(SCRIPT)
        )
    });
    &POLICY
}

/// What stands around the sections of a page.
pub struct Frame<'a> {
    /// Which machine or page it is.
    pub title: &'a str,
    /// Of the process that answers: `node`, `anchor`.
    pub role: &'a str,
    /// At the end of the line with the title.
    pub aside: Markup,
    pub footer: Markup,
    /// Whether the page asks for itself again; not for one whose making is work for others.
    pub is_renewed: bool,
}

impl Frame<'_> {
    /// The page with these sections; each has an id.
    pub fn around(&self, sections: &Markup) -> String {
        html! {
            (DOCTYPE)
            html lang="en" {
                head {
                    meta charset="utf-8";
                    meta name="viewport" content="width=device-width, initial-scale=1";
                    // Without it a browser asks for /favicon.ico.
                    link rel="icon" href="data:,";
                    title { "Granary: " (self.title) }
                    style { (PreEscaped(STYLE)) }
                }
                body {
                    header {
                        h1 { a href="/" { "Granary" } }
                        span.dim { (self.title) }
                        (self.aside)
                    }
                    p #away role="status" hidden { "The " (self.role) " does not answer. What stands here is old." }
                    main { (sections) }
                    footer { (self.footer) }
                    @if self.is_renewed { script { (PreEscaped(SCRIPT)) } }
                }
            }
        }
        .into_string()
    }
}

/// Bytes for a person: three digits and a binary unit.
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut number = bytes as f64;
    let mut unit = 0;
    while number >= 1000.0 && unit + 1 < UNITS.len() {
        number /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{bytes} B")
    } else {
        format!("{number:.1} {}", UNITS[unit])
    }
}

/// A number of things for a person: `1 path`, `2 paths`.
pub fn counted(number: u64, noun: &str) -> String {
    format!("{number} {noun}{}", form(number, "", "s"))
}

/// The form of a verb that goes with a number of things.
pub fn form<'a>(number: u64, of_one: &'a str, of_several: &'a str) -> &'a str {
    match number {
        1 => of_one,
        _ => of_several,
    }
}

/// A time span for a person, in the largest unit of which there are two.
pub fn human_seconds(seconds: u64) -> String {
    const UNITS: [(u64, &str); 3] = [(86_400, "days"), (3_600, "h"), (60, "min")];
    let unit = UNITS.iter().find(|(length, _)| seconds / length >= 2);
    match unit {
        Some((length, name)) => format!("{} {name}", seconds / length),
        None => format!("{seconds} s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_readable() {
        assert_eq!(human_bytes(0), "0 B");
        assert_eq!(human_bytes(999), "999 B");
        assert_eq!(human_bytes(1024), "1.0 KiB");
        assert_eq!(human_bytes(5 * 1024 * 1024 * 1024), "5.0 GiB");
    }

    #[test]
    fn one_thing_is_not_called_several() {
        assert_eq!(counted(0, "path"), "0 paths");
        assert_eq!(counted(1, "path"), "1 path");
        assert_eq!(counted(2, "NAR"), "2 NARs");
    }

    #[test]
    fn time_spans_are_readable() {
        for (seconds, expected) in [
            (0, "0 s"),
            (119, "119 s"),
            (120, "2 min"),
            (7_199, "119 min"),
            (7_200, "2 h"),
            (172_800, "2 days"),
            (u64::MAX, "213503982334601 days"),
        ] {
            assert_eq!(human_seconds(seconds), expected);
        }
    }
}
