# The road over from Attic: the old server stays and is asked as before, the anchor fills beside it. Pushers
# change their address (`attic login nas https://nas.example:4730 <the same token>`) when it suits them.
{
  imports = [
    ../node.nix
    ../anchor.nix
  ];

  services.atticd = {
    enable = true;
    environmentFile = "/run/agenix/atticd";
  };

  services.granary-anchor = {
    enable = true;
    openFirewall = true;
    # The public half of atticd's key: `openssl rsa -pubout`.
    atticTokenKeyFile = "/run/agenix/attic-token-public-key";
  };

  services.granary = {
    enable = true;
    anchors = [
      {
        url = "http://127.0.0.1:4730/main";
        publicKeys = [ "main-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=" ];
        tokenFile = "/run/agenix/granary-token";
      }
      {
        url = "https://attic.example.com/main";
        publicKeys = [ "main:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=" ];
        tokenFile = "/run/agenix/attic-token";
      }
    ];
  };
}
