# Every option that has a type, away from its default, and settings that have none.
{
  imports = [
    ../node.nix
    ../anchor.nix
  ];

  services.granary = {
    enable = true;
    openFirewall = true;
    nix.negativeTtl = 0;
    share.tokenFile = "/run/secrets/share-token";
    anchors = [ { url = "https://nas.example/main"; } ];
    settings = {
      state-dir = "/var/lib/other";
      substituter.listen = [
        "unix:/run/granary/socket"
        "127.0.0.2:5726"
      ];
      substituter.priority = 5;
      mesh = {
        key = "home:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=";
        listen = [ "0.0.0.0:5727" ];
        transfer = [
          "0.0.0.0:5728"
          "[::]:5728"
        ];
        mdns = false;
        peers = [ "desk.lan:4727" ];
        # No option of its own: checked by the binary alone.
        mdns-port = 5354;
        interfaces = [ "eth0" ];
      };
      share = {
        enable = false;
        deny = [ "^secret \"quoted\" \\d+$" ];
      };
      trust.keys = [ ];
      upstream = [ { url = "https://cache.nixos.org"; } ];
      limits.streams-per-peer = 4;
      store.dir = "/nix/store";
    };
  };

  services.granary-anchor = {
    enable = true;
    signingKeyFiles = {
      main = "/run/secrets/main";
      team = "/run/secrets/team";
    };
    atticTokenKeyFile = "/run/secrets/attic";
    s3CredentialsFile = "/run/secrets/s3";
    ticketFile = "/run/secrets/anchor-ticket";
    openFirewall = true;
    settings = {
      state-dir = "/var/lib/other-anchor";
      # Beside the node, which has other ports.
      substituter.listen = [ ];
      mesh.listen = [ "0.0.0.0:6727" ];
      anchor-server = {
        listen = "[::]:5730";
        storage = "file:///srv/granary";
        default-cache = "";
        nar-bytes-max = 1000000;
        s3.region = "x";
        s3.endpoint = "http://127.0.0.1:9000";
        s3.virtual-hosted = true;
      };
    };
  };
}
