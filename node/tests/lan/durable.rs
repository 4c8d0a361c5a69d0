//! What an anchor is for: builds outlive the machine that made them, and the anchor's own memory.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::anchor::{Anchor, PORT};
use crate::http::{self, Reading};
use crate::machine::{Lan, SUBSTITUTER_PORT};
use crate::process::wait_for;
use crate::proxy::{Fault, Then};
use crate::s3::S3;

/// Where an anchor listens that has something before its port.
const BEHIND: u16 = 4731;

const DEADLINE: Duration = Duration::from_secs(30);
/// How long what was taken out of a cache may be told of.
const WITHDRAWN: Duration = Duration::from_secs(60);
/// What a build may take to the anchor.
const PUSHED: Duration = Duration::from_secs(10);

/// An expression for a path that nothing compresses.
pub fn noise(name: &str, bytes: u64) -> String {
    format!(
        r#"derivation {{
          name = "{name}"; system = builtins.currentSystem; builder = "/bin/sh"; PATH = "/usr/bin:/bin";
          args = [ "-e" "-c" "mkdir $out; head -c {bytes} /dev/urandom >$out/content" ];
        }}"#
    )
}

#[test]
fn a_build_outlives_its_machine_and_the_state_of_the_anchor() {
    let lan = Lan::new();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime");
    let mut anchor = Anchor::new(&lan, "nas", "");
    let bind = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind");
    let listener = anchor.namespace.inside(bind);
    let s3 = runtime.block_on(async { S3::on(listener) });
    anchor.settings = format!(
        "listen = \"0.0.0.0:{PORT}\"\nstorage = \"s3://granary-test/anchor\"\n\
         [anchor-server.s3]\nendpoint = {:?}\nregion = \"us-east-1\"\ncredentials-file = {:?}\n",
        s3.endpoint(),
        s3.options().credentials_file.expect("a file"),
    );
    anchor.start();
    let key = anchor.run(&["cache", "create", "team", "--public"]);
    let token = anchor.token();

    // Nothing signs what this machine builds.
    let mut desk = lan.machine("desk");
    desk.settings.extra = format!(
        "{}[upload]\ncache = \"team\"\n",
        anchor.table(&desk, &token)
    );
    desk.start();
    let path = desk.build(&noise("durable", 3_000_000));
    let hash = &path["/nix/store/".len()..][..32];
    let target = format!("/team/{hash}.narinfo");
    let (elapsed, narinfo) = wait_for("the build at the anchor", PUSHED, || {
        let answer = anchor.get(&target).map_err(|error| error.to_string())?;
        match answer.status {
            200 => Ok(answer),
            status => Err(format!("status {status}")),
        }
    });
    println!("at the anchor after {elapsed:.1?}");
    assert!(
        narinfo
            .line("Sig")
            .expect("a signature")
            .starts_with("team-1:")
    );
    drop(desk);

    let mut laptop = lan.believer("laptop", &key);
    laptop.settings.extra = anchor.table(&laptop, &token);
    laptop.start();
    laptop.wait_offered(&path, DEADLINE);
    laptop.realise(&path).expect_success();
    laptop.assert_sound();

    anchor.kill();
    fs::remove_dir_all(anchor.state()).expect("lose the state");
    let said = anchor.run(&["anchor", "rebuild"]);
    assert!(said.contains("1 cache with 1 path"), "{said}");
    anchor.start();
    laptop.delete(&path);
    assert!(!laptop.is_valid(&path));
    // The cache is public: the old token, whose key is lost, would be refused.
    let address = anchor.namespace.address;
    laptop.stop();
    laptop.settings.extra = format!("[[anchor]]\nurl = \"http://{address}:{PORT}/team\"\n");
    laptop.start();
    laptop.wait_offered(&path, DEADLINE);
    laptop.realise(&path).expect_success();
    laptop.assert_sound();
}

#[test]
fn what_is_taken_out_of_an_anchor_is_gone_within_a_minute_for_who_asks_it() {
    let lan = Lan::new();
    let mut anchor = Anchor::new(&lan, "nas", "");
    anchor.start();
    let key = anchor.run(&["cache", "create", "team"]);
    let token = anchor.token();
    let mut desk = lan.machine("desk");
    let path = desk.build(&noise("withdrawn", 10_000));
    desk.settings.extra = anchor.table(&desk, &token);
    desk.granary(&["push", "team", &path]).expect_success();
    drop(desk);
    let mut laptop = lan.believer("laptop", &key);
    laptop.settings.extra = anchor.table(&laptop, &token);
    laptop.start();
    laptop.wait_offered(&path, DEADLINE);
    anchor.run(&["rm", "team", &path]);
    let elapsed = laptop.wait_gone(&path, WITHDRAWN);
    println!("gone after {elapsed:.1?}");
}

#[test]
fn an_anchor_that_is_killed_in_the_middle_of_a_nar_is_followed_by_another() {
    const BYTES: u64 = 24_000_000;
    let lan = Lan::new();
    let fault = Fault::default();
    let behind = SocketAddr::from((Ipv4Addr::LOCALHOST, BEHIND));
    let settings = format!("listen = \"{behind}\"\n");
    let mut builder = lan.machine("builder");
    let path = builder.build(&noise("large", BYTES));
    let mut anchors = ["nas", "vps"].map(|name| Anchor::new(&lan, name, &settings));
    let mut tables = String::new();
    let mut keys = Vec::new();
    for (number, anchor) in anchors.iter_mut().enumerate() {
        let before = SocketAddr::from((anchor.namespace.address, PORT));
        fault.stand_before(number, &anchor.namespace, before, behind);
        anchor.start();
        keys.push(anchor.run(&["cache", "create", "team", "--public"]));
        let table = anchor.table(&builder, &anchor.token());
        builder.settings.extra = table.clone();
        builder.granary(&["push", "team", &path]).expect_success();
        tables.push_str(&table);
    }
    drop(builder);
    let mut laptop = lan.believer("laptop", &keys[0]);
    laptop.settings.trusted_keys = keys;
    laptop.settings.extra = tables;
    laptop.start();
    laptop.wait_offered(&path, DEADLINE);
    let pids = anchors.each_ref().map(|anchor| {
        let process = anchor.process.as_ref().expect("it runs");
        Pid::from_child(process)
    });
    let kill = move |number: usize| kill_process(pids[number], Signal::KILL).expect("kill");
    fault.arm(BYTES / 2, Then::Close, Box::new(kill));

    let narinfo = laptop.narinfo(&path);
    let url = narinfo.line("URL").expect("a URL");
    let endpoint = SocketAddr::from((Ipv4Addr::LOCALHOST, SUBSTITUTER_PORT));
    let read = || http::read(endpoint, &format!("/{url}")).expect("an answer");
    let Reading {
        status,
        bytes,
        nar_hash,
        ..
    } = laptop.namespace.inside(read);
    assert!(fault.befallen().is_some());
    assert_eq!(status, 200);
    assert_eq!(Some(bytes.to_string()), narinfo.line("NarSize"));
    assert_eq!(Some(nar_hash), narinfo.line("NarHash"));
}
