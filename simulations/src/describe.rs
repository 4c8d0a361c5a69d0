//! Describe: inputs and outputs as the words of a trace line. Names machines by number, and holds no
//! absolute time, so that two runs of one seed say the same.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};

use granary_protocol::mesh::{Input, LookupOutcome, Output, Source};
use granary_protocol::message::Answer;
use granary_protocol::peer::PeerId;
use granary_protocol::store_path::StorePathHash;
use sha2::{Digest, Sha256};

/// A peer by the number of its machine, or by its key if a liar made it up.
struct Name<'a>(&'a PeerId, &'a BTreeMap<PeerId, usize>);

impl fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.1.get(self.0) {
            Some(number) => write!(f, "{number}"),
            None => write!(f, "{}", self.0),
        }
    }
}

/// Stands for many hashes in one word.
fn sum(hashes: &[StorePathHash]) -> String {
    let mut digest = Sha256::new();
    for hash in hashes {
        digest.update(hash.as_bytes());
    }
    word(digest)
}

fn sum_of_answers(answers: &[Answer]) -> String {
    let mut digest = Sha256::new();
    for answer in answers {
        digest.update(answer.hash.as_bytes());
        digest.update([u8::from(answer.narinfo.is_some())]);
        digest.update(answer.narinfo.as_deref().unwrap_or_default());
    }
    word(digest)
}

fn word(digest: Sha256) -> String {
    digest
        .finalize()
        .iter()
        .take(8)
        .fold(String::new(), |mut text, byte| {
            write!(text, "{byte:02x}").expect("writing to a string succeeds");
            text
        })
}

/// Returns the line of something that happens to a mind.
pub fn input(input: &Input, numbers: &BTreeMap<PeerId, usize>) -> String {
    let name = |peer| Name(peer, numbers);
    match input {
        Input::Tick => "tick".to_owned(),
        Input::ClockRead { unix } => format!("clock {}", unix.0),
        Input::Woke => "woke".to_owned(),
        Input::NetworkChanged => "network-changed".to_owned(),
        Input::OwnAddresses { addresses } => format!("own-addresses {addresses:?}"),
        Input::Shutdown => "shutdown".to_owned(),
        Input::Discovered { peer, addresses } => format!("discovered {} {addresses:?}", name(peer)),
        Input::Lost { peer } => format!("lost {}", name(peer)),
        Input::LinkUp {
            peer,
            address,
            outbound,
            seed,
        } => {
            format!("link-up {} {address} {outbound} {seed:?}", name(peer))
        }
        Input::LinkDown { peer } => format!("link-down {}", name(peer)),
        Input::DialFailed { peer } => format!("dial-failed {}", name(peer)),
        Input::SeedFailed { seed } => format!("seed-failed {seed}"),
        Input::SeedFound { seed, peer } => format!("seed-found {seed} {}", name(peer)),
        // What it says is hashed with the frame that brought it.
        Input::Received { peer, message } => format!("received {} {}", name(peer), message.kind()),
        Input::Certificate { .. } => "certificate".into(),
        Input::Revocations { list } => format!("revocations {}", list.claims().number),
        Input::Garbage { peer } => format!("garbage {}", name(peer)),
        Input::LocalPaths { all } => format!("local-paths {} {}", all.len(), sum(all)),
        Input::LocalChanged { added, removed } => {
            format!(
                "local-changed +{} {} -{} {}",
                added.len(),
                sum(added),
                removed.len(),
                sum(removed)
            )
        }
        Input::LocalAnswers {
            peer,
            request,
            answers,
        } => {
            format!(
                "local-answers {} {request} {}",
                name(peer),
                sum_of_answers(answers)
            )
        }
        Input::CacheAnswers {
            cache,
            request,
            answers,
        } => format!(
            "cache-answers {cache} {request} {}",
            sum_of_answers(answers)
        ),
        Input::CacheFailed { cache, request } => format!("cache-failed {cache} {request}"),
        Input::Lookup { lookup, hash } => format!("lookup {} {hash}", lookup.0),
        Input::CancelLookup { lookup, hash } => format!("cancel-lookup {} {hash}", lookup.0),
        Input::Fetch { fetch, narinfo } => {
            format!("fetch {} {}", fetch.0, narinfo.narinfo().store_path.hash())
        }
        Input::TransferProgress {
            fetch,
            attempt,
            at,
            held_up,
        } => format!("progress {} {attempt} {at} {held_up:?}", fetch.0),
        Input::TransferEnded {
            fetch,
            attempt,
            outcome,
        } => {
            format!("transfer-ended {} {attempt} {outcome:?}", fetch.0)
        }
        Input::FetchMismatch { fetch } => format!("mismatch {}", fetch.0),
        Input::FetchDone { fetch } => format!("fetch-done {}", fetch.0),
    }
}

/// Returns the line of something that a mind wants.
pub fn output(output: &Output, numbers: &BTreeMap<PeerId, usize>) -> String {
    let name = |peer| Name(peer, numbers);
    match output {
        Output::Dial { peer, addresses } => format!("> dial {} {addresses:?}", name(peer)),
        Output::DialSeed { seed } => format!("> dial-seed {seed}"),
        Output::Hangup { peer, refusal } => {
            let refusal = refusal.map_or("", |refusal| refusal.word());
            format!("> hangup {} {refusal}", name(peer))
        }
        // Its bytes are hashed with the frame, where it arrives.
        Output::Send { peer, message } => format!("> send {} {}", name(peer), message.kind()),
        Output::Admitted { peer, certificate } => {
            format!("> admitted {} {}", name(peer), certificate.serial)
        }
        Output::KeepRevocations { list } => {
            format!("> keep-revocations {}", list.claims().number)
        }
        Output::Departed { peer } => format!("> departed {}", name(peer)),
        Output::ReadLocal {
            peer,
            request,
            hashes,
        } => {
            format!("> read-local {} {request} {}", name(peer), sum(hashes))
        }
        Output::LookupDone {
            lookup,
            outcome: LookupOutcome::NotFound,
        } => {
            format!("> not-found {}", lookup.0)
        }
        Output::LookupDone {
            lookup,
            outcome:
                LookupOutcome::Found {
                    narinfo,
                    providers,
                    caches,
                },
        } => {
            let mut line = format!("> found {} {}", lookup.0, narinfo.narinfo().nar_hash);
            for peer in providers {
                write!(line, " {}", name(peer)).expect("writing to a string succeeds");
            }
            write!(line, " {caches:?}").expect("writing to a string succeeds");
            line
        }
        Output::AskCache {
            cache,
            request,
            hashes,
        } => format!("> ask-cache {cache} {request} {}", sum(hashes)),
        Output::Transfer {
            fetch,
            attempt,
            source: Source::Peer { peer, address },
            from,
        } => {
            format!(
                "> transfer {} {attempt} {} {address} {from}",
                fetch.0,
                name(peer)
            )
        }
        Output::Transfer {
            fetch,
            attempt,
            source: Source::Cache { cache, .. },
            from,
        } => format!("> transfer {} {attempt} cache {cache} {from}", fetch.0),
        Output::StopTransfer { fetch, attempt } => format!("> stop {} {attempt}", fetch.0),
        Output::FetchFailed { fetch } => format!("> fetch-failed {}", fetch.0),
    }
}
