# An anchor on a rented server: storage at a provider of S3, and Caddy with its certificate before it.
{
  imports = [ ../anchor.nix ];

  services.granary-anchor = {
    enable = true;
    s3CredentialsFile = "/run/agenix/granary-s3";
    # The key in a secret of its own, so that the server can be lost and made again.
    signingKeyFiles.team = "/run/agenix/team-signing-key";
    settings.anchor-server = {
      listen = "127.0.0.1:4730";
      default-cache = "team";
      storage = "s3://team-builds/granary";
      s3 = {
        endpoint = "https://s3.example.com";
        region = "eu-central-1";
      };
    };
  };

  services.caddy = {
    enable = true;
    virtualHosts."cache.example.com".extraConfig = ''
      request_body {
        max_size 128GB
      }
      reverse_proxy 127.0.0.1:4730
    '';
  };
  networking.firewall.allowedTCPPorts = [
    80
    443
  ];
}
