# Three machines at home, this file on each of them. Whichever built something, the others have it.
{
  imports = [ ../node.nix ];

  services.granary = {
    enable = true;
    openFirewall = true;
    settings = {
      # Printed by `granary mesh create`, once, on the machine that admits the others.
      mesh.key = "home:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=";
      # Keys of the machines that build (`secret-key-files` in their nix.conf).
      trust.keys = [
        "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY="
        "desk-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY="
      ];
    };
  };
}
