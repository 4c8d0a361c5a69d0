//! A link slower than zstd: NARs travel packed, and nobody but the link can tell.

use std::time::Duration;

use crate::machine::{Lan, Machine};
use crate::process;

const OFFERED: Duration = Duration::from_secs(10);

const NAR_BYTES: usize = 24 << 20;

/// Limits what a machine sends.
fn shape(machine: &Machine, rate: &str) {
    let mut command = machine.namespace.command("tc");
    let rule = format!("qdisc replace dev eth0 root tbf rate {rate} burst 64kb latency 50ms");
    command.args(rule.split_whitespace());
    process::run(&mut command, OFFERED).expect_success();
}

/// NAR bytes that a machine sent packed, and what they took on the wire.
fn packed(machine: &Machine) -> (u64, u64) {
    let text = String::from_utf8(machine.get("/metrics").body).expect("UTF-8");
    let sample = |form: &str| -> u64 {
        let name = format!("granary_packed_bytes_total{{form=\"{form}\"}} ");
        let mut lines = text.lines().filter_map(|line| line.strip_prefix(&name));
        lines.next().expect("a sample").parse().expect("a number")
    };
    (sample("nar"), sample("wire"))
}

/// A folder with numbers in a file, which shrink as texts do, and as much noise as they have bytes.
fn numbers_and_noise() -> String {
    format!(
        r#"derivation {{
          name = "mixed"; system = builtins.currentSystem; builder = "/bin/sh"; PATH = "/usr/bin:/bin";
          args = [ "-e" "-c" ''
            mkdir $out; seq 10000000 99999999 | head -c {NAR_BYTES} >$out/numbers
            head -c {NAR_BYTES} /dev/zero | openssl enc -aes-128-ctr -nosalt -pbkdf2 -pass pass:x >$out/noise
          '' ];
        }}"#
    )
}

#[test]
fn what_shrinks_is_packed_and_what_does_not_is_not() {
    let lan = Lan::new();
    let mut desktop = lan.builder("desktop");
    let mut laptop = lan.machine("laptop");
    let path = desktop.build(&numbers_and_noise());
    shape(&desktop, "100mbit");
    desktop.start();
    laptop.start();
    laptop.wait_linked(&[&desktop]);
    laptop.wait_offered(&path, OFFERED);
    laptop.realise(&path).expect_success();
    laptop.assert_sound();
    assert_eq!(laptop.closure(&path), desktop.closure(&path));

    let (nar, wire) = packed(&desktop);
    println!("{nar} bytes of the nar took {wire}");
    let (half, all) = (NAR_BYTES as u64, 2 * NAR_BYTES as u64);
    assert!(
        nar > half * 8 / 10,
        "{nar} of {half} bytes that shrink were packed"
    );
    assert!(
        nar < half * 13 / 10,
        "{nar} bytes were packed, {half} shrink"
    );
    assert!(wire < nar / 2, "{nar} bytes took {wire}");
    // Counted as the NAR has them, whichever way they came.
    assert!((all..all + 1_000_000).contains(&desktop.status().bytes_sent()));
    assert!((all..all + 1_000_000).contains(&laptop.status().bytes_received()));
}

#[test]
fn a_transfer_goes_on_elsewhere_at_the_same_byte_when_it_was_packed() {
    let lan = Lan::new();
    let mut desktop = lan.builder("desktop");
    let mut tower = lan.machine("tower");
    let mut laptop = lan.machine("laptop");
    let path = desktop.build(&numbers_and_noise());
    desktop.start();
    tower.start();
    tower.wait_linked(&[&desktop]);
    tower.wait_offered(&path, OFFERED);
    tower.realise(&path).expect_success();
    shape(&desktop, "50mbit");
    shape(&tower, "50mbit");
    laptop.start();
    laptop.wait_linked(&[&desktop, &tower]);
    laptop.wait_offered(&path, OFFERED);
    process::wait_for("both offer the path", OFFERED, || {
        let status = laptop.status();
        let offers = |machine: &Machine| status.paths_of(&machine.peer_id);
        match (offers(&desktop), offers(&tower)) {
            (Some(1..), Some(1..)) => Ok(()),
            found => Err(format!("{found:?}")),
        }
    });
    std::thread::scope(|scope| {
        let realised = scope.spawn(|| laptop.realise(&path));
        // Whoever sends is unplugged in the middle of the packed half.
        let (_, sender) = process::wait_for("a packed transfer runs", OFFERED, || {
            for machine in [&desktop, &tower] {
                let (nar, _) = packed(machine);
                if nar > 4 << 20 {
                    return Ok(machine);
                }
            }
            Err("nobody sends".to_owned())
        });
        sender.namespace.cable().pull();
        realised.join().expect("realised").expect_success();
        sender.namespace.cable().plug();
    });
    laptop.assert_sound();
    let sent = [packed(&desktop).0, packed(&tower).0];
    assert!(sent.iter().all(|bytes| *bytes > 1 << 20), "{sent:?}");
    // What was sent and never arrived was sent again, and nothing else.
    let (received, all) = (laptop.status().bytes_received(), 2 * NAR_BYTES as u64);
    assert!((all..all + 1_000_000).contains(&received), "{received}");
}
