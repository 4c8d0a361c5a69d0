//! Questions: what is about to be asked of whom, what is on the wire, and what came of it.
//!
//! Questions to one source are collected for [`BATCH_WINDOW`] and travel as one. An answer is known
//! by the number of its request, and taken in long after anybody waits for it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::super::SourceId;
use super::LOOKUP_DEADLINE;
use crate::message::{Answer, LOOKUP_HASHES_MAX};
use crate::store_path::StorePathHash;

/// How long questions to one source are collected. Nix sends its narinfo requests in bursts of up
/// to 25 connections; together they cost one message and one database visit.
pub(super) const BATCH_WINDOW: Duration = Duration::from_millis(2);

/// A question of whose answer nothing came for this long counts as unanswered, and against a cache's
/// breaker. No longer than the deadline of lookups, so that a black-holed anchor is waited for twice
/// and then not at all.
const ANSWER_TIMEOUT: Duration = LOOKUP_DEADLINE;

/// How long an answer is still taken in. A slow upstream's fills the memory for the next time.
const QUESTION_KEPT: Duration = Duration::from_secs(10);

/// Questions kept to recognise their answers. Beyond it, the oldest are forgotten.
pub(super) const QUESTIONS_MAX: usize = 8192;

/// A source that has this many more hashes to answer for us than another one has more load; below
/// that, they are equal. Small differences are noise, and splitting a burst costs messages.
const LOAD_STEP: usize = 64;

#[derive(Default)]
pub(super) struct Questions {
    batches: BTreeMap<(SourceId, IsAhead), Batch>,
    /// On the wire, by the number of the request.
    sent: BTreeMap<u64, Question>,
    next_request: u64,
}

/// Questions that nobody waits for travel apart from those that somebody does.
type IsAhead = bool;

struct Batch {
    hashes: BTreeSet<StorePathHash>,
    send_at: Instant,
}

struct Question {
    source: SourceId,
    sent_at: Instant,
    /// When something of the answer last came. Only silence is a failure: a cache may need long for
    /// the tail of a large batch.
    heard_at: Instant,
    hashes: BTreeSet<StorePathHash>,
    /// Whether its failure is still to be counted.
    is_open: bool,
}

/// What a source said.
pub(super) struct Heard {
    /// As far as it was asked.
    pub(super) answers: Vec<Answer>,
    pub(super) has_unasked: bool,
    /// Since the question was sent.
    pub(super) took: Duration,
}

/// What a source will not say.
pub(super) struct Failed {
    pub(super) hashes: BTreeSet<StorePathHash>,
    /// False when its silence was counted before.
    pub(super) is_news: bool,
}

impl Questions {
    /// Adds to the next question to `source`; returns it when it is full.
    pub(super) fn collect(
        &mut self,
        source: SourceId,
        is_ahead: bool,
        hash: StorePathHash,
        now: Instant,
    ) -> Option<BTreeSet<StorePathHash>> {
        let key = (source, is_ahead);
        let batch = self.batches.entry(key).or_insert_with(|| Batch {
            hashes: BTreeSet::new(),
            send_at: now + BATCH_WINDOW,
        });
        batch.hashes.insert(hash);
        if batch.hashes.len() < LOOKUP_HASHES_MAX {
            return None;
        }
        self.batches.remove(&key).map(|batch| batch.hashes)
    }

    /// Returns what was collected for long enough.
    pub(super) fn due(&mut self, now: Instant) -> Vec<(SourceId, BTreeSet<StorePathHash>)> {
        let due = self.batches.extract_if(.., |_, batch| batch.send_at <= now);
        due.map(|((source, _), batch)| (source, batch.hashes))
            .collect()
    }

    /// Numbers a question that is sent.
    pub(super) fn sent(
        &mut self,
        source: SourceId,
        hashes: BTreeSet<StorePathHash>,
        now: Instant,
    ) -> u64 {
        let request = self.next_request;
        self.next_request += 1;
        let question = Question {
            source,
            sent_at: now,
            heard_at: now,
            hashes,
            is_open: true,
        };
        self.sent.insert(request, question);
        if self.sent.len() > QUESTIONS_MAX {
            self.sent.pop_first();
        }
        request
    }

    /// Takes in an answer; `None` when there is no such question.
    pub(super) fn answered(
        &mut self,
        source: SourceId,
        request: u64,
        answers: Vec<Answer>,
        now: Instant,
    ) -> Option<Heard> {
        let asked = self.sent.get_mut(&request)?;
        if asked.source != source {
            return None;
        }
        asked.heard_at = now;
        let count = answers.len();
        let is_asked = |answer: &Answer| asked.hashes.remove(&answer.hash);
        let answers: Vec<Answer> = answers.into_iter().filter(is_asked).collect();
        let heard = Heard {
            has_unasked: answers.len() < count,
            answers,
            took: now.saturating_duration_since(asked.sent_at),
        };
        if asked.hashes.is_empty() {
            self.sent.remove(&request);
        }
        Some(heard)
    }

    /// Ends a question that will not be answered further; `None` when there is no such one.
    pub(super) fn failed(&mut self, source: SourceId, request: u64) -> Option<Failed> {
        if self.sent.get(&request)?.source != source {
            return None;
        }
        let asked = self.sent.remove(&request)?;
        Some(Failed {
            hashes: asked.hashes,
            is_news: asked.is_open,
        })
    }

    /// Returns who has been silent for too long, each question counting once.
    pub(super) fn unanswered(&mut self, now: Instant) -> Vec<SourceId> {
        let mut silent = Vec::new();
        for asked in self.sent.values_mut() {
            if asked.is_open && asked.heard_at + ANSWER_TIMEOUT <= now {
                asked.is_open = false;
                silent.push(asked.source);
            }
        }
        silent
    }

    /// What was asked over another network says nothing about this one.
    pub(super) fn excuse_all(&mut self) {
        for asked in self.sent.values_mut() {
            asked.is_open = false;
        }
    }

    /// Drops what is not sent to `source` yet.
    pub(super) fn drop_unsent(&mut self, source: SourceId) {
        self.batches.remove(&(source, false));
        self.batches.remove(&(source, true));
    }

    /// Expects nothing from `source` any more.
    pub(super) fn forget(&mut self, source: SourceId) {
        self.sent.retain(|_, asked| asked.source != source);
    }

    pub(super) fn forget_old(&mut self, now: Instant) {
        self.sent
            .retain(|_, asked| asked.sent_at + QUESTION_KEPT > now);
    }

    /// How much each source has still to answer, in steps of [`LOAD_STEP`] hashes.
    pub(super) fn load(&self) -> BTreeMap<SourceId, usize> {
        let mut load = BTreeMap::new();
        let open = self.sent.values().filter(|asked| asked.is_open);
        let open = open.map(|asked| (asked.source, asked.hashes.len()));
        let batches = self.batches.iter();
        let batches = batches.map(|((source, _), batch)| (*source, batch.hashes.len()));
        for (source, hashes) in open.chain(batches) {
            *load.entry(source).or_default() += hashes;
        }
        load.values_mut().for_each(|hashes| *hashes /= LOAD_STEP);
        load
    }

    pub(super) fn deadline(&self) -> Option<(Instant, &'static str)> {
        let batches = self.batches.values();
        let batches = batches.map(|batch| (batch.send_at, "send lookups"));
        let sent = self.sent.values().map(|asked| {
            if asked.is_open {
                (asked.heard_at + ANSWER_TIMEOUT, "question unanswered")
            } else {
                (asked.sent_at + QUESTION_KEPT, "forget a question")
            }
        });
        batches.chain(sent).min_by_key(|(at, _)| *at)
    }

    pub(super) fn len(&self) -> usize {
        self.sent.len()
    }
}
