# Three machines at home, this file on each of them. Whichever built something, the others have it.
{
  imports = [ ../node.nix ];

  services.granary = {
    enable = true;
    openFirewall = true;
    # Printed by `granary mesh ticket --uses 3` on the machine that admits the others (`granary mesh create --here`).
    ticketFile = "/run/agenix/granary-ticket";
    # Names that stay on the machine that built them.
    settings.share.deny = [ "^secret-" ];
  };
}
