//! `granary push` where no person is: its token comes from the environment or from systemd, and its exit
//! status says what became of it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output};

use granary_protocol::token::Permission::{Pull, Push};

use crate::rig::{Machine, Rig};

/// Runs `granary push`, with this environment alone and whatever configuration stands in the folder.
fn push(machine: &Machine, arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_granary"));
    command
        .arg("push")
        .args(arguments)
        .env_clear()
        .env("GRANARY_CONFIG", machine.folder().join("granary.toml"))
        .envs(environment.iter().copied());
    command.output().unwrap()
}

fn configure(machine: &Machine, more: &str) {
    let root = machine.folder().display();
    let text = format!(
        "state-dir = \"{root}/state\"\n[store]\nreal-dir = \"{root}/nix/store\"\n\
         database = \"{root}/nix/var/nix/db/db.sqlite\"\n{more}"
    );
    fs::write(machine.folder().join("granary.toml"), text).unwrap();
}

#[track_caller]
fn expect(output: &Output, status: i32, words: &str) {
    let said = String::from_utf8_lossy(&output.stderr);
    let printed = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(status), "{printed}{said}");
    assert!(
        said.contains(words) || printed.contains(words),
        "{words:?} is not in {printed}{said}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_pushes_with_a_token_of_its_environment_and_fails_when_it_did_not() {
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    let token = rig.token(&[("main", &[Pull, Push])]).await;
    let reader = rig.token(&[("main", &[Pull])]).await;
    let builder = Machine::new(&[]);
    let closure = builder.build();
    let url = rig.url("main");
    tokio::task::block_in_place(|| {
        configure(&builder, "");
        let pushed = &[url.as_str(), closure[2].as_str()];
        let ours = ("GRANARY_TOKEN", token.as_str());
        expect(
            &push(&builder, pushed, &[]),
            1,
            "GRANARY_TOKEN in the environment",
        );
        expect(
            &push(&builder, pushed, &[("GRANARY_TOKEN", "")]),
            1,
            "GRANARY_TOKEN is empty",
        );
        let long = "x".repeat(100_000);
        expect(
            &push(&builder, pushed, &[("GRANARY_TOKEN", &long)]),
            1,
            "100000 bytes",
        );
        expect(
            &push(&builder, pushed, &[("GRANARY_TOKEN", &reader)]),
            1,
            "does not allow to push",
        );
        expect(&push(&builder, pushed, &[ours]), 0, "pushed 3 of 3 paths");
        expect(&push(&builder, pushed, &[ours]), 0, "3 were there");
        expect(&push(&builder, &[&url], &[ours]), 2, "<PATHS>");
        expect(
            &push(&builder, &["http://127.0.0.1:1/main", &closure[2]], &[ours]),
            1,
            "127.0.0.1:1",
        );

        // A bare container has no certificate authorities, and needs none for HTTP.
        let none = [("SSL_CERT_FILE", "/none"), ("SSL_CERT_DIR", "/none"), ours];
        let warned = push(&builder, pushed, &none);
        expect(&warned, 0, "found no certificate authorities");
        expect(&warned, 0, "3 were there");

        // A file that is named for this push counts more than the variable, and that more than the configuration.
        let file = builder.folder().join("other.token");
        fs::write(&file, &reader).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        let named = &["--token-file", file.to_str().unwrap(), &url, &closure[2]];
        expect(&push(&builder, named, &[ours]), 1, "does not allow to push");
        configure(
            &builder,
            &format!("[[anchor]]\nurl = \"{url}\"\ntoken-file = {file:?}\n"),
        );
        expect(
            &push(&builder, &["main", &closure[2]], &[]),
            1,
            "does not allow to push",
        );
        expect(
            &push(&builder, &["main", &closure[2]], &[ours]),
            0,
            "3 were there",
        );
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_with_the_mode_of_a_credential_is_taken_from_systemd_alone() {
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    let token = rig.token(&[("main", &[Push])]).await;
    let builder = Machine::new(&[]);
    let closure = builder.build();
    let url = rig.url("main");
    tokio::task::block_in_place(|| {
        let credentials = builder.folder().join("credentials");
        fs::create_dir(&credentials).unwrap();
        let file = credentials.join("anchor-0");
        fs::write(&file, format!("{token}\n")).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o440)).unwrap();
        configure(
            &builder,
            &format!("[[anchor]]\nurl = \"{url}\"\ntoken-file = {file:?}\n"),
        );
        let pushed = &["main", closure[2].as_str()];
        expect(&push(&builder, pushed, &[]), 1, "mode 0440");
        let folder = ("CREDENTIALS_DIRECTORY", credentials.to_str().unwrap());
        expect(&push(&builder, pushed, &[folder]), 0, "pushed 3 of 3 paths");
    });
}
