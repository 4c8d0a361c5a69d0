# The promises that a user cares about, on virtual machines and in Nix's own words. They want KVM:
# `nix build .#checks.x86_64-linux.two-peers`. Keys here are for these machines alone.
{ pkgs }:

let
  meshSecret = "test-mesh:CcNT0JvoLTkSXY+qgz6zNePyKgDqFOgPsz8Sa8GMhTjiU/a4zTcO8hzbVpRMXoNMzTxoBJiYMD5v3dTIQu7Ucg==";
  meshKey = "test-mesh:4lP2uM03DvIc21aUTF6DTM08aASYmDA+b93UyELu1HI=";
  signSecret = "test-1:qx1/IFVOs5GP8TLn58iXf7NlLX78Qa31p6jN+5PtgYu7nXbikg8wLPzzxJgvNAnmss+5KHvqnlYpMenCE6z5pw==";
  signKey = "test-1:u5124pIPMCz888SYLzQJ5rLPuSh76p5WKTHpwhOs+ac=";

  peer = {
    imports = [ ../node.nix ];
    environment.etc."mesh.key" = {
      text = meshSecret;
      mode = "0600";
    };
    nix.settings = {
      secret-key-files = [ "${pkgs.writeText "sign" signSecret}" ];
      substituters = pkgs.lib.mkForce [ "http://127.0.0.1:4726" ];
      experimental-features = [
        "nix-command"
        "flakes"
      ];
    };
    services.granary = {
      enable = true;
      openFirewall = true;
      settings.mesh.key = meshKey;
      settings.trust.keys = [ signKey ];
    };
  };

  anchor = {
    imports = [ ../anchor.nix ];
    services.granary-anchor = {
      enable = true;
      openFirewall = true;
    };
  };

  # Helpers of the scripts: a member is admitted on the machine itself, which has the mesh key.
  prelude = ''
    def admit(machine):
        machine.wait_for_unit("granary.service")
        peer = machine.succeed("sudo -u granary granary identity --state-dir /var/lib/granary").strip()
        machine.succeed(f"granary mesh admit {peer} --key-file /etc/mesh.key --out /var/lib/granary/certificate --name {machine.name}")
        machine.succeed("chown granary: /var/lib/granary/certificate")

    def build(machine, name, text="made here"):
        expression = f'derivation {{ name = "{name}"; system = builtins.currentSystem; builder = "/bin/sh"; args = ["-c" "echo {text} > $out"]; }}'
        return machine.succeed(f"nix-build --no-out-link --expr '{expression}'").strip()

    def linked(machine, number):
        machine.wait_until_succeeds(f"granary status --json | grep -c '\"state\": \"linked\"' | grep -qx {number}", timeout=60)
  '';

  test = name: nodes: script: pkgs.testers.runNixOSTest {
    inherit name nodes;
    skipTypeCheck = true;
    testScript = prelude + script;
  };
in
{
  two-peers = test "two-peers" { desk = peer; laptop = peer; } ''
    start_all()
    admit(desk)
    admit(laptop)
    linked(desk, 1)
    path = build(desk, "built-on-desk")
    laptop.wait_until_succeeds(f"nix-store -r {path}", timeout=30)
    assert laptop.succeed(f"cat {path}") == "made here\n"
    # What Nix asks while the node restarts waits instead of failing.
    laptop.succeed("systemctl restart granary & curl --fail --silent --max-time 20 http://127.0.0.1:4726/nix-cache-info; wait")
  '';

  no-peers = test "no-peers" { alone = peer; } ''
    alone.wait_for_unit("granary.service")
    build(alone, "built-alone")
    alone.succeed("systemctl stop granary.service granary.socket")
    build(alone, "built-without-granary")
  '';

  corrupt-peer = test "corrupt-peer" { desk = peer; laptop = peer; } ''
    start_all()
    admit(desk)
    admit(laptop)
    linked(laptop, 1)
    path = build(desk, "to-be-corrupted")
    desk.succeed(f"mount -o remount,rw /nix/store; chmod u+w {path}; echo lies!!!!! > {path}")
    laptop.fail(f"nix-store -r {path}")
    laptop.fail(f"test -e {path}")
  '';

  sleep-wake = test "sleep-wake" { desk = peer; laptop = peer; } ''
    start_all()
    admit(desk)
    admit(laptop)
    linked(laptop, 1)
    laptop.succeed("systemctl kill --signal=STOP granary.service")
    path = build(desk, "built-meanwhile")
    laptop.succeed("systemctl kill --signal=CONT granary.service")
    laptop.wait_until_succeeds(f"nix-store -r {path}", timeout=30)
  '';

  anchor-s3 =
    test "anchor-s3"
      {
        nas = {
          imports = [ anchor ];
          services.minio = {
            enable = true;
            listenAddress = "127.0.0.1:9000";
            rootCredentialsFile = pkgs.writeText "minio" "MINIO_ROOT_USER=granary\nMINIO_ROOT_PASSWORD=granary-secret\n";
          };
          environment.systemPackages = [ pkgs.minio-client ];
          environment.etc."s3-credentials".text = "aws_access_key_id = granary\naws_secret_access_key = granary-secret\n";
          services.granary-anchor = {
            s3CredentialsFile = "/etc/s3-credentials";
            settings.anchor-server.storage = "s3://granary/home";
            settings.anchor-server.s3 = {
              endpoint = "http://127.0.0.1:9000";
              region = "us-east-1";
            };
          };
        };
        desk = peer;
      }
      ''
        start_all()
        nas.wait_for_open_port(9000)
        nas.succeed("mc alias set local http://127.0.0.1:9000 granary granary-secret && mc mb local/granary")
        nas.succeed("systemctl restart granary-anchor")
        nas.wait_for_open_port(4730)
        token = nas.succeed("granary-anchor token create --subject test --cache main --allow pull,push").strip()
        desk.wait_for_unit("granary.service")
        path = build(desk, "kept")
        desk.succeed(f"umask 077; echo {token} > /root/token")
        desk.succeed(f"granary push http://nas:4730/main {path} --token-file /root/token")
        nas.succeed("rm -rf /var/lib/granary-anchor/anchor/catalog.sqlite*; systemctl stop granary-anchor; granary-anchor anchor rebuild; systemctl start granary-anchor")
        nas.wait_for_open_port(4730)
        desk.succeed(f"curl --fail --silent -H 'Authorization: Bearer {token}' http://nas:4730/main/{path[11:43]}.narinfo")
      '';

  token-denied = test "token-denied" { nas = anchor; desk = peer; } ''
    start_all()
    nas.wait_for_open_port(4730)
    token = nas.succeed("granary-anchor token create --subject test --cache main --allow pull").strip()
    desk.wait_for_unit("granary.service")
    path = build(desk, "not-to-be-pushed")
    desk.succeed(f"umask 077; echo {token} > /root/token")
    desk.fail(f"granary push http://nas:4730/main {path} --token-file /root/token")
    desk.fail(f"curl --fail --silent http://nas:4730/main/{path[11:43]}.narinfo")
  '';
}
