//! `granary use`, as Nix itself sees what it did, and as nothing is left of it.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use crate::machine::Machine;

const KEY: &str = "desk-1:2PRfJyUtYp1J5YhTn1gPbTRkoSJpJGeTTYYoVYXUsyI=";

#[test]
fn nix_asks_the_node_first_and_later_has_its_configuration_back() {
    let mut machine = Machine::new();
    machine.extra = format!("[trust]\nkeys = [\"{KEY}\"]\n");
    let ours = format!("http://127.0.0.1:{}", machine.port);
    let included = machine.file("conf/more.conf");
    fs::write(&included, "extra-substituters = https://more.example\n").unwrap();
    let originals = [
        "# nothing yet",
        "sandbox = false\nsubstituters = https://a.example https://b.example # mine\n",
        "substituters = https://a.example\nextra-substituters = https://c.example",
        "!include more.conf\n!include none.conf\nbinary-caches = https://d.example\n",
        "!include more.conf\ntrusted-public-keys = other-1:2PRfJyUtYp1J5YhTn1gPbTRkoSJpJGeTTYYoVYXUsyI=\n",
        "narinfo-cache-negative-ttl = 0\nmax-jobs = 3\n",
    ];
    for original in originals {
        fs::write(machine.nix_conf(), original).unwrap();
        fs::set_permissions(machine.nix_conf(), fs::Permissions::from_mode(0o640)).unwrap();
        let before = machine.settings();
        let others = machine.setting("substituters");
        let printed = machine.run(&["use", "--print"]);
        assert_eq!(fs::read_to_string(machine.nix_conf()).unwrap(), original);
        let said = machine.run(&["use"]);
        assert!(said.contains(&format!("+ extra-trusted-public-keys = {KEY}")));
        let written = fs::read_to_string(machine.nix_conf()).unwrap();
        assert_eq!(written, printed);

        let substituters = machine.setting("substituters");
        assert_eq!(substituters[0], ours, "{original}");
        assert_eq!(substituters[1..], others, "{original}");
        assert!(
            machine
                .setting("trusted-public-keys")
                .contains(&KEY.to_owned())
        );
        let ttl: u64 = machine.setting("narinfo-cache-negative-ttl")[0]
            .parse()
            .unwrap();
        assert!(ttl <= 10, "{original}");
        assert!(machine.run(&["use"]).contains("as it should be"));

        machine.run(&["use", "--undo"]);
        assert_eq!(fs::read_to_string(machine.nix_conf()).unwrap(), original);
        assert_eq!(machine.settings(), before);
        let mode = fs::metadata(machine.nix_conf())
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o640);
    }
    // A setting of a file that is included is added to, and its file left alone.
    fs::write(&included, "substituters = https://more.example\n").unwrap();
    fs::write(machine.nix_conf(), "include more.conf\n").unwrap();
    machine.run(&["use"]);
    assert_eq!(
        machine.setting("substituters"),
        ["https://more.example", &ours]
    );
    machine.run(&["use", "--undo"]);
    // Where there was no file, there is none in the end.
    fs::remove_file(machine.nix_conf()).unwrap();
    machine.run(&["use"]);
    assert_eq!(machine.setting("substituters")[0], ours);
    machine.run(&["use", "--undo"]);
    assert!(!machine.nix_conf().exists());
}

#[test]
fn builds_work_after_leaving_and_hear_nothing_of_the_node() {
    let machine = Machine::new();
    machine.make_store();
    let original = "substituters =\nrequire-sigs = true\n";
    fs::write(machine.nix_conf(), original).unwrap();
    machine.run(&["use"]);
    // The node is gone already, as after the package was removed in the wrong order.
    machine.build("meanwhile");
    machine.run(&["use", "--undo"]);
    assert_eq!(fs::read_to_string(machine.nix_conf()).unwrap(), original);
    let root = machine.path().display().to_string();
    let path = machine.build("afterwards");
    machine.nix("nix-store", &["--check-validity", &path, "--store", &root]);
    assert_eq!(machine.setting("substituters"), [] as [&str; 0]);
}

#[test]
fn a_link_is_kept_and_one_into_the_store_is_left_to_nixos() {
    let machine = Machine::new();
    let real = machine.file("dotfiles.conf");
    fs::write(&real, "max-jobs = 3\n").unwrap();
    symlink(&real, machine.nix_conf()).unwrap();
    machine.run(&["use"]);
    assert!(fs::read_to_string(&real).unwrap().contains("# granary use"));
    machine.run(&["use", "--undo"]);
    assert_eq!(fs::read_to_string(&real).unwrap(), "max-jobs = 3\n");
    assert!(machine.nix_conf().is_symlink());

    let store = machine.file("store");
    fs::create_dir(&store).unwrap();
    let made = store.join("00000000000000000000000000000000-nix.conf");
    fs::write(&made, "max-jobs = 3\n").unwrap();
    fs::remove_file(machine.nix_conf()).unwrap();
    symlink(&made, machine.nix_conf()).unwrap();
    let text = fs::read_to_string(machine.file("granary.toml")).unwrap();
    let text = text.replace(
        "[store]\n",
        &format!("[store]\ndir = \"{}\"\n", store.display()),
    );
    let other = machine.file("other.toml");
    fs::write(&other, text).unwrap();
    let said = machine.run(&["use", "--config", other.to_str().unwrap()]);
    assert!(
        said.contains("nix.settings = {") && said.contains("lib.mkBefore"),
        "{said}"
    );
    assert_eq!(fs::read_to_string(&made).unwrap(), "max-jobs = 3\n");
}

#[test]
fn the_line_with_the_own_key_may_be_included_before_the_machine_is_a_member() {
    let mut machine = Machine::new();
    machine.extra = "[mesh]\nticket-file = \"/nowhere\"\n".into();
    let line = machine.run(&["use", "--key"]);
    assert_eq!(machine.run(&["use", "--key"]), line);
    fs::write(machine.file("conf/key.conf"), &line).unwrap();
    fs::write(machine.nix_conf(), "!include key.conf\n").unwrap();
    let key = line.trim().strip_prefix("extra-trusted-public-keys = ");
    let keys = machine.setting("trusted-public-keys");
    assert!(keys.contains(&key.unwrap().to_owned()), "{keys:?}");
    machine.extra = "[trust]\nmembers = false\n".into();
    assert_eq!(machine.run(&["use", "--key"]), "");
}
