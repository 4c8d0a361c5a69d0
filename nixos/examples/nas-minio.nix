# A NAS with MinIO, and nothing but the anchor on it.
{
  imports = [ ../anchor.nix ];

  services.granary-anchor = {
    enable = true;
    openFirewall = true;
    s3CredentialsFile = "/run/agenix/granary-s3";
    settings.anchor-server = {
      storage = "s3://granary";
      s3.endpoint = "http://127.0.0.1:9000";
    };
  };

  services.minio = {
    enable = true;
    listenAddress = "127.0.0.1:9000";
    rootCredentialsFile = "/run/agenix/minio-root";
  };
}
