# Keystone's client options, as they stand in its documentation.
{
  imports = [ ../keystone.nix ];

  keystone.binaryCache = {
    enable = true;
    url = "https://cache.example.com";
    publicKey = "main:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=";
  };
}
