//! Pace: in which form the next piece of a NAR travels.
//!
//! A stream packs one piece while the one before it is on its way, so what comes out at the other end
//! is the slower of the two: bytes packed per second, or bytes that the link carries times how far they
//! shrink. Both are measured while it runs, and the best form is the one whose slower half is fastest.
//! Plain pieces need no packing, so a link faster than zstd gets those.
//!
//! What a link carries shows only while it is what the stream waits for. Until then pieces are plain, and again
//! when packed ones turn out to be what the link waits for: so only what was measured to be slow is packed for.

use std::time::{Duration, Instant};

/// The levels of zstd that are used. Of a program on a two-core machine: 300 MB/s at 2.35 : 1, and 180 MB/s
/// at 2.52 : 1; level 6 takes twice as long as 3 for 3 % more.
pub const LEVELS: [i32; 2] = [1, 3];

/// What the levels are believed to cost until they were measured, in bytes of a NAR per second.
const RATES: [f64; LEVELS.len()] = [300e6, 180e6];

/// How far a NAR is believed to shrink until a piece of it was packed: what programs and texts do.
const RATIOS: [f64; LEVELS.len()] = [2.3, 2.5];

/// How much a new measurement counts beside all before it.
const WEIGHT: f64 = 0.3;

/// How much better than plain pieces packing has to be: it takes a processor from others.
const MARGIN: f64 = 1.15;

/// What a link carries at most that packing is worth a processor: somewhat more than 1 Gbit/s. Nix itself unpacks,
/// hashes and writes hardly faster, and what seems to be a link of such a rate is a busy node at the other end.
const LINK_MAX: f64 = 150e6;

/// Bytes on the wire, and pieces, over which the link is measured: buffers on the way take some
/// hundred KiB at once.
const WINDOW_BYTES: u64 = 1024 * 1024;
const WINDOW_PIECES: u32 = 4;

/// Bytes that a stream sends before it measures: they only fill those buffers.
const WARM_UP_BYTES: u64 = 512 * 1024;

/// Share of a window's time that the link may wait for the stream and still be what limits it.
const STARVED_LITTLE: f64 = 0.3;

/// The same above which the stream is what limits.
const STARVED_MUCH: f64 = 0.7;

/// One piece in so many is packed although the NAR did not shrink: its next file may.
const REVIEW_PIECES: u32 = 32;

/// How a piece is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    Plain,
    /// By the level with this index in [`LEVELS`].
    Packed(usize),
}

/// What packing costs on this machine, measured over all streams.
#[derive(Debug, Clone)]
pub struct Costs {
    /// Bytes of a NAR per second.
    rates: [f64; LEVELS.len()],
}

impl Default for Costs {
    fn default() -> Costs {
        Costs { rates: RATES }
    }
}

impl Costs {
    /// Takes in that `bytes` were packed by the level with index `level`.
    pub fn measured(&mut self, level: usize, bytes: usize, took: Duration) {
        if let Some(rate) = self.rates.get_mut(level)
            && !took.is_zero()
        {
            *rate = blend(*rate, bytes as f64 / took.as_secs_f64());
        }
    }

    /// Whether a link of so many bytes per second is too fast for any packing.
    pub fn is_outrun_by(&self, link: f64) -> bool {
        link > LINK_MAX || self.rates.iter().all(|rate| link * MARGIN > *rate)
    }
}

/// The forms of one NAR's pieces.
#[derive(Debug)]
pub struct Pace {
    /// Bytes per second that the link carries for this stream.
    link: Option<f64>,
    /// Bytes of the NAR for each on the wire.
    ratios: [f64; LEVELS.len()],
    has_packed: bool,
    window: Window,
    to_warm_up: u64,
    since_packed: u32,
}

/// What happened since the link was measured last.
#[derive(Debug, Default)]
struct Window {
    since: Option<Instant>,
    wire_bytes: u64,
    pieces: u32,
    /// How long the link waited for a piece.
    starved: Duration,
    has_packed: bool,
}

impl Pace {
    /// Begins a NAR on a link that carried `link` bytes per second for the one before it.
    pub fn new(link: Option<f64>) -> Pace {
        Pace {
            link,
            ratios: RATIOS,
            has_packed: false,
            window: Window::default(),
            to_warm_up: WARM_UP_BYTES,
            since_packed: 0,
        }
    }

    /// The form of the piece to be made next.
    pub fn form(&mut self, costs: &Costs) -> Form {
        let form = self.best(costs);
        self.since_packed = match form {
            Form::Plain => self.since_packed.saturating_add(1),
            Form::Packed(_) => 0,
        };
        form
    }

    fn best(&self, costs: &Costs) -> Form {
        let Some(link) = self.link.filter(|link| *link <= LINK_MAX) else {
            return Form::Plain;
        };
        let rate = |level: usize| costs.rates[level].min(link * self.ratios[level]);
        let mut best = (Form::Plain, link * MARGIN);
        for level in 0..LEVELS.len() {
            if rate(level) > best.1 {
                best = (Form::Packed(level), rate(level));
            }
        }
        let could_shrink = costs.rates[0].min(link * RATIOS[0]) > link * MARGIN;
        if best.0 == Form::Plain && could_shrink && self.since_packed >= REVIEW_PIECES {
            return Form::Packed(0);
        }
        best.0
    }

    /// Takes in to how much a piece was packed by the level with index `level`.
    pub fn packed(&mut self, level: usize, bytes: usize, wire_bytes: usize) {
        self.window.has_packed = true;
        let ratio = bytes as f64 / wire_bytes.max(1) as f64;
        // Another level shrinks it as much further as it does others.
        for (other, known) in self.ratios.iter_mut().enumerate() {
            let guess = match RATIOS.get(level) {
                Some(usual) if other != level && ratio > 1.05 => ratio * RATIOS[other] / usual,
                _ => ratio,
            };
            *known = match self.has_packed {
                true => blend(*known, guess),
                false => guess,
            };
        }
        self.has_packed = true;
    }

    /// Takes in that the link asked for a piece at `asked` and got one of `wire_bytes` at `given`.
    ///
    /// Returns what the link carries, in bytes per second, when that was found out anew.
    pub fn given(&mut self, wire_bytes: usize, asked: Instant, given: Instant) -> Option<f64> {
        let wire_bytes = wire_bytes as u64;
        if self.to_warm_up > 0 {
            self.to_warm_up = self.to_warm_up.saturating_sub(wire_bytes);
            return None;
        }
        let window = &mut self.window;
        let since = *window.since.get_or_insert(asked);
        let time = asked.saturating_duration_since(since);
        let is_full = window.wire_bytes >= WINDOW_BYTES && window.pieces >= WINDOW_PIECES;
        let is_measured = is_full && !time.is_zero();
        if is_measured {
            self.measure(time);
            self.window = Window {
                since: Some(asked),
                ..Window::default()
            };
        }
        self.window.wire_bytes += wire_bytes;
        self.window.pieces += 1;
        self.window.starved += given.saturating_duration_since(asked);
        self.link.filter(|_| is_measured)
    }

    fn measure(&mut self, time: Duration) {
        let window = &self.window;
        let carried = window.wire_bytes as f64 / time.as_secs_f64();
        let starved = window.starved.as_secs_f64() / time.as_secs_f64();
        if starved < STARVED_LITTLE {
            self.link = Some(self.link.map_or(carried, |link| blend(link, carried)));
        } else if starved > STARVED_MUCH && window.has_packed {
            // It carries this much at least, and how much more only plain pieces tell.
            if self.link.is_none_or(|link| link < carried) {
                self.link = None;
            }
        } else {
            // Reading is what limits, or nothing alone does.
            self.link = Some(self.link.map_or(carried, |link| link.max(carried)));
        }
    }
}

/// Bytes after which it is judged who waits for whom: what is smaller comes in one burst.
const JUDGED_BYTES: u64 = 1024 * 1024;

/// Share of the time that a node waits for a link that limits it, at least.
const THIRSTY: f64 = 0.25;

/// How long a node that was busy with something else than waiting is believed to be.
const SATED_FOR: Duration = Duration::from_secs(60);

/// Whether a node that fetches waits for the link, or the link for it: packing is no help to a node that
/// cannot take more, and unpacking is more work.
#[derive(Debug, Default)]
pub struct Thirst {
    sated_at: Option<Instant>,
}

impl Thirst {
    /// Takes in that a transfer of `bytes` took `time`, of which the node `waited` for the next ones.
    pub fn transferred(&mut self, bytes: u64, waited: Duration, time: Duration, now: Instant) {
        if bytes >= JUDGED_BYTES {
            let is_thirsty = waited.as_secs_f64() >= THIRSTY * time.as_secs_f64();
            self.sated_at = (!is_thirsty).then_some(now);
        }
    }

    /// Whether to offer that a NAR may come in pieces.
    pub fn is_felt(&self, now: Instant) -> bool {
        self.sated_at
            .is_none_or(|at| now.saturating_duration_since(at) >= SATED_FOR)
    }
}

fn blend(known: f64, found: f64) -> f64 {
    known * (1.0 - WEIGHT) + found * WEIGHT
}

#[cfg(test)]
mod tests {
    use super::*;

    const PIECE: usize = 256 * 1024;
    const PIECES: usize = 1024;

    /// Any will do: nothing but differences counts.
    #[allow(clippy::disallowed_methods)]
    fn some_instant() -> Instant {
        Instant::now()
    }

    /// What the ways between two nodes hold before a piece has to wait.
    const BUFFERS: f64 = 512.0 * 1024.0;

    /// A stream as `node` runs it: one piece is made while one waits for the link. Rates in bytes per second.
    #[derive(Clone, Copy)]
    struct Stream {
        link: f64,
        reading: f64,
        packing: [f64; LEVELS.len()],
        ratios: [f64; LEVELS.len()],
    }

    impl Stream {
        /// Of something like a program, on the machine that the constants were measured on.
        fn over(link: f64) -> Stream {
            Stream {
                link,
                reading: 3e9,
                packing: [300e6, 180e6],
                ratios: [2.35, 2.52],
            }
        }

        /// Returns bytes of the NAR per second, with all pieces in one form.
        fn always(&self, form: Form) -> f64 {
            self.run(PIECES, |_, _| form, |_, _, _| {})
        }

        fn best(&self) -> f64 {
            if self.link > LINK_MAX {
                return self.always(Form::Plain);
            }
            let forms = [Form::Plain, Form::Packed(0), Form::Packed(1)];
            forms
                .map(|form| self.always(form))
                .into_iter()
                .fold(0.0, f64::max)
        }

        /// Seconds that a stream of this rate takes longer than the best would, beyond a sixth of that: what
        /// it cost to learn.
        fn lost(&self, rate: f64) -> f64 {
            let bytes = (PIECES * PIECE) as f64;
            bytes / rate - bytes / self.best() * 7.0 / 6.0
        }

        fn paced(&self, pace: &mut Pace, costs: &mut Costs, pieces: usize) -> f64 {
            let pace = std::cell::RefCell::new(pace);
            let form = |stream: &Stream, _| {
                let mut pace = pace.borrow_mut();
                let form = pace.form(costs);
                if let Form::Packed(level) = form {
                    let took = Duration::from_secs_f64(PIECE as f64 / stream.packing[level]);
                    costs.measured(level, PIECE, took);
                    pace.packed(level, PIECE, (PIECE as f64 / stream.ratios[level]) as usize);
                }
                form
            };
            self.run(pieces, form, |wire, asked, given| {
                pace.borrow_mut().given(wire, asked, given);
            })
        }

        fn run(
            &self,
            pieces: usize,
            mut form: impl FnMut(&Stream, usize) -> Form,
            mut tell: impl FnMut(usize, Instant, Instant),
        ) -> f64 {
            let start = some_instant();
            let at = |seconds: f64| start + Duration::from_secs_f64(seconds);
            let (mut made, mut given, mut arrived) = (0.0_f64, 0.0_f64, 0.0_f64);
            let mut taken: Vec<f64> = Vec::new();
            let mut on_the_way: Vec<(f64, f64)> = Vec::new();
            for piece in 0..pieces {
                let (took, wire) = match form(self, piece) {
                    Form::Plain => (0.0, PIECE as f64),
                    Form::Packed(level) => (
                        PIECE as f64 / self.packing[level],
                        PIECE as f64 / self.ratios[level],
                    ),
                };
                // The one before the last must have been taken.
                let place = piece.checked_sub(2).map_or(0.0, |earlier| taken[earlier]);
                made = made.max(place) + PIECE as f64 / self.reading + took;
                let mut buffered: f64 = on_the_way.iter().map(|(wire, _)| wire).sum();
                let mut asked = given;
                while buffered > BUFFERS {
                    let (wire, arrived) = on_the_way.remove(0);
                    buffered -= wire;
                    asked = asked.max(arrived);
                }
                given = asked.max(made);
                taken.push(given);
                arrived = arrived.max(given) + wire / self.link;
                on_the_way.push((wire, arrived));
                tell(wire as usize, at(asked), at(given));
            }
            (pieces * PIECE) as f64 / arrived
        }
    }

    /// 1 MB/s to 4 GB/s.
    fn links() -> impl Iterator<Item = f64> {
        (0..13).map(|power| 1e6 * 2_f64.powi(power))
    }

    #[test]
    fn a_stream_is_as_fast_as_in_its_best_form() {
        for link in links() {
            for known in [None, Some(1e6), Some(link), Some(10e9)] {
                let stream = Stream::over(link);
                let (mut pace, mut costs) = (Pace::new(known), Costs::default());
                let rate = stream.paced(&mut pace, &mut costs, PIECES);
                let lost = stream.lost(rate);
                assert!(lost < 0.05, "{link} known as {known:?}: {lost} s");
            }
        }
    }

    #[test]
    fn what_does_not_shrink_goes_as_it_is_and_costs_little() {
        for link in links() {
            let stream = Stream {
                ratios: [1.0; 2],
                ..Stream::over(link)
            };
            let mut packed = 0;
            let (mut pace, costs) = (Pace::new(None), Costs::default());
            for _ in 0..PIECES {
                if let Form::Packed(level) = pace.form(&costs) {
                    packed += 1;
                    pace.packed(level, PIECE, PIECE);
                }
                pace.link = Some(link);
            }
            assert!(packed <= PIECES / 32 + 2, "{link}: {packed} were packed");
            let (mut pace, mut costs) = (Pace::new(None), Costs::default());
            let rate = stream.paced(&mut pace, &mut costs, PIECES);
            let lost = stream.lost(rate);
            assert!(lost < 0.05, "{link}: {lost} s");
        }
    }

    #[test]
    fn contents_that_begin_to_shrink_are_noticed() {
        let (mut pace, mut costs) = (Pace::new(None), Costs::default());
        let link = 12e6;
        let noise = Stream {
            ratios: [1.0; 2],
            ..Stream::over(link)
        };
        noise.paced(&mut pace, &mut costs, 200);
        let stream = Stream::over(link);
        let rate = stream.paced(&mut pace, &mut costs, PIECES);
        let lost = stream.lost(rate);
        assert!(lost < 0.05, "{lost} s");
    }

    #[test]
    fn a_slow_processor_sends_plain_pieces() {
        for link in [50e6, 100e6, 1e9] {
            let stream = Stream {
                packing: [20e6, 10e6],
                ..Stream::over(link)
            };
            let (mut pace, mut costs) = (Pace::new(None), Costs::default());
            let rate = stream.paced(&mut pace, &mut costs, PIECES);
            let lost = stream.lost(rate);
            assert!(lost < 0.3, "{link}: {lost} s");
        }
    }

    #[test]
    fn a_slow_disk_makes_no_link_slow() {
        let stream = Stream {
            reading: 50e6,
            ..Stream::over(1e9)
        };
        let (mut pace, mut costs) = (Pace::new(Some(1e9)), Costs::default());
        stream.paced(&mut pace, &mut costs, PIECES);
        assert!(pace.link.unwrap() >= 1e9);
    }

    #[test]
    fn only_a_link_faster_than_zstd_outruns_it() {
        let costs = Costs::default();
        assert!(!costs.is_outrun_by(125e6));
        assert!(costs.is_outrun_by(1e9));
    }

    #[test]
    fn a_node_that_is_never_waiting_offers_nothing_for_a_while() {
        let now = some_instant();
        let second = Duration::from_secs(1);
        let mut thirst = Thirst::default();
        assert!(thirst.is_felt(now));
        thirst.transferred(1000, Duration::ZERO, second, now);
        assert!(thirst.is_felt(now), "too small to judge");
        thirst.transferred(1 << 30, second / 10, second, now);
        assert!(!thirst.is_felt(now + SATED_FOR / 2));
        assert!(thirst.is_felt(now + SATED_FOR));
        thirst.transferred(1 << 30, second / 2, second, now);
        assert!(thirst.is_felt(now));
    }
}
