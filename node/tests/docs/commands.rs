//! Every command of the manual is run, on machines that know of nothing but the manual.

use std::fs;
use std::path::Path;

use crate::session::Session;

fn check(name: &str) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name);
    let text = fs::read_to_string(file).unwrap();
    let mut session = Session::new(name);
    let followed = session.follow(&text).and_then(|()| session.renew());
    println!("{}", session.transcript);
    followed.unwrap_or_else(|problem| panic!("{problem}"));
}

macro_rules! documents {
    ($($name:ident $file:literal)*) => {
        $(#[test]
        fn $name() {
            check($file);
        })*

        /// So that none is forgotten.
        const DOCUMENTS: &[&str] = &[$($file),*];
    };
}

documents! {
    readme "README.md"
    contents "docs/README.md"
    install "docs/install.md"
    second_machine "docs/second-machine.md"
    anchor "docs/anchor.md"
    without_granary "docs/without-granary.md"
    conference "docs/conference.md"
    nixos "docs/nixos.md"
    configuration "docs/configuration.md"
    endpoint "docs/endpoint.md"
    operate "docs/operate.md"
    troubleshoot "docs/troubleshoot.md"
    migrate "docs/migrate.md"
    attic "docs/attic.md"
    ci "docs/ci.md"
    metrics "docs/metrics.md"
}

#[test]
fn no_document_is_forgotten_and_every_link_leads_somewhere() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for entry in fs::read_dir(root.join("docs")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let is_known = DOCUMENTS.contains(&format!("docs/{name}").as_str());
        assert!(
            is_known || !name.ends_with(".md"),
            "docs/{name} is not followed"
        );
    }
    let link = regex::Regex::new(r"\]\(([^)#:\s]*)(?:#([^)\s]+))?\)").unwrap();
    for name in DOCUMENTS {
        let file = root.join(name);
        let text = fs::read_to_string(&file).unwrap();
        for found in link.captures_iter(&text) {
            let target = match &found[1] {
                "" => file.clone(),
                path => file.parent().unwrap().join(path),
            };
            assert!(target.exists(), "{name} leads to {}", &found[1]);
            let Some(heading) = found.get(2) else {
                continue;
            };
            let text = fs::read_to_string(&target).unwrap();
            let headings = text.lines().filter(|line| line.starts_with('#'));
            let mut marks = headings.map(|line| {
                let words = line.trim_start_matches('#').trim().to_lowercase();
                words
                    .chars()
                    .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'))
                    .map(|c| if c == ' ' { '-' } else { c })
                    .collect::<String>()
            });
            let heading = heading.as_str();
            assert!(
                marks.any(|mark| mark == heading),
                "{name}: no heading {heading}"
            );
        }
    }
}

/// For whoever writes one: `GRANARY_DOCUMENT=/a/draft.md cargo nextest run -p granary --test docs any --no-capture`
/// shows what its commands print.
#[test]
fn any_other_document() {
    let name = std::env::var("GRANARY_DOCUMENT");
    check(name.as_deref().unwrap_or("docs/README.md"));
}

#[test]
fn what_a_document_gets_wrong_is_found() {
    let good = "```console\ndesk# granary identity --state-dir s\n12D3KooW…\ndesk# granary mesh admit 12D3KooW… --key-file none\n\
                granary: …none…\n(exit status 1)\n```\n";
    let mut session = Session::new("tried");
    session.follow(good).unwrap();
    for (wrong, found) in [
        ("```sh\ngranary status --jsom\n```\n", "--jsom"),
        (
            "```sh\ncat /etc/granary/granary.tmol\n```\n",
            "granary.tmol",
        ),
        (
            "```console\ndesk# granary --version\ngranary 0.0.0\n```\n",
            "something else",
        ),
        (
            "```sh\ngranary join granary-ticket-1:…\n```\n",
            "nothing like granary-ticket-1:…",
        ),
        (
            "```sh\nnix run github:granary/granary -- push --tokenfile x\n```\n",
            "--tokenfile",
        ),
        ("```toml\n[mesh]\npears = []\n```\n", "did you mean `peers`"),
        (
            "```ini\n# nix.conf\nsubstitutors = x\n```\n",
            "substitutors",
        ),
        (
            "```nix\n{ services.granary.enabel = true; }\n```\n",
            "services.granary.enabel",
        ),
        (
            "```nix\n{ services.other.enabel = true }\n```\n",
            "syntax error",
        ),
        ("```fish\nx\n```\n", "nobody knows"),
        ("```sh\nfalse\n```\n", "status 1"),
    ] {
        let problem = session.follow(wrong).expect_err(wrong);
        assert!(
            problem.starts_with("tried:") && problem.contains(found),
            "{wrong}: {problem}"
        );
    }
}
