# A NAS that keeps what everybody built, in Garage on the same machine. It is a member of the mesh too.
{
  imports = [
    ../anchor.nix
    ./home.nix
  ];

  services.granary-anchor = {
    enable = true;
    openFirewall = true;
    # aws_access_key_id = GK…, aws_secret_access_key = …, as `garage key create granary` prints them.
    s3CredentialsFile = "/run/agenix/granary-s3";
    settings.anchor-server = {
      storage = "s3://granary/home";
      s3 = {
        endpoint = "http://127.0.0.1:3900";
        region = "garage";
      };
    };
  };

  services.garage = {
    enable = true;
    settings = {
      replication_factor = 1;
      rpc_bind_addr = "127.0.0.1:3901";
      s3_api = {
        s3_region = "garage";
        api_bind_addr = "127.0.0.1:3900";
      };
    };
  };
}
