# A node: the substituter that Nix asks first, and its part of the mesh.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  inherit (lib)
    mkDefault
    mkEnableOption
    mkIf
    mkOption
    types
    ;
  cfg = config.services.granary;
  toml = import ./toml.nix { inherit lib; };

  port = address: lib.toInt (lib.last (lib.splitString ":" address));
  ports = addresses: lib.unique (map port addresses);
  isTcp = address: !(lib.hasPrefix "unix:" address);
  endpoints = lib.toList cfg.settings.substituter.listen;

  # A secret is named by the path under which systemd shows it to the unit alone.
  credential = name: "/run/credentials/granary.service/${name}";
  tokenName = position: "anchor-${toString position}";
  numbered = lib.imap0 (position: anchor: { inherit position anchor; }) cfg.anchors;

  settings = cfg.settings // {
    share =
      cfg.settings.share
      // (if cfg.share.tokenFile != null then { http-token-file = credential "share-token"; } else { })
      // (
        if cfg.share.signKeyFile != null then { http-sign-key-file = credential "share-key"; } else { }
      );
    mesh =
      cfg.settings.mesh
      // (if cfg.ticketFile != null then { ticket-file = credential "ticket"; } else { });
    anchor =
      map (
        { position, anchor }:
        {
          url = anchor.url;
          public-keys = anchor.publicKeys;
          token-file = if anchor.tokenFile == null then null else credential (tokenName position);
        }
      ) numbered
      ++ (cfg.settings.anchor or [ ]);
  };
  text = toml.toToml settings;

  checked = pkgs.runCommand "granary.toml" {
    inherit text;
    passAsFile = [ "text" ];
  } ''
    ${
      if cfg.checkConfig then "${cfg.package}/bin/granary check-config --offline \"$textPath\"" else ""
    }
    cp "$textPath" "$out"
  '';

  trustsMembers = cfg.nix.enable && cfg.settings.trust.members;
  # Where Nix finds the key that is this machine's own.
  keyFile = "/run/granary-keys/nix.conf";
  writeKey = pkgs.writeShellScript "granary-keys" ''
    set -eu
    ${cfg.package}/bin/granary use --key --config ${checked} > ${keyFile}.new
    ${pkgs.coreutils}/bin/chmod 0644 ${keyFile}.new
    ${pkgs.coreutils}/bin/mv ${keyFile}.new ${keyFile}
  '';
in
{
  options.services.granary = {
    enable = mkEnableOption "Granary, which shares Nix builds with the machines around";

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
        Whether peers may reach this machine: the ports of `settings.mesh.listen` and
        `settings.mesh.transfer` (TCP), and 5353 (UDP) for mDNS; machines without Granary as well, where
        `settings.share.http` is set.
      '';
    };

    share = {
      tokenFile = mkOption {
        type = types.nullOr types.str;
        default = null;
        example = "/run/agenix/granary-share-token";
        description = ''
          A file on this machine that holds the token which machines without Granary must show at
          `settings.share.http`; not a path in the Nix store. systemd reads it as root and shows it to the node alone.
        '';
      };
      signKeyFile = mkOption {
        type = types.nullOr types.str;
        default = null;
        example = "/run/agenix/granary-share-key";
        description = ''
          A file on this machine that holds the secret key (`nix-store --generate-binary-cache-key`) which signs what
          they are given; not a path in the Nix store.
        '';
      };
    };

    ticketFile = mkOption {
      type = types.nullOr types.str;
      default = null;
      example = "/run/agenix/granary-ticket";
      description = ''
        A file on this machine that holds a ticket (`granary mesh ticket`), with which the node joins its mesh at
        the first start; not a path in the Nix store. systemd reads it as root and shows it to the node alone.
        `settings.mesh.key` need not be given then.
      '';
    };

    checkConfig = mkOption {
      type = types.bool;
      default = true;
      description = ''
        Whether `granary check-config` proves the settings when the system is built. Turn it off where the
        package cannot run on the machine that builds.
      '';
    };

    nix = {
      enable = mkOption {
        type = types.bool;
        default = true;
        description = ''
          Whether the Nix of this machine asks the node before other substituters, and trusts the keys of
          `settings.trust.keys` and of `anchors`.
        '';
      };

      negativeTtl = mkOption {
        type = types.ints.unsigned;
        default = 10;
        description = ''
          Seconds for which Nix remembers that nobody had a path (`narinfo-cache-negative-ttl`). Its own
          default, an hour, hides what a neighbour built meanwhile.
        '';
      };
    };

    anchors = mkOption {
      default = [ ];
      description = "Binary caches of your own, asked when no peer has a path, in this order.";
      type = types.listOf (
        types.submodule {
          options = {
            url = mkOption {
              type = types.str;
              example = "https://nas.example:4730/main";
              description = "Where the cache's `nix-cache-info` is, without it.";
            };
            tokenFile = mkOption {
              type = types.nullOr types.str;
              default = null;
              example = "/run/agenix/granary-token";
              description = ''
                A file on this machine that holds the token for the cache; not a path in the Nix store. A member whose
                certificate allows `push:<cache>` needs none.
                systemd reads it as root and shows it to the node alone.
              '';
            };
            publicKeys = mkOption {
              type = types.listOf types.str;
              default = [ ];
              example = [ "main-1:…" ];
              description = "Keys that the cache signs with.";
            };
          };
        }
      );
    };

    settings = mkOption {
      default = { };
      description = ''
        What stands in `/etc/granary/granary.toml`. Every key of the manual may be given; those that are not
        listed here are checked when the system is built.
      '';
      type = types.submodule {
        freeformType = toml.type;
        options = {
          state-dir = mkOption {
            type = types.str;
            default = "/var/lib/granary";
            description = "Where the node keeps its identity and its index. systemd makes the default.";
          };
          substituter.listen = mkOption {
            type = types.either types.str (types.listOf types.str);
            default = "127.0.0.1:4726";
            description = "Where Nix asks: `ip:port`, `unix:/path`, or a list of those. systemd holds the sockets.";
          };
          substituter.priority = mkOption {
            type = types.int;
            default = 10;
            description = "Lower is asked first; cache.nixos.org has 40.";
          };
          mesh.key = mkOption {
            type = types.nullOr types.str;
            default = null;
            example = "granary-mesh:…";
            description = "Public half of the mesh key; without it the node serves this machine alone.";
          };
          mesh.listen = mkOption {
            type = types.listOf types.str;
            default = [
              "0.0.0.0:4727"
              "[::]:4727"
            ];
            description = "Where peers talk to this node.";
          };
          mesh.transfer = mkOption {
            type = types.listOf types.str;
            default = [
              "0.0.0.0:4728"
              "[::]:4728"
            ];
            description = "Where peers fetch from this node.";
          };
          mesh.mdns = mkOption {
            type = types.bool;
            default = true;
            description = "Whether peers are found by multicast DNS.";
          };
          mesh.peers = mkOption {
            type = types.listOf types.str;
            default = [ ];
            example = [ "desk.lan:4727" ];
            description = "`host:port` of nodes to find where multicast does not reach.";
          };
          share.enable = mkOption {
            type = types.bool;
            default = true;
            description = "Whether peers may fetch from this machine.";
          };
          share.deny = mkOption {
            type = types.listOf types.str;
            default = [ ];
            example = [ "^secret-" ];
            description = "Regular expressions; a path whose name matches one stays here.";
          };
          share.http = mkOption {
            type = types.either types.str (types.listOf types.str);
            default = [ ];
            example = "0.0.0.0:4729";
            description = "Where machines without Granary read what is shared, over plain HTTP; nowhere by default.";
          };
          trust.keys = mkOption {
            type = types.listOf types.str;
            default = [ "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=" ];
            description = "Public keys in Nix's format: what one of them signed is passed on to Nix.";
          };
          trust.members = mkOption {
            type = types.bool;
            default = true;
            description = "Whether what members built that may vouch is passed on to Nix, signed by a key of this machine's own.";
          };
          upstream = mkOption {
            default = [ ];
            description = "Other binary caches, asked after peers and anchors.";
            type = types.listOf (
              types.submodule {
                freeformType = toml.type;
                options.url = mkOption {
                  type = types.str;
                  example = "https://cache.nixos.org";
                  description = "Where the cache's `nix-cache-info` is, without it.";
                };
              }
            );
          };
        };
      };
    };
  };

  config = mkIf cfg.enable {
    assertions = [
      {
        assertion = !cfg.nix.enable || lib.any isTcp endpoints;
        message = "services.granary.settings.substituter.listen has Unix sockets only, which Nix cannot ask; add an address or set services.granary.nix.enable = false.";
      }
      {
        assertion = lib.all (anchor: anchor.tokenFile == null || !(lib.hasPrefix "/nix/store/" anchor.tokenFile)) cfg.anchors;
        message = "services.granary.anchors has a tokenFile in the Nix store, where everybody may read it.";
      }
      {
        assertion = cfg.ticketFile == null || !(lib.hasPrefix "/nix/store/" cfg.ticketFile);
        message = "services.granary.ticketFile is in the Nix store, where everybody may read it.";
      }
      {
        assertion = lib.all (file: file == null || !(lib.hasPrefix "/nix/store/" file)) [
          cfg.share.tokenFile
          cfg.share.signKeyFile
        ];
        message = "services.granary.share has a file in the Nix store, where everybody may read it.";
      }
    ];

    environment.systemPackages = [ cfg.package ];
    environment.etc."granary/granary.toml".source = checked;

    users.users.granary = {
      isSystemUser = true;
      group = "granary";
      description = "Granary node";
    };
    users.groups.granary = { };

    # systemd holds the socket: what Nix asks while the node restarts waits instead of failing.
    systemd.sockets.granary = {
      description = "Granary, where Nix asks";
      wantedBy = [ "sockets.target" ];
      socketConfig = {
        ListenStream = map (lib.removePrefix "unix:") endpoints;
        NoDelay = true;
        Backlog = 1024;
      };
    };

    systemd.services.granary = {
      description = "Granary node";
      documentation = [ "man:granary(1)" ];
      wantedBy = [ "multi-user.target" ];
      requires = [ "granary.socket" ];
      after = [
        "granary.socket"
        "network.target"
        "nix-daemon.socket"
      ];
      restartTriggers = [ checked ];
      serviceConfig = import ./unit.nix // {
        Type = "notify";
        ExecStart = "${cfg.package}/bin/granary node --config ${checked}";
        User = "granary";
        Group = "granary";
        StateDirectory = "granary";
        StateDirectoryMode = "0700";
        LoadCredential =
          lib.optional (cfg.ticketFile != null) "ticket:${cfg.ticketFile}"
          ++ lib.optional (cfg.share.tokenFile != null) "share-token:${cfg.share.tokenFile}"
          ++ lib.optional (cfg.share.signKeyFile != null) "share-key:${cfg.share.signKeyFile}"
          ++ map (
            { position, anchor }: "${tokenName position}:${anchor.tokenFile}"
          ) (lib.filter ({ anchor, ... }: anchor.tokenFile != null) numbered);
        Restart = "always";
        RestartSec = 2;
        WatchdogSec = 30;
        # Running transfers get up to 16 s to end.
        TimeoutStopSec = 30;
      };
    };

    # The key with which the node passes on what members built is random and this machine's own, so no
    # configuration can name it: it is made before Nix's daemon reads its nix.conf, which includes it.
    systemd.services.granary-keys = mkIf trustsMembers {
      description = "Granary's key for the Nix of this machine";
      documentation = [ "man:granary-use(1)" ];
      wantedBy = [
        "multi-user.target"
        "nix-daemon.service"
      ];
      before = [
        "nix-daemon.service"
        "granary.service"
      ];
      restartTriggers = [ checked ];
      serviceConfig = import ./unit.nix // {
        Type = "oneshot";
        RemainAfterExit = true;
        ExecStart = "${writeKey}";
        User = "granary";
        Group = "granary";
        StateDirectory = "granary";
        StateDirectoryMode = "0700";
        # What is in it is no secret, and everybody's Nix reads it.
        RuntimeDirectory = "granary-keys";
        RuntimeDirectoryMode = "0755";
      };
    };
    nix.extraOptions = mkIf trustsMembers "!include ${keyFile}";

    networking.firewall = mkIf cfg.openFirewall {
      allowedTCPPorts = ports (
        cfg.settings.mesh.listen ++ cfg.settings.mesh.transfer ++ lib.toList cfg.settings.share.http
      );
      allowedUDPPorts = lib.optional cfg.settings.mesh.mdns 5353;
    };

    nix.settings = mkIf cfg.nix.enable {
      substituters = lib.mkBefore (
        map (address: "http://${address}") (lib.take 1 (lib.filter isTcp endpoints))
      );
      trusted-public-keys = lib.unique (
        cfg.settings.trust.keys ++ lib.concatMap (anchor: anchor.publicKeys) cfg.anchors
      );
      narinfo-cache-negative-ttl = mkDefault cfg.nix.negativeTtl;
      # The node asks the Nix daemon to keep what it sends, also where not everybody may.
      extra-allowed-users = [ "granary" ];
    };
  };
}
