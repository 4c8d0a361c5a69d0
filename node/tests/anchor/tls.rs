//! The anchor behind a certificate: what Nix, curl, a node and `granary push` see of it.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::Ordering;

use futures::StreamExt;
use granary::anchor::tls::Files;
use granary::authority::Authorities;
use granary::binary_cache::{WebCache, WebCaches};
use granary::credential::Credential;
use granary_protocol::mesh::CacheRole;
use granary_protocol::token::Permission::{Pull, Push};
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};

use crate::command::Place;
use crate::pushing::{brittle, push_as, try_push};
use crate::rig::{Machine, Rig, Sample, bearer};

/// An authority of a home, in a folder of its own.
struct Authority {
    folder: tempfile::TempDir,
    certificate: rcgen::Certificate,
    key: KeyPair,
}

impl Authority {
    fn new() -> Authority {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![]).unwrap();
        // Not the name that rcgen gives to every certificate: OpenSSL takes issuer for subject then.
        let name = rcgen::DnType::CommonName;
        params.distinguished_name.push(name, "an authority at home");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = Authority {
            folder: tempfile::tempdir().unwrap(),
            certificate: params.self_signed(&key).unwrap(),
            key,
        };
        std::fs::write(authority.file(), authority.certificate.pem()).unwrap();
        authority
    }

    /// What clients are told to trust.
    fn file(&self) -> PathBuf {
        self.folder.path().join("ca.pem")
    }

    /// Gives this machine a certificate.
    fn certify(&self) -> Files {
        let key = KeyPair::generate().unwrap();
        let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
        let params = CertificateParams::new(names).unwrap();
        let certificate = params.signed_by(&key, &self.certificate, &self.key);
        let files = Files {
            certificate: self.folder.path().join("tls.pem"),
            key: self.folder.path().join("tls.key"),
        };
        std::fs::write(&files.certificate, certificate.unwrap().pem()).unwrap();
        std::fs::write(&files.key, key.serialize_pem()).unwrap();
        let private = std::fs::Permissions::from_mode(0o640);
        std::fs::set_permissions(&files.key, private).unwrap();
        files
    }
}

/// What curl says: `status version body`, or its exit code.
fn curl(ca: Option<&Path>, arguments: &[&str]) -> Result<String, i32> {
    let mut command = Command::new("curl");
    command.args(["--silent", "--noproxy", "*", "--max-time", "30"]);
    command.args(["--write-out", "%{http_code} %{http_version}\\n"]);
    if let Some(ca) = ca {
        command.arg("--cacert").arg(ca);
    }
    let output = command.args(arguments).output().unwrap();
    match output.status.code() {
        Some(0) => Ok(String::from_utf8(output.stdout).unwrap()),
        code => Err(code.unwrap_or(-1)),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_trust_the_authority_speak_http_2_or_1_and_others_turn_away() {
    let authority = Authority::new();
    let rig = Rig::with_tls(authority.certify()).await;
    rig.cache("main", true).await;
    let url = format!("https://localhost:{}", rig.address().port());
    tokio::task::block_in_place(|| {
        let (info, config) = (
            format!("{url}/main/nix-cache-info"),
            format!("{url}/_api/v1/cache-config/main"),
        );
        let ca = authority.file();
        let modern = curl(Some(&ca), &["--http2", &info]).unwrap();
        assert!(
            modern.contains("StoreDir: ") && modern.ends_with("200 2\n"),
            "{modern}"
        );
        let older = curl(Some(&ca), &["--http1.1", &info]).unwrap();
        assert!(older.ends_with("200 1.1\n"), "{older}");
        // Attic's client goes on with the addresses that it is told here.
        for version in ["--http2", "--http1.1"] {
            let told = curl(Some(&ca), &[version, &config]).unwrap();
            assert!(told.contains(&format!("\"{url}/main\"")), "{told}");
        }
        // curl's words for "no authority that I know".
        assert_eq!(curl(None, &[&info]), Err(60));
        // Who speaks in the clear hears what to do, and nothing else.
        let plain = info.replace("https", "http");
        let told = curl(None, &[&plain]).unwrap();
        assert!(
            told.contains("write https:// for http://") && told.ends_with("400 1.1\n"),
            "{told}"
        );
        assert!(!told.contains("StoreDir"), "{told}");
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_by_the_wrong_scheme_is_told_the_right_one() {
    let authority = Authority::new();
    let (secured, plain) = (Rig::with_tls(authority.certify()).await, Rig::new().await);
    let builder = Machine::new(&[]);
    let closure = builder.build();
    for (rig, wrong, hint) in [
        (
            &plain,
            "https",
            "write http:// for https:// in the address of the cache",
        ),
        (
            &secured,
            "http",
            "write https:// for http:// in its address",
        ),
    ] {
        rig.cache("main", false).await;
        let token = rig.token(&[("main", &[Pull, Push])]).await;
        let url = format!("{wrong}://127.0.0.1:{}/main", rig.address().port());
        tokio::task::block_in_place(|| {
            let output = try_push(&builder, &url, &token, &[&closure[2]]);
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(!output.status.success() && said.contains(hint), "{said}");
        });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nix_pushes_and_pulls_over_tls() {
    let authority = Authority::new();
    let rig = Rig::with_tls(authority.certify()).await;
    let key = rig.cache("main", false).await;
    let token = rig.token(&[("main", &[Pull, Push])]).await;
    let (mut builder, mut client) = (Machine::new(&[]), Machine::new(&[&key]));
    let closure = builder.build();
    let url = format!("https://127.0.0.1:{}/main", rig.address().port());
    for machine in [&mut builder, &mut client] {
        machine.login(&token);
        machine.authority = Some(authority.file());
    }
    tokio::task::block_in_place(|| {
        builder.nix("nix", &["copy", "--to", &url, &closure[2]]);
        client.nix("nix", &["copy", "--from", &url, &closure[2]]);
        client.nix("nix", &["store", "verify", "--all"]);
        client.authority = None;
        let once = ["--option", "download-attempts", "1"];
        let copy = ["copy", "--from", &url, &closure[2], "--refresh"];
        let wary = client.try_nix("nix", &[&copy[..], &once].concat());
        assert!(!wary.status.success(), "nix took a stranger's certificate");
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_over_tls_goes_on_where_a_line_broke() {
    use std::io::Read;
    const BYTES: u64 = 40_000_000;
    let authority = Authority::new();
    let rig = Rig::with_tls(authority.certify()).await;
    rig.cache("main", true).await;
    let token = rig.token(&[("main", &[Pull, Push])]).await;
    let machine = Machine::new(&[]);
    let file = machine.folder().join("large");
    let mut source = std::fs::File::open("/dev/urandom").unwrap().take(BYTES);
    std::io::copy(&mut source, &mut std::fs::File::create(&file).unwrap()).unwrap();
    let path = machine.nix("nix-store", &["--add", file.to_str().unwrap()]);
    let (line, carried) = brittle(rig.address(), BYTES / 5);
    let anchor = format!(
        "[[anchor]]\nurl = \"https://localhost:{}/main\"\ntoken-file = \"{}/token\"\nca-file = \"{}\"\n",
        line.port(),
        machine.folder().display(),
        authority.file().display()
    );
    tokio::task::block_in_place(|| {
        let pushed = push_as(&machine, "main", &token, &[&path], &anchor);
        let said = String::from_utf8_lossy(&pushed.stderr);
        assert!(pushed.status.success(), "{said}");
    });
    let carried = carried.load(Ordering::Relaxed);
    assert!(carried < BYTES * 3 / 2, "{carried} bytes for {BYTES}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_asks_an_anchor_whose_authority_it_was_told() {
    let authority = Authority::new();
    let rig = Rig::with_tls(authority.certify()).await;
    rig.cache("main", false).await;
    let token = rig.token(&[("main", &[Pull, Push])]).await;
    let sample = Sample::new(1, 100_000);
    let url = format!("https://localhost:{}", rig.address().port());
    let metadata = sample.metadata("main").to_string();
    let file = authority.folder.path().join("nar");
    std::fs::write(&file, &sample.nar).unwrap();
    tokio::task::block_in_place(|| {
        let upload = curl(
            Some(&authority.file()),
            &[
                "--header",
                &format!("authorization: {}", bearer(&token)),
                "--header",
                &format!("x-attic-nar-info: {metadata}"),
                "--upload-file",
                file.to_str().unwrap(),
                &format!("{url}/_api/v1/upload-path"),
            ],
        );
        let upload = upload.unwrap();
        assert!(upload.contains("Uploaded"), "{upload}");
    });
    let caches = |authorities: Authorities| {
        let cache = WebCache {
            role: CacheRole::Anchor,
            url: format!("{url}/main").parse().unwrap(),
            credential: Credential::fixed(&token).unwrap(),
            authorities,
        };
        WebCaches::new(vec![cache], None).unwrap()
    };
    let hashes = vec![sample.hash().parse().unwrap()];
    let told = caches(Authorities::read(Some(&authority.file())).unwrap());
    let answers: Vec<_> = told.narinfos(0, hashes.clone()).collect().await;
    assert!(answers[0].narinfo.as_ref().unwrap().contains(&sample.path));
    let untold = caches(Authorities::default());
    let answers: Vec<_> = untold.narinfos(0, hashes).collect().await;
    assert!(answers.is_empty(), "{answers:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_reaches_an_anchor_behind_tls_by_its_side_door() {
    let authority = Authority::new();
    let files = authority.certify();
    let place = Place::with(&format!(
        "tls-cert = \"{}\"\ntls-key = \"{}\"\n",
        files.certificate.display(),
        files.key.display()
    ));
    let anchor = place.start();
    tokio::task::block_in_place(|| {
        let url = format!("https://127.0.0.1:{}/health", anchor.address.port());
        let health = curl(Some(&authority.file()), &[&url]).unwrap();
        assert!(health.contains("ok"), "{health}");
        assert!(place.run(&["gc"]).contains("deleted 0 nars"));
        let keys = place.run(&["cache", "rotate-key", "main"]);
        assert_eq!(keys.lines().count(), 2, "{keys}");
        let info = place.run(&["cache", "info", "main"]);
        assert!(info.contains("https://<this machine>:"), "{info}");
    });
}
