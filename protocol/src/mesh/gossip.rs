//! Gossip: every node keeps one numbered log of what it shares, and a copy of everybody else's set.
//!
//! Each set has one writer, so a position ([`Cursor`]) says exactly what a reader lacks. Changes are
//! batched and told to the neighbours; in a mesh where not everybody is linked to everybody, who
//! hears a change for the first time passes it on, once. A reader that sees a gap pulls, from
//! whoever offers more: the missing operations or, where nobody's log reaches back that far, the
//! whole set in pages. Whatever is said of a writer carries its signature ([`announcement`]), so it
//! does not matter who says it.
//!
//! Repair finds what got lost: neighbours compare a digest of everything they know (on connecting,
//! after sleep, and now and then at random), and where it differs they exchange cursors.
//!
//! [`announcement`]: crate::announcement

use std::time::{Duration, Instant};

use super::{Chance, Size};
use crate::announcement::{Delta, SetDigest, SignedHead};
use crate::availability::{AvailabilityIndex, Cursor, HashPrefix, Operation};
use crate::certificate::UnixTime;
use crate::message::{Message, SNAPSHOT_PREFIXES_MAX, WriterCursor};
use crate::peer::{PeerId, PeerKey};
use crate::store_path::StorePathHash;

mod own_log;
mod pulls;
mod relay;

use own_log::OwnLog;
use pulls::{Collected, Offer, Pulls};
use relay::Relay;

/// Largest set accepted from one writer: 32 MiB while a snapshot is collected. Deltas may exceed it
/// by [`RECOUNT_OPERATIONS`], since counting a set costs a scan of it and is done that rarely.
const SET_PREFIXES_MAX: u64 = 4_194_304;
const RECOUNT_OPERATIONS: u64 = 65_536;

/// Larger changes are not pushed in a mesh that relays: neighbours are told that there is more, and
/// pull it from one of them. A record arrives from each of ten neighbours; 512 operations are 4 KiB,
/// and beyond that ten copies cost more than one further round trip on a local network.
const PUSHED_OPERATIONS_MAX: usize = 512;

/// How often the digest of everything is compared with one random neighbour: so often that even the
/// longest pause (20 % more) and the pull that follows end within 35 s.
const REPAIR_INTERVAL: Duration = Duration::from_secs(27);
const REPAIR_JITTER_PERCENT: u32 = 20;

/// What a step in gossip means for the rest of the mind.
pub(super) enum Event {
    Send {
        to: PeerId,
        message: Message,
    },
    /// A writer's set changed here: told by `from`, and now known up to `head`.
    Changed {
        from: PeerId,
        head: SignedHead,
        /// What the neighbours are told.
        news: Message,
        /// What the writer holds that it did not before, as far as this step tells.
        added: Vec<HashPrefix>,
    },
    /// `from` said what no honest member says.
    Nonsense {
        from: PeerId,
    },
    /// We heard of our own future and began to count anew; everybody must hear of it.
    BeganEpoch,
}

pub(super) struct Gossip {
    me: PeerId,
    own: OwnLog,
    pulls: Pulls,
    relay: Relay,
    repair_at: Instant,
    /// Counts changes of sets, our own included.
    version: u64,
}

impl Gossip {
    pub(super) fn new(key: PeerKey, chance: &mut Chance, now: Instant) -> Gossip {
        Gossip {
            me: key.peer_id(),
            own: OwnLog::new(key),
            pulls: Pulls::default(),
            relay: Relay::default(),
            repair_at: now + chance.jitter(REPAIR_INTERVAL, REPAIR_JITTER_PERCENT),
            version: 0,
        }
    }

    /// Changes whenever a cursor in the index does.
    pub(super) fn version(&self) -> u64 {
        self.version.wrapping_add(self.own.version())
    }

    /// Continues the log where the index left it.
    pub(super) fn start(
        &mut self,
        index: &mut dyn AvailabilityIndex,
        unix: UnixTime,
        chance: &mut Chance,
    ) {
        self.own.start(index, unix, chance);
    }

    /// Keeps the proof of a set that the index kept over a restart.
    pub(super) fn remember(&mut self, head: &SignedHead) {
        self.relay.keep_head(head);
    }

    /// What this node signs of its own log.
    pub(super) fn own_head(&mut self) -> SignedHead {
        self.own.head()
    }

    /// Position of the own log.
    pub(super) fn cursor(&self) -> Cursor {
        self.own.cursor()
    }

    pub(super) fn local_paths(&mut self, all: &[StorePathHash], now: Instant) {
        self.own.local_paths(all, now);
    }

    pub(super) fn local_changed(
        &mut self,
        added: &[StorePathHash],
        removed: &[StorePathHash],
        now: Instant,
    ) {
        self.own.local_changed(added, removed, now);
    }

    /// Returns the deltas for everyone, once the batch window has passed.
    pub(super) fn flush(&mut self, index: &mut dyn AvailabilityIndex, now: Instant) -> Vec<Delta> {
        self.own.flush(index, now)
    }

    /// Gives up what takes too long; returns whether it is time to compare with a neighbour.
    pub(super) fn tick(&mut self, chance: &mut Chance, now: Instant) -> bool {
        self.pulls.tick(now);
        self.relay.tick(now);
        if self.repair_at > now {
            return false;
        }
        self.repair_at = now + chance.jitter(REPAIR_INTERVAL, REPAIR_JITTER_PERCENT);
        true
    }

    pub(super) fn woke(&mut self) {
        self.pulls.clear();
    }

    pub(super) fn departed(&mut self, peer: PeerId) {
        self.pulls.departed(peer);
    }

    /// The writer is no member any more.
    pub(super) fn forget(&mut self, writer: &PeerId) {
        self.version += 1;
        self.pulls.forget(writer);
        self.relay.forget(writer);
    }

    /// Begins the pulls for which there is room: whom to ask, for which writer.
    pub(super) fn begin_pulls(&mut self, now: Instant) -> Vec<(PeerId, PeerId)> {
        self.pulls.begin(now)
    }

    /// A linked writer says where its own log stands.
    pub(super) fn cursor_told(
        &mut self,
        index: &dyn AvailabilityIndex,
        writer: PeerId,
        cursor: Cursor,
    ) {
        if index.cursor(&writer) != Some(cursor) {
            self.pulls.offer(writer, writer, log_offer(cursor));
        }
    }

    /// We know `writer` this far by now.
    pub(super) fn learned(&mut self, writer: &PeerId, contact: u64, cursor: Option<Cursor>) {
        self.pulls.learned(writer, contact, cursor);
    }

    /// Compares what `from` knows with what we know (both ascending by writer): notes what it offers,
    /// and returns what it lacks.
    pub(super) fn compare(
        &mut self,
        from: PeerId,
        ours: &[WriterCursor],
        theirs: &[WriterCursor],
        is_complete: bool,
    ) -> Vec<WriterCursor> {
        let mut lacks = Vec::new();
        let mut known = ours.iter().peekable();
        for their in theirs {
            while let Some(our) = known.next_if(|our| our.writer < their.writer) {
                if is_complete {
                    lacks.push(*our);
                }
            }
            let our = known.next_if(|our| our.writer == their.writer);
            let (contact, cursor) = our.map_or((None, None), |our| (Some(our.contact), our.cursor));
            if contact.is_none_or(|contact| contact < their.contact)
                || is_newer(their.cursor, cursor)
            {
                let offer = Offer {
                    contact: their.contact,
                    cursor: their.cursor,
                };
                self.pulls.offer(their.writer, from, offer);
            }
            if let Some(our) = our
                && (our.contact > their.contact || is_newer(our.cursor, their.cursor))
            {
                lacks.push(*our);
            }
        }
        if is_complete {
            lacks.extend(known);
        }
        lacks
    }

    /// Applies what continues our copy of a writer's set; a gap is pulled from whoever showed it.
    ///
    /// `is_member` says whether the writer proved to be one: of others nothing is kept.
    pub(super) fn delta(
        &mut self,
        index: &mut dyn AvailabilityIndex,
        from: PeerId,
        delta: Delta,
        is_member: bool,
    ) -> Vec<Event> {
        let writer = delta.writer();
        let head = delta.head().head().clone();
        if !delta.is_proved() || head.count > SET_PREFIXES_MAX {
            return vec![Event::Nonsense { from }];
        }
        if writer == self.me {
            return Vec::new();
        }
        if let Some(pull) = self.pulls.collecting(&writer) {
            // What follows the last page is asked for then.
            pull.outrun = Some((from, log_offer(head.cursor)));
            return Vec::new();
        }
        let cursor = index.cursor(&writer);
        let follows =
            |cursor: &Cursor| cursor.epoch == head.cursor.epoch && cursor.sequence >= head.after;
        let Some(cursor) = cursor.filter(follows).filter(|_| is_member) else {
            // Of an older epoch only the writer itself may convince us.
            if from == writer || !is_member || is_newer(Some(head.cursor), cursor) {
                let offer = Offer {
                    // Any contact will do, if it is that which is missing.
                    contact: u64::from(!is_member),
                    cursor: Some(head.cursor),
                };
                self.pulls.offer(writer, from, offer);
            }
            return Vec::new();
        };
        self.pulls.end(&writer, from);
        let known = usize::try_from(cursor.sequence - head.after).unwrap_or(usize::MAX);
        let news = delta.operations().get(known..).unwrap_or_default();
        if news.is_empty() {
            return Vec::new();
        }
        let counted = |sequence: u64| sequence / RECOUNT_OPERATIONS;
        if counted(head.cursor.sequence) != counted(cursor.sequence)
            && index.count(&writer) > SET_PREFIXES_MAX
        {
            return vec![Event::Nonsense { from }];
        }
        index.apply(&writer, head.cursor, news);
        self.version += 1;
        self.relay.keep_delta(&delta);
        let added = |operation: &Operation| match operation {
            Operation::Add(prefix) => Some(*prefix),
            Operation::Remove(_) => None,
        };
        vec![Event::Changed {
            from,
            head: delta.head().clone(),
            added: news.iter().filter_map(added).collect(),
            news: if is_pushed(&delta) {
                Message::Delta(delta)
            } else {
                stands_at(writer, head.cursor)
            },
        }]
    }

    /// Answers a reader of a writer's log.
    ///
    /// A reader that is ahead of our own log shows that we lost part of it (a crash, a restored
    /// backup): numbers would be used twice, so a new epoch begins. Of an epoch that began in this
    /// process nothing can be lost, so a reader that lies has the set sent anew once at most.
    #[expect(
        clippy::too_many_arguments,
        reason = "the message, the index, and what a new epoch needs"
    )]
    pub(super) fn pull(
        &mut self,
        index: &mut dyn AvailabilityIndex,
        from: PeerId,
        writer: PeerId,
        after: Option<Cursor>,
        unix: UnixTime,
        chance: &mut Chance,
        now: Instant,
    ) -> Vec<Event> {
        let mut events = Vec::new();
        if writer == self.me
            && let Some(after) = after
            && after.epoch == self.own.cursor().epoch
            && after.sequence > self.own.cursor().sequence
            && !self.own.began_epoch()
        {
            self.own.new_epoch(index, after.epoch, unix, chance);
            events.push(Event::BeganEpoch);
        }
        let send = |message| Event::Send { to: from, message };
        let current = if writer == self.me {
            Some(self.own.cursor())
        } else {
            index.cursor(&writer)
        };
        // To a reader of our own log that holds another epoch of it, ours is what counts.
        let has_news = current.is_some_and(|current| {
            is_newer(Some(current), after)
                || writer == self.me && after.is_none_or(|after| after.epoch != current.epoch)
        });
        if !has_news {
            events.push(send(Message::NothingNewer { writer }));
            return events;
        }
        let same_epoch =
            after.filter(|after| current.is_some_and(|current| current.epoch == after.epoch));
        let deltas = same_epoch.and_then(|after| {
            if writer == self.me {
                self.own.deltas_after(after.sequence)
            } else {
                self.relay.deltas_after(&writer, after)
            }
        });
        match deltas {
            Some(deltas) => events.extend(deltas.into_iter().map(Message::Delta).map(send)),
            None => events.push(send(self.first_page(index, writer, now))),
        }
        events
    }

    /// Answers the request for a later page of a set; one that is not held any more begins anew.
    pub(super) fn pull_page(
        &mut self,
        index: &dyn AvailabilityIndex,
        writer: PeerId,
        cursor: Cursor,
        after: HashPrefix,
        now: Instant,
    ) -> Message {
        match self.relay.next_page(&writer, cursor, after, now) {
            Some(page) => page,
            None => self.first_page(index, writer, now),
        }
    }

    fn first_page(
        &mut self,
        index: &dyn AvailabilityIndex,
        writer: PeerId,
        now: Instant,
    ) -> Message {
        if writer == self.me {
            let prefixes = self.own.set().iter().copied().collect();
            return self.relay.first_page(self.own.head(), prefixes, now);
        }
        let cursor = index.cursor(&writer);
        // One that a damaged index gave back is no proof, and would be held against us.
        let head = cursor.and_then(|cursor| self.relay.head(&writer, cursor));
        let Some(head) = head.filter(|head| head.is_proved()).cloned() else {
            return Message::NothingNewer { writer };
        };
        let mut prefixes: Vec<HashPrefix> = Vec::new();
        loop {
            let after = prefixes.last().copied();
            let page = index.prefixes(&writer, after, SNAPSHOT_PREFIXES_MAX);
            if page.is_empty() {
                break;
            }
            prefixes.extend(page);
        }
        self.relay.first_page(head, prefixes, now)
    }

    /// Collects one page of a writer's set, and asks for the next.
    #[expect(
        clippy::too_many_arguments,
        reason = "they are the fields of one message"
    )]
    pub(super) fn snapshot(
        &mut self,
        index: &mut dyn AvailabilityIndex,
        from: PeerId,
        head: SignedHead,
        after: Option<HashPrefix>,
        prefixes: Vec<HashPrefix>,
        is_last: bool,
        is_member: bool,
        now: Instant,
    ) -> Vec<Event> {
        let writer = head.head().writer;
        // A page that nobody asked for, or that arrives after the pull was given up.
        let Some(pull) = self.pulls.progressed(&writer, from, now) else {
            return Vec::new();
        };
        let collected = match (after, &mut pull.collected) {
            (None, collected) => {
                if !head.is_proved() || head.head().count > SET_PREFIXES_MAX {
                    return vec![Event::Nonsense { from }];
                }
                collected.insert(Collected {
                    head: head.clone(),
                    prefixes: Vec::new(),
                })
            }
            (Some(after), Some(collected))
                if collected.head == head && collected.prefixes.last() == Some(&after) =>
            {
                collected
            }
            _ => return Vec::new(),
        };
        let is_too_long = (collected.prefixes.len() + prefixes.len()) as u64 > head.head().count;
        if is_too_long || !is_last && prefixes.is_empty() {
            return vec![Event::Nonsense { from }];
        }
        collected.prefixes.extend(prefixes);
        if !is_last && let Some(after) = collected.prefixes.last().copied() {
            let message = Message::PullPage {
                writer,
                cursor: head.head().cursor,
                after,
            };
            return vec![Event::Send { to: from, message }];
        }
        let outrun = pull.outrun;
        let prefixes = std::mem::take(&mut collected.prefixes);
        self.pulls.end(&writer, from);
        let is_whole = prefixes.len() as u64 == head.head().count
            && SetDigest::of(&prefixes) == head.head().set;
        if !is_whole {
            return vec![Event::Nonsense { from }];
        }
        let cursor = head.head().cursor;
        let is_news = from == writer || is_newer(Some(cursor), index.cursor(&writer));
        if !is_member || !is_news || writer == self.me {
            return Vec::new();
        }
        index.replace(&writer, cursor, &prefixes);
        self.version += 1;
        self.relay.drop_tail(&writer);
        self.relay.keep_head(&head);
        if let Some((teller, offer)) = outrun {
            self.pulls.offer(writer, teller, offer);
        }
        vec![Event::Changed {
            from,
            head,
            news: stands_at(writer, cursor),
            added: prefixes,
        }]
    }

    /// Hears our own signature at a position that we have not reached: we lost part of our log.
    ///
    /// Returns whether a new epoch began.
    pub(super) fn own_future(
        &mut self,
        index: &mut dyn AvailabilityIndex,
        head: &SignedHead,
        unix: UnixTime,
        chance: &mut Chance,
    ) -> bool {
        let told = head.head().cursor;
        if !is_newer(Some(told), Some(self.own.cursor())) || !head.is_proved() {
            return false;
        }
        self.own.new_epoch(index, told.epoch, unix, chance);
        true
    }

    /// The peer has nothing newer of that writer.
    pub(super) fn nothing_newer(&mut self, from: PeerId, writer: &PeerId) {
        self.pulls.end(writer, from);
    }

    pub(super) fn sizes(&self) -> [Size; 5] {
        let size = |what, (count, limit)| Size { what, count, limit };
        [
            size("operations of our log", self.own.size()),
            size("pulls", self.pulls.size()),
            size("writers offered", self.pulls.offered()),
            size("operations to pass on", self.relay.operations()),
            size("sets being read", self.relay.versions()),
        ]
    }

    pub(super) fn deadline(&self) -> Option<(Instant, &'static str)> {
        let deadlines = [
            Some((self.repair_at, "compare with a neighbour")),
            self.own.flush_at().map(|at| (at, "flush announcements")),
            self.pulls.deadline().map(|at| (at, "pull overdue")),
            self.relay.deadline().map(|at| (at, "drop an unread set")),
        ];
        deadlines.into_iter().flatten().min_by_key(|(at, _)| *at)
    }
}

/// Whether a delta is small enough to be told without being asked for.
pub(super) fn is_pushed(delta: &Delta) -> bool {
    delta.operations().len() <= PUSHED_OPERATIONS_MAX
}

/// What makes neighbours pull; the contact's number is filled in by whoever knows it.
fn stands_at(writer: PeerId, cursor: Cursor) -> Message {
    let news = WriterCursor {
        writer,
        contact: 0,
        cursor: Some(cursor),
    };
    Message::Cursors {
        cursors: vec![news],
        is_complete: false,
    }
}

fn log_offer(cursor: Cursor) -> Offer {
    Offer {
        contact: 0,
        cursor: Some(cursor),
    }
}

/// Whether a writer that stood at `one` stood at `other` before. Later epochs have greater numbers.
fn is_newer(one: Option<Cursor>, other: Option<Cursor>) -> bool {
    let order = |cursor: Option<Cursor>| cursor.map(|cursor| (cursor.epoch, cursor.sequence));
    order(one) > order(other)
}
