# The road over from Harmonia: both run side by side on the machine that served the others. Clients keep
# Harmonia's address until they have a node of their own; its paths carry its signature, and nodes take
# them from each other once they trust its key.
{
  imports = [ ../node.nix ];

  services.harmonia = {
    enable = true;
    signKeyPaths = [ "/run/agenix/harmonia-key" ];
  };

  services.granary = {
    enable = true;
    openFirewall = true;
    # Machines that shall stay without a node read here, at port 4729, instead of at Harmonia's 5000.
    share.signKeyFile = "/run/agenix/harmonia-key";
    settings = {
      share.http = "0.0.0.0:4729";
      mesh.key = "home:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=";
      trust.keys = [
        "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY="
        "nas.lan-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY="
      ];
      # Asked when no peer has a path; goes when the last machine has its node.
      upstream = [
        {
          url = "http://nas.lan:5000";
          public-keys = [ "nas.lan-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=" ];
        }
      ];
    };
  };

  # What peers may fetch must be signed by a key that they trust.
  nix.settings.secret-key-files = [ "/run/agenix/harmonia-key" ];
}
