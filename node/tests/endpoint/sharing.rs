//! What is not shared cannot be told from what is not there, and `granary hide` decides at once.

use std::net::SocketAddr;
use std::process::Command;

use granary::identity::Identity;
use granary::serve::tls;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::machine::{GENEROUS, Machine, SMALL_BYTES, TRANSFER_PORT, until};

/// Sends one request to `server`'s members' port as the member that `member` is.
async fn ask_as(member: &Machine, server: &Machine, request: &str) -> String {
    let identity =
        |machine: &Machine| Identity::load_or_create(&machine.state().join("identity")).unwrap();
    let address = SocketAddr::from((server.address, TRANSFER_PORT));
    let connector = tls::connector(&identity(member), GENEROUS).unwrap();
    let expected = identity(server).peer_id();
    let mut stream = connector.connect(address, expected).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    let answer = String::from_utf8_lossy(&answer);
    // The time of day is all that two answers may differ in.
    let lines = answer.lines().filter(|line| !line.starts_with("date:"));
    lines.collect::<Vec<_>>().join("\n")
}

/// Runs a command of the binary with a machine's configuration.
fn granary(machine: &Machine, arguments: &[&str]) -> String {
    let file = machine.folder().join("granary.toml");
    // With the port that the running node got.
    let listen = format!("listen = \"{}\"", machine.endpoint());
    let text = machine
        .config_text()
        .replace("listen = \"127.0.0.1:0\"", &listen);
    std::fs::write(&file, text).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_granary"));
    command.args(arguments).arg("--config").arg(file);
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_shared_cannot_be_told_from_what_is_not_there() {
    let mut desktop = Machine::new();
    desktop.equip();
    desktop.extra = "[share]\ndeny = [\"^private-\"]\n".into();
    let shared = desktop.add("shared", SMALL_BYTES);
    let hidden = desktop.add("hidden", SMALL_BYTES);
    let denied = desktop.add("private-notes", SMALL_BYTES);
    let file = desktop.folder().join("unsigned");
    std::fs::write(&file, "a secret").unwrap();
    let unsigned = desktop.nix("nix-store", &["--add", file.to_str().unwrap()]);
    let unsigned = desktop.sample(&unsigned);
    let (derivation, _) = desktop.build(
        "derivation { name = \"built\"; system = builtins.currentSystem; builder = \"/bin/sh\"; args = [ \"-c\" \"echo x >$out\" ]; }",
    );
    let derivation = desktop.sample(&derivation);
    let mut laptop = Machine::new();
    laptop.peers = vec![desktop.address];
    desktop.start().await;
    laptop.start().await;
    laptop.wait_for(&shared);
    laptop.wait_for(&hidden);
    let said = granary(&desktop, &["hide", &hidden.path]);
    assert!(
        said.starts_with("hidden: ") && said.lines().count() == 1,
        "{said}"
    );

    let absent = "0123456789abcdfghijklmnpqrsvwxyz";
    let served = format!(
        "GET {} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        shared.short()
    );
    assert!(
        ask_as(&laptop, &desktop, &served)
            .await
            .starts_with("HTTP/1.1 200")
    );
    for (what, path) in [
        ("hidden", &hidden),
        ("denied", &denied),
        ("unsigned", &unsigned),
        ("derivation", &derivation),
    ] {
        let name = &path.path["/nix/store/".len()..];
        for target in [
            "/@.narinfo",
            "/@.narinfo?json",
            "/@.ls",
            "/nar/@.nar",
            "/serve/@",
            "/serve/@/",
            "/api/v1/why/@",
            &format!("/log/{name}").replace(&path.hash, "@"),
        ] {
            for (method, headers) in [("GET", ""), ("HEAD", ""), ("GET", "Range: bytes=10-\r\n")] {
                let request = |hash: &str| {
                    let target = target.replace('@', hash);
                    format!(
                        "{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}\r\n"
                    )
                };
                let of_absent = ask_as(&laptop, &desktop, &request(absent)).await;
                let of_private = ask_as(&laptop, &desktop, &request(&path.hash)).await;
                assert_eq!(of_private, of_absent, "{what}: {method} {target} {headers}");
                assert!(of_absent.starts_with("HTTP/1.1 404"), "{of_absent}");
            }
        }
    }
    // The machine's own Nix is no peer.
    for path in [&hidden, &denied, &unsigned, &derivation] {
        assert_eq!(desktop.get(&path.narinfo()).status, 200);
        assert_eq!(laptop.get(&path.narinfo()).status, 404);
        let why = granary(&desktop, &["why", &path.path]);
        assert!(why.contains("not shared: "), "{why}");
    }
    laptop.stop().await;
    desktop.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_path_is_hidden_and_shown_while_the_node_runs_and_after_a_restart() {
    let mut desktop = Machine::new();
    let mut laptop = Machine::new();
    let path = desktop.add("draft", SMALL_BYTES);
    laptop.peers = vec![desktop.address];
    desktop.start().await;
    laptop.start().await;
    laptop.wait_for(&path);
    let held = |desktop: &Machine| desktop.status().paths_held;
    assert_eq!(held(&desktop), 1);

    granary(&desktop, &["hide", &path.path]);
    // The neighbour has the narinfo in its memory, and must not be given the NAR.
    let request = format!(
        "GET {} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        path.short()
    );
    let answer = ask_as(&laptop, &desktop, &request).await;
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    until("the path is withdrawn", || held(&desktop) == 0);
    until("the neighbour hears of it", || {
        laptop.get(&path.narinfo()).status == 404
    });
    let why = granary(&desktop, &["why", &path.path]);
    assert!(why.contains("not shared: hidden by granary hide"), "{why}");
    let list = granary(&desktop, &["hide"]);
    assert_eq!(list.trim(), &path.path["/nix/store/".len()..]);

    desktop.stop().await;
    desktop.start().await;
    // Asked of the machine that came back: its neighbour may not have noticed yet that it was away.
    until("the link is back", || {
        let report = desktop.status();
        report.peers.iter().any(|peer| peer.state == "linked")
    });
    assert_eq!(held(&desktop), 0);
    assert_eq!(laptop.get(&path.narinfo()).status, 404);

    granary(&desktop, &["unhide", &path.hash]);
    laptop.wait_for(&path);
    assert_eq!(laptop.get(&path.short()).body, path.nar);
    laptop.stop().await;
    desktop.stop().await;
}
