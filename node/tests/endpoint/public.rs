//! What is shared in public: strangers get what a public key signed, and learn of nothing else.

use std::fs;
use std::net::SocketAddr;

use granary::identity::Identity;
use granary::serve::tls;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::machine::{GENEROUS, Machine, SMALL_BYTES, Sample, TRANSFER_PORT, key};

const ABSENT: &str = "0123456789abcdfghijklmnpqrsvwxyz";

/// Adds another key's signature to a path.
fn sign(machine: &Machine, path: &Sample, name: &str) {
    let file = machine.folder().join(name);
    fs::write(&file, key(name).to_nix_string().as_bytes()).unwrap();
    let file = file.to_str().unwrap();
    machine.nix("nix", &["store", "sign", "--key-file", file, &path.path]);
}

/// Adds a file that this key alone signed.
fn add_signed(machine: &Machine, name: &str, by: &[&str]) -> Sample {
    let file = machine.folder().join(name);
    fs::write(&file, name.repeat(SMALL_BYTES / name.len())).unwrap();
    let path = machine.nix("nix-store", &["--add", file.to_str().unwrap()]);
    let sample = machine.sample(&path);
    for by in by {
        sign(machine, &sample, by);
    }
    sample
}

/// Sends requests on one connection as somebody whom nobody admitted; `None` when there is no session.
async fn ask_all(server: &Machine, requests: &[String]) -> Option<Vec<u8>> {
    let stranger = Identity::from_seed(&[77; 32]);
    let expected = Identity::load_or_create(&server.state().join("identity")).unwrap();
    let connector = tls::stranger(&stranger, GENEROUS).unwrap();
    let address = SocketAddr::from((server.address, TRANSFER_PORT));
    let mut stream = connector.connect(address, expected.peer_id()).await.ok()?;
    let (last, first) = requests.split_last().unwrap();
    let first = first.iter().map(|request| format!("{request}\r\n"));
    let text = first.collect::<String>() + last + "Connection: close\r\n\r\n";
    stream.write_all(text.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.ok()?;
    Some(answer)
}

fn request(method: &str, target: &str, headers: &str) -> String {
    format!("{method} {target} HTTP/1.1\r\nHost: x\r\n{headers}")
}

async fn get(server: &Machine, target: &str) -> Option<Vec<u8>> {
    ask_all(server, &[request("GET", target, "")]).await
}

/// Everything that might tell one path from another.
fn questions(hash: &str) -> Vec<String> {
    let mut questions = Vec::new();
    for target in [
        "/@.narinfo",
        "/@.narinfo?json",
        "/@.ls",
        "/nar/@.nar",
        "/serve/@",
    ] {
        for (method, headers) in [("GET", ""), ("HEAD", ""), ("GET", "Range: bytes=10-\r\n")] {
            questions.push(request(method, &target.replace('@', hash), headers));
        }
    }
    questions
}

/// The lines of an answer, without the time of day.
fn timeless(answer: &[u8]) -> String {
    let answer = String::from_utf8_lossy(answer);
    let lines = answer.lines().filter(|line| !line.starts_with("date:"));
    lines.collect::<Vec<_>>().join("\n")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_get_what_a_public_key_signed_and_learn_of_nothing_else() {
    let mut desktop = Machine::new();
    desktop.equip();
    let public_key = key("public-cache").public_key();
    desktop.extra = format!(
        "[share]\ndeny = [\"^private-\"]\npublic = true\npublic-keys = [\"{public_key}\"]\n"
    );
    let public = add_signed(&desktop, "public", &["public-cache"]);
    // What the private key of the mesh's anchor (test-1) says of it is nobody's business.
    let both = add_signed(&desktop, "both", &["test-1", "public-cache"]);
    let private = add_signed(&desktop, "team", &["test-1"]);
    let unsigned = add_signed(&desktop, "unsigned", &[]);
    let hidden = add_signed(&desktop, "hidden", &["public-cache"]);
    let denied = add_signed(&desktop, "private-x", &["public-cache"]);
    let (derivation, built) = desktop.build(
        "derivation { name = \"built\"; system = builtins.currentSystem; builder = \"/bin/sh\"; args = [ \"-c\" \"echo x >$out\" ]; }",
    );
    let built = desktop.sample(&built);
    let derivation = desktop.sample(&derivation);
    // Signed under the public key's name, by another one.
    let forged = add_signed(&desktop, "forged", &[]);
    let liar = desktop.folder().join("liar");
    let name = "public-cache".parse().unwrap();
    let other = granary_protocol::signature::SecretKey::from_seed(name, [99; 32]);
    fs::write(&liar, other.to_nix_string().as_bytes()).unwrap();
    desktop.nix(
        "nix",
        &[
            "store",
            "sign",
            "--key-file",
            liar.to_str().unwrap(),
            &forged.path,
        ],
    );
    fs::create_dir_all(desktop.state()).unwrap();
    fs::write(desktop.state().join("hidden"), format!("{}\n", hidden.hash)).unwrap();
    desktop.start().await;
    // The port opens with the mesh.
    crate::machine::until("the mesh is joined", || {
        let health = desktop.get("/health").body;
        String::from_utf8_lossy(&health).contains("\"mesh\":\"joined\"")
    });

    for path in [&public, &both] {
        let narinfo = get(&desktop, &path.narinfo()).await.unwrap();
        let narinfo = timeless(&narinfo);
        assert!(narinfo.starts_with("HTTP/1.1 200"), "{narinfo}");
        let signatures = narinfo.lines().filter(|line| line.starts_with("Sig: "));
        let signatures: Vec<_> = signatures.collect();
        assert_eq!(signatures.len(), 1, "{narinfo}");
        assert!(signatures[0].starts_with("Sig: public-cache:"), "{narinfo}");
        assert!(!narinfo.contains("Deriver"), "{narinfo}");
        let nar = get(&desktop, &path.short()).await.unwrap();
        assert!(nar.ends_with(&path.nar) && nar.starts_with(b"HTTP/1.1 200"));
    }
    let of_absent = timeless(&ask_all(&desktop, &questions(ABSENT)).await.unwrap());
    let refusals = of_absent.matches("HTTP/1.1 404").count();
    assert_eq!(refusals, questions(ABSENT).len());
    for (what, path) in [
        ("private", &private),
        ("unsigned", &unsigned),
        ("hidden", &hidden),
        ("denied", &denied),
        ("built", &built),
        ("derivation", &derivation),
        ("forged", &forged),
    ] {
        assert_eq!(desktop.get(&path.narinfo()).status, 200, "{what}");
        let of_private = ask_all(&desktop, &questions(&path.hash)).await.unwrap();
        assert_eq!(timeless(&of_private), of_absent, "{what}");
    }
    for target in ["/", "/metrics", "/api/v1/status", "/health"] {
        let answer = timeless(&get(&desktop, target).await.unwrap());
        assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    }
    // Nothing of it leads to the members' own service.
    assert_eq!(desktop.status().peers.len(), 0);
    desktop.stop().await;

    desktop.extra = desktop.extra.replace("public = true", "public = false");
    desktop.start().await;
    crate::machine::until("the mesh is joined", || {
        let health = desktop.get("/health").body;
        String::from_utf8_lossy(&health).contains("\"mesh\":\"joined\"")
    });
    assert!(get(&desktop, &public.narinfo()).await.is_none());
    desktop.stop().await;
}
