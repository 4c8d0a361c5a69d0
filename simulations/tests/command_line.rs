//! The command line, as a person or a CI job uses it.

use std::path::Path;
use std::process::{Command, Output};

fn program(arguments: &[&str]) -> Output {
    let program = env!("CARGO_BIN_EXE_granary-simulations");
    Command::new(program)
        .args(arguments)
        .output()
        .expect("the program starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A file of this test, in cargo's own folder for such things.
fn file(name: &str) -> String {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    folder
        .join(format!("{}-{name}", std::process::id()))
        .display()
        .to_string()
}

#[test]
fn a_run_reports_figures_and_draws_a_picture() {
    let svg = file("run.svg");
    let output = program(&[
        "run",
        "office-10",
        "--nodes",
        "4",
        "--seed",
        "3",
        "--svg",
        &svg,
    ]);
    let report = text(&output.stdout);
    assert!(output.status.success(), "{report}");
    for figure in [
        "join_received_max",
        "new_path_known_p99",
        "lookup_p99",
        "idle_minute_per_node",
    ] {
        assert!(report.contains(figure), "{figure} in {report}");
    }
    let picture = std::fs::read_to_string(&svg).unwrap();
    assert!(picture.starts_with("<svg") && picture.ends_with("</svg>\n"));
    assert!(
        picture.matches("<polyline").count() >= 2,
        "both curves are drawn"
    );
}

#[test]
fn a_run_of_several_seeds_is_ordered_whatever_the_number_of_jobs() {
    let runs = |jobs| {
        let arguments = [
            "run",
            "datagrams",
            "--nodes",
            "4",
            "--seeds",
            "1..5",
            "--json",
            "--jobs",
            jobs,
        ];
        text(&program(&arguments).stdout)
    };
    assert_eq!(runs("1"), runs("3"));
}

#[test]
fn a_promise_that_is_broken_fails_the_run() {
    let scenario = file("strict.toml");
    let office = include_str!("../scenarios/office-10.toml");
    let strict = office.replace("join-bytes-max = 1000000", "join-bytes-max = 10");
    std::fs::write(&scenario, strict).unwrap();
    let output = program(&["run", &scenario, "--nodes", "3"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output.stdout).contains("FAILED figures"),
        "{}",
        text(&output.stdout)
    );
    assert!(text(&output.stderr).contains("1 of 1 seeds failed: 1"));
}

#[test]
fn an_unknown_scenario_is_refused_with_the_known_ones() {
    let output = program(&["run", "offce-10"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("office-10"));
}

#[test]
fn comparing_tells_what_got_worse_and_fails_then() {
    let (base, worse) = (file("base.json"), file("worse.json"));
    let report = text(&program(&["run", "datagrams", "--nodes", "4", "--json"]).stdout);
    std::fs::write(&base, &report).unwrap();
    let same = program(&["compare", &base, &base]);
    assert!(same.status.success());

    let mut reports: serde_json::Value = serde_json::from_str(&report).unwrap();
    let sent = &mut reports[0]["figures"]["control_sent"]["value"];
    *sent = (sent.as_u64().unwrap() * 106 / 100).into();
    std::fs::write(&worse, reports.to_string()).unwrap();
    let output = program(&["compare", &base, &worse]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output.stdout).contains("WORSE  control_sent"),
        "{}",
        text(&output.stdout)
    );
    // The other way round it got better.
    assert!(program(&["compare", &worse, &base]).status.success());
}
