# Keystone's names for a binary cache, carried out by Granary: configurations that say
# `keystone.binaryCache` and `keystone.server.services.attic` keep saying it. Imported in place of
# Keystone's own modules of these names (`disabledModules`).
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
    mkMerge
    mkOption
    types
    ;
  client = config.keystone.binaryCache;
  server = config.keystone.server.services.attic;
  keyFolder = "/run/granary-anchor";
in
{
  imports = [
    ./node.nix
    ./anchor.nix
  ];

  options.keystone.binaryCache = {
    enable = mkEnableOption "the binary cache of your own, asked through this machine's Granary node";
    url = mkOption {
      type = types.str;
      example = "https://cache.example.com";
      description = "Address of the server, without the name of the cache.";
    };
    publicKey = mkOption {
      type = types.str;
      example = "main:AAAA…=";
      description = "The key that the cache signs with.";
    };
    cache = mkOption {
      type = types.str;
      default = "main";
      description = "The cache's name on the server.";
    };
    tokenFile = mkOption {
      type = types.nullOr types.str;
      default = null;
      example = "/run/agenix/attic-push-token";
      description = "A file with a token, where the cache is private.";
    };
  };

  options.keystone.server.services.attic = {
    enable = mkEnableOption "a Granary anchor in the place of atticd; it answers Attic's clients and tokens";
    tokenKeyFile = mkOption {
      type = types.nullOr types.str;
      default = if config ? age then config.age.secrets.attic-server-token-key.path or null else null;
      defaultText = lib.literalExpression "config.age.secrets.attic-server-token-key.path";
      description = ''
        The secret of atticd, a line `ATTIC_SERVER_TOKEN_RS256_SECRET_BASE64=<base64>`: tokens that were made
        with it stay good. Its public half alone reaches the anchor.
      '';
    };
    storage = mkOption {
      type = types.nullOr types.str;
      default = null;
      example = "s3://attic/granary";
      description = "Where builds are kept, as `services.granary-anchor.settings.anchor-server.storage`.";
    };
    openFirewall = mkOption {
      type = types.bool;
      default = false;
      description = "Whether others may reach the anchor's port.";
    };
  };

  config = mkMerge [
    (mkIf client.enable {
      services.granary = {
        enable = true;
        anchors = [
          {
            url = "${lib.removeSuffix "/" client.url}/${client.cache}";
            publicKeys = [ client.publicKey ];
            tokenFile = client.tokenFile;
          }
        ];
      };
    })
    (mkIf server.enable {
      services.granary-anchor = {
        enable = true;
        openFirewall = server.openFirewall;
        settings.anchor-server.storage = server.storage;
        settings.anchor-server.attic-token-key-file = mkIf (
          server.tokenKeyFile != null
        ) "${keyFolder}/attic-token-key";
      };
    })
    (mkIf (server.enable && server.tokenKeyFile != null) {
      systemd.services.granary-anchor.serviceConfig = {
        RuntimeDirectory = "granary-anchor";
        RuntimeDirectoryMode = "0700";
        LoadCredential = [ "attic-environment:${server.tokenKeyFile}" ];
        ExecStartPre = pkgs.writeShellScript "attic-token-key" ''
          set -euo pipefail
          secret=$(${pkgs.gnused}/bin/sed -n 's/^ATTIC_SERVER_TOKEN_RS256_SECRET_BASE64=//p' "$CREDENTIALS_DIRECTORY/attic-environment")
          printf %s "$secret" | ${pkgs.coreutils}/bin/base64 -d |
            ${pkgs.openssl}/bin/openssl rsa -pubout -out "$RUNTIME_DIRECTORY/attic-token-key"
        '';
      };
    })
  ];
}
