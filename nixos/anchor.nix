# An anchor: durable storage of caches, signed centrally, served to any Nix.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  inherit (lib)
    mkEnableOption
    mkIf
    mkOption
    types
    ;
  cfg = config.services.granary-anchor;
  toml = import ./toml.nix { inherit lib; };
  credential = name: "/run/credentials/granary-anchor.service/${name}";

  server = cfg.settings.anchor-server;
  mesh = cfg.settings.mesh or { };
  port = address: lib.toInt (lib.last (lib.splitString ":" address));
  isTcp = address: !(lib.hasPrefix "unix:" address);
  ports = addresses: lib.unique (map port (builtins.filter isTcp (lib.toList addresses)));
  # As the binary has them where they are not given.
  meshPorts = ports (mesh.listen or "0.0.0.0:4727") ++ ports (mesh.transfer or "0.0.0.0:4728");
  ownPorts = meshPorts ++ ports (cfg.settings.substituter.listen or "127.0.0.1:4726");
  node = config.services.granary.settings;
  nodePorts = ports node.mesh.listen ++ ports node.mesh.transfer ++ ports node.substituter.listen;
  isBesideNode = config.services.granary.enable or false;

  settings = cfg.settings // {
    anchor-server = server // {
      attic-token-key-file =
        if cfg.atticTokenKeyFile != null then credential "attic-token-key" else server.attic-token-key-file or null;
    };
  };
  text = toml.toToml settings;

  checked = pkgs.runCommand "granary-anchor.toml" {
    inherit text;
    passAsFile = [ "text" ];
  } ''
    ${
      if cfg.checkConfig then "${cfg.package}/bin/granary check-config --offline \"$textPath\"" else ""
    }
    cp "$textPath" "$out"
  '';

  folder = lib.optional (server.storage != null && lib.hasPrefix "file://" server.storage) (
    lib.removePrefix "file://" server.storage
  );
  secrets =
    lib.optional (cfg.s3CredentialsFile != null) "s3:${cfg.s3CredentialsFile}"
    ++ lib.optional (cfg.ticketFile != null) "ticket:${cfg.ticketFile}"
    ++ lib.optional (cfg.atticTokenKeyFile != null) "attic-token-key:${cfg.atticTokenKeyFile}"
    ++ lib.mapAttrsToList (cache: file: "cache-${cache}:${file}") cfg.signingKeyFiles;

  # Administration runs beside the anchor, as its user and with its secrets.
  administration = pkgs.writeShellScriptBin "granary-anchor" ''
    exec systemd-run --quiet --pipe --wait --collect --service-type=exec \
      --uid=granary-anchor --gid=granary-anchor \
      --property=StateDirectory=granary-anchor --property=UMask=0077 \
      ${lib.concatMapStringsSep " " (secret: "--property=LoadCredential=${secret}") secrets} \
      --setenv=GRANARY_CONFIG=${checked} \
      ${cfg.package}/bin/granary "$@"
  '';
in
{
  options.services.granary-anchor = {
    enable = mkEnableOption "Granary's anchor, which keeps builds for good";

    package = mkOption {
      type = types.package;
      default = pkgs.callPackage ./package.nix { };
      defaultText = lib.literalExpression "pkgs.callPackage ./package.nix { }";
      description = "The package that has `bin/granary`.";
    };

    openFirewall = mkOption {
      type = types.bool;
      default = false;
      description = ''
        Whether others may reach the anchor's port, and those of the mesh where it is a member (TCP 4727 and 4728, UDP
        5353 for mDNS). Off where a reverse proxy stands before it.
      '';
    };

    checkConfig = mkOption {
      type = types.bool;
      default = true;
      description = "Whether `granary check-config` proves the settings when the system is built.";
    };

    s3CredentialsFile = mkOption {
      type = types.nullOr types.str;
      default = null;
      example = "/run/agenix/granary-s3";
      description = ''
        A file with `aws_access_key_id = …` and `aws_secret_access_key = …`; not a path in the Nix store.
        systemd reads it as root and shows it to the anchor alone.
      '';
    };

    ticketFile = mkOption {
      type = types.nullOr types.str;
      default = null;
      example = "/run/agenix/granary-ticket";
      description = ''
        A file on this machine that holds a ticket (`granary mesh ticket`), with which the anchor joins a mesh at the
        first start, to share with its members what public caches hold; not a path in the Nix store. systemd reads it
        as root and shows it to the anchor alone.
      '';
    };

    atticTokenKeyFile = mkOption {
      type = types.nullOr types.str;
      default = null;
      example = "/run/agenix/attic-token-key";
      description = ''
        A file with the key that proves tokens made by atticd: `hs256:<base64>`, or an RSA public key (PEM).
      '';
    };

    signingKeyFiles = mkOption {
      type = types.attrsOf types.str;
      default = { };
      example = {
        main = "/run/agenix/main-signing-key";
      };
      description = ''
        Signing keys of caches in Nix's format, by cache. The anchor makes and keeps those of other caches
        itself, in its state folder.
      '';
    };

    settings = mkOption {
      default = { };
      description = ''
        What stands in `/etc/granary/anchor.toml`. Every key of the manual may be given; those that are not
        listed here are checked when the system is built.
      '';
      type = types.submodule {
        freeformType = toml.type;
        options = {
          state-dir = mkOption {
            type = types.str;
            default = "/var/lib/granary-anchor";
            description = "Where the catalog, keys and uploads under way are. systemd makes the default.";
          };
          anchor-server.listen = mkOption {
            type = types.str;
            default = "0.0.0.0:4730";
            description = "Where the anchor answers: `ip:port`.";
          };
          anchor-server.storage = mkOption {
            type = types.nullOr types.str;
            default = null;
            example = "s3://granary/home";
            description = ''
              Where builds are kept: `file:///folder` or `s3://bucket/prefix`. `null` is `storage` in the state
              folder. A folder elsewhere must belong to the user `granary-anchor`.
            '';
          };
          anchor-server.default-cache = mkOption {
            type = types.str;
            default = "main";
            description = "A cache that is made at the first start; empty for none.";
          };
          anchor-server.member = mkOption {
            type = types.bool;
            default = cfg.ticketFile != null;
            defaultText = lib.literalExpression "ticketFile != null";
            description = "Whether the anchor is a member of a mesh. Beside a node on the same machine it needs other ports.";
          };
          anchor-server.s3.endpoint = mkOption {
            type = types.nullOr types.str;
            default = null;
            example = "http://127.0.0.1:3900";
            description = "The S3 server; AWS when `null`.";
          };
          anchor-server.s3.region = mkOption {
            type = types.nullOr types.str;
            default = null;
            example = "garage";
            description = "The region's name.";
          };
        };
      };
    };
  };

  config = mkIf cfg.enable {
    assertions = [
      {
        assertion = lib.all (secret: builtins.match "[^:]*:/nix/store/.*" secret == null) secrets;
        message = "services.granary-anchor has a secret in the Nix store, where everybody may read it.";
      }
      {
        assertion = !(server.member && isBesideNode) || lib.all (own: !(builtins.elem own nodePorts)) ownPorts;
        message = "services.granary-anchor is to be a member beside services.granary, on the same ports: set mesh.listen, mesh.transfer and substituter.listen in its settings.";
      }
    ];

    environment.systemPackages = [
      cfg.package
      administration
    ];
    environment.etc."granary/anchor.toml".source = checked;

    users.users.granary-anchor = {
      isSystemUser = true;
      group = "granary-anchor";
      description = "Granary anchor";
    };
    users.groups.granary-anchor = { };

    systemd.services.granary-anchor = {
      description = "Granary anchor";
      documentation = [ "man:granary(1)" ];
      wantedBy = [ "multi-user.target" ];
      wants = [ "network-online.target" ];
      after = [ "network-online.target" ];
      restartTriggers = [ checked ];
      serviceConfig = import ./unit.nix // {
        Type = "exec";
        ExecStart = "${cfg.package}/bin/granary anchor --config ${checked}";
        User = "granary-anchor";
        Group = "granary-anchor";
        StateDirectory = "granary-anchor";
        StateDirectoryMode = "0700";
        ReadWritePaths = folder;
        LoadCredential = secrets;
        Restart = "always";
        RestartSec = 2;
        TimeoutStopSec = 30;
      };
    };

    networking.firewall.allowedTCPPorts = mkIf cfg.openFirewall (
      [ (port server.listen) ] ++ (if server.member then meshPorts else [ ])
    );
    networking.firewall.allowedUDPPorts = mkIf (cfg.openFirewall && server.member && (mesh.mdns or true)) [ 5353 ];
  };
}
