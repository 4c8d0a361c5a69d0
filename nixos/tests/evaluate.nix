# Evaluates a configuration with our modules, and shows what comes of it: the options of NixOS that they
# set, and their TOML. `lib` is our own small one, or nixpkgs' (`--arg lib 'import …/lib'`).
{
  lib ? import ./lib.nix,
  # What the units run; no package is built here.
  package ? "/granary",
}:

let
  inherit (lib) mkOption types;

  fake = name: attributes: attributes // {
    type = "derivation";
    inherit name;
    outPath = "/nix/store/00000000000000000000000000000000-${name}";
  };
  pkgs = {
    callPackage = _: _: fake "granary" { } // { outPath = package; };
    runCommand = name: attributes: _: fake name attributes;
    writeShellScript = name: text: fake name { inherit text; };
    writeShellScriptBin = name: text: fake name { inherit text; };
    gnused = fake "gnused" { };
    coreutils = fake "coreutils" { };
    openssl = fake "openssl" { };
  };

  list = element: mkOption {
    type = types.listOf element;
    default = [ ];
  };
  free = mkOption {
    type = types.attrsOf types.anything;
    default = { };
  };
  unitValue = types.oneOf [
    (types.listOf types.str)
    types.bool
    types.int
    types.str
    types.package
  ];
  section = mkOption {
    type = types.attrsOf unitValue;
    default = { };
  };
  unit = types.submodule {
    options = {
      description = mkOption { type = types.str; };
      documentation = list types.str;
      wantedBy = list types.str;
      requires = list types.str;
      before = list types.str;
      wants = list types.str;
      after = list types.str;
      restartTriggers = list types.raw;
      serviceConfig = section;
      socketConfig = section;
    };
  };

  # The options of NixOS that are set, with the types that they have there.
  nixos = {
    options = {
      assertions = list (types.attrsOf types.anything);
      environment.systemPackages = list types.package;
      environment.etc = free;
      users.users = free;
      users.groups = free;
      systemd.sockets = mkOption {
        type = types.attrsOf unit;
        default = { };
      };
      systemd.services = mkOption {
        type = types.attrsOf unit;
        default = { };
      };
      networking.firewall.allowedTCPPorts = list types.int;
      networking.firewall.allowedUDPPorts = list types.int;
      services.caddy = free;
      services.harmonia = free;
      services.garage = free;
      services.minio = free;
      services.atticd = free;
      nix.extraOptions = mkOption {
        type = types.lines;
        default = "";
      };
      nix.settings = mkOption {
        default = { };
        type = types.submodule {
          freeformType = types.attrsOf types.anything;
          options.substituters = list types.str;
          options.trusted-public-keys = list types.str;
          options.extra-allowed-users = list types.str;
        };
      };
    };
  };

  evaluate =
    module:
    let
      inherit
        (lib.evalModules {
          modules = [
            nixos
            module
          ];
          specialArgs = { inherit pkgs; };
        })
        config
        ;
      failed = builtins.filter (one: !one.assertion) config.assertions;
      text = name: config.environment.etc.${name}.source.text or null;
      hardening = import ../unit.nix;
      # What is the same for every unit is said in one word.
      shown = builtins.mapAttrs (
        _: one:
        builtins.removeAttrs one [ "restartTriggers" ]
        // {
          isHardened = builtins.all (name: one.serviceConfig.${name} or null == hardening.${name}) (
            builtins.attrNames hardening
          );
          serviceConfig = builtins.removeAttrs one.serviceConfig (builtins.attrNames hardening);
        }
      );
      # Lists that modules add to in whatever order.
      sorted = builtins.sort (a: b: a < b);
    in
    if failed != [ ] then
      throw "Failed assertions: ${(builtins.head failed).message}"
    else
      {
        toml = {
          node = text "granary/granary.toml";
          anchor = text "granary/anchor.toml";
        };
        sockets = shown config.systemd.sockets;
        services = shown config.systemd.services;
        users = config.users;
        nix = config.nix.settings;
        nixConf = config.nix.extraOptions;
        firewall = builtins.mapAttrs (_: sorted) config.networking.firewall;
        commands = sorted (map (one: one.text or one.name) config.environment.systemPackages);
      };
in
{
  inherit evaluate;
  examples = builtins.mapAttrs (_: evaluate) {
    home = ../examples/home.nix;
    nas-garage = ../examples/nas-garage.nix;
    nas-minio = ../examples/nas-minio.nix;
    vps = ../examples/vps.nix;
    keystone-client = ../examples/keystone-client.nix;
    keystone-server = ../examples/keystone-server.nix;
    from-harmonia = ../examples/from-harmonia.nix;
    from-attic = ../examples/from-attic.nix;
    everything = ./everything.nix;
  };
}
