//! Picture: one SVG that shows a run: how much of the mesh agrees over time, how fast news spread, and where the
//! bytes of NARs came from.

use std::fmt::Write as _;

use super::{Moved, Report, percentile};

const WIDTH: u64 = 960;
const PANEL: u64 = 180;
const LEFT: u64 = 70;
const GAP: u64 = 60;

/// Colours of series: peers, the anchor, wrong bytes.
const PEER: &str = "#2a78b5";
const ANCHOR: &str = "#e6a23c";
const UPSTREAM: &str = "#7a8b99";
const WRONG: &str = "#c0392b";

/// Draws a report.
pub fn draw(report: &Report) -> String {
    let summary = report.summary();
    let height = 3 * (PANEL + GAP) + 60;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"24\" font-size=\"16\">{} · seed {} · {} machines{}</text>\n",
        summary.scenario,
        summary.seed,
        summary.machines,
        summary
            .violation
            .as_ref()
            .map_or(String::new(), |_| " · FAILED".to_owned()),
    );
    agreement(report, &mut svg, 50);
    spread(report, &mut svg, 50 + PANEL + GAP);
    sources(report, &mut svg, 50 + 2 * (PANEL + GAP));
    svg.push_str("</svg>\n");
    svg
}

fn plot_width() -> u64 {
    WIDTH - LEFT - 20
}

fn frame(svg: &mut String, top: u64, title: &str, highest: &str) {
    let (width, bottom) = (plot_width(), top + PANEL);
    write!(
        svg,
        "<text x=\"{LEFT}\" y=\"{}\">{title}</text>\n\
         <rect x=\"{LEFT}\" y=\"{top}\" width=\"{width}\" height=\"{PANEL}\" fill=\"none\" stroke=\"#999\"/>\n\
         <text x=\"{}\" y=\"{}\" text-anchor=\"end\">{highest}</text>\n\
         <text x=\"{}\" y=\"{bottom}\" text-anchor=\"end\">0</text>\n",
        top - 6,
        LEFT - 6,
        top + 12,
        LEFT - 6,
    )
    .expect("writing to a string succeeds");
}

fn label(svg: &mut String, x: u64, y: u64, text: &str) {
    writeln!(
        svg,
        "<text x=\"{x}\" y=\"{y}\" text-anchor=\"middle\" fill=\"#555\">{text}</text>"
    )
    .expect("writing to a string succeeds");
}

fn line(svg: &mut String, points: &str, colour: &str) {
    writeln!(
        svg,
        "<polyline points=\"{points}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\"/>"
    )
    .expect("writing to a string succeeds");
}

/// Shades the time of faults and writes seconds below.
fn time_axis(
    report: &Report,
    svg: &mut String,
    top: u64,
    last_s: u64,
) -> impl Fn(u64) -> u64 + use<> {
    let place = move |second: u64| LEFT + second.min(last_s) * plot_width() / last_s.max(1);
    if let (Some(settled), Some(calm)) = (report.mark_of("settled"), report.mark_of("calm")) {
        let (from, to) = (place(settled.as_secs()), place(calm.as_secs()));
        writeln!(
            svg,
            "<rect x=\"{from}\" y=\"{top}\" width=\"{}\" height=\"{PANEL}\" fill=\"#f6ecec\"/>",
            to - from
        )
        .expect("writing to a string succeeds");
    }
    for part in 0..=6 {
        let second = last_s * part / 6;
        label(svg, place(second), top + PANEL + 16, &format!("{second} s"));
    }
    place
}

fn agreement(report: &Report, svg: &mut String, top: u64) {
    let last = report
        .samples
        .last()
        .map_or(1, |sample| sample.at.as_secs().max(1));
    let place = time_axis(report, svg, top, last);
    frame(
        svg,
        top,
        "pairs of reachable machines of which one knows exactly what the other holds (faults shaded)",
        "100 %",
    );
    let mut points = String::new();
    for sample in &report.samples {
        let share = (sample.exact * PANEL)
            .checked_div(sample.pairs)
            .unwrap_or(PANEL);
        write!(
            points,
            "{},{} ",
            place(sample.at.as_secs()),
            top + PANEL - share
        )
        .expect("writing to a string succeeds");
    }
    line(svg, &points, PEER);
}

fn spread(report: &Report, svg: &mut String, top: u64) {
    frame(
        svg,
        top,
        "time until news is known elsewhere, share of readers: blue on a quiet network, red among faults",
        "100 %",
    );
    // Each column is a tenth of a power of ten, from 1 ms to 100 s.
    const COLUMNS: [u64; 26] = [
        1_000,
        1_600,
        2_500,
        4_000,
        6_300,
        10_000,
        16_000,
        25_000,
        40_000,
        63_000,
        100_000,
        160_000,
        250_000,
        400_000,
        630_000,
        1_000_000,
        1_600_000,
        2_500_000,
        4_000_000,
        6_300_000,
        10_000_000,
        16_000_000,
        25_000_000,
        40_000_000,
        63_000_000,
        100_000_000,
    ];
    let place = |column: usize| LEFT + column as u64 * plot_width() / (COLUMNS.len() as u64 - 1);
    for (samples, colour) in [
        (&report.learned_before, WRONG),
        (&report.learned_quiet, PEER),
    ] {
        if samples.is_empty() {
            continue;
        }
        let mut points = String::new();
        for (column, limit) in COLUMNS.iter().enumerate() {
            let within = samples.iter().filter(|sample| *sample <= limit).count() as u64;
            let share = within * PANEL / samples.len() as u64;
            write!(points, "{},{} ", place(column), top + PANEL - share)
                .expect("writing to a string succeeds");
        }
        line(svg, &points, colour);
    }
    for (column, text) in [
        (0, "1 ms"),
        (5, "10 ms"),
        (10, "100 ms"),
        (15, "1 s"),
        (20, "10 s"),
        (25, "100 s"),
    ] {
        label(svg, place(column), top + PANEL + 16, text);
    }
    if let Some(p99) = percentile(&report.learned_quiet, 99) {
        label(
            svg,
            WIDTH / 2,
            top + PANEL - 8,
            &format!("quiet p99 {} ms", p99 / 1000),
        );
    }
}

fn sources(report: &Report, svg: &mut String, top: u64) {
    let last = report
        .samples
        .last()
        .map_or(1, |sample| sample.at.as_secs().max(1));
    // As many columns as fit, each a whole number of seconds.
    let seconds = last.div_ceil(240).max(1);
    let mut columns: Vec<Moved> = vec![Moved::default(); (last / seconds + 1) as usize];
    for (second, moved) in &report.moved {
        if let Some(column) = columns.get_mut((second / seconds) as usize) {
            column.peer += moved.peer;
            column.anchor += moved.anchor;
            column.upstream += moved.upstream;
            column.wrong += moved.wrong;
        }
    }
    let sum = |moved: &Moved| moved.peer + moved.anchor + moved.upstream + moved.wrong;
    let highest = columns.iter().map(sum).max().unwrap_or(0).max(1);
    let place = time_axis(report, svg, top, last);
    let title = "bytes of NARs a second: blue from peers, yellow from the anchor, grey from upstream, red wrong ones that were caught";
    frame(
        svg,
        top,
        title,
        &format!("{} MB/s", highest / seconds / 1_000_000),
    );
    let width = (plot_width() * seconds / last).max(1);
    for (number, moved) in columns.iter().enumerate() {
        let mut bottom = top + PANEL;
        for (bytes, colour) in [
            (moved.peer, PEER),
            (moved.anchor, ANCHOR),
            (moved.upstream, UPSTREAM),
            (moved.wrong, WRONG),
        ] {
            let tall = (u128::from(bytes) * u128::from(PANEL) / u128::from(highest)) as u64;
            bottom -= tall;
            if tall > 0 {
                let x = place(number as u64 * seconds);
                writeln!(
                    svg,
                    "<rect x=\"{x}\" y=\"{bottom}\" width=\"{width}\" height=\"{tall}\" fill=\"{colour}\"/>"
                )
                .expect("writing to a string succeeds");
            }
        }
    }
}
