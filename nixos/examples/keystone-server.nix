# Keystone's server option. Tokens that atticd made stay good.
{
  imports = [ ../keystone.nix ];

  keystone.server.services.attic = {
    enable = true;
    # With agenix this is the default: config.age.secrets.attic-server-token-key.path
    tokenKeyFile = "/run/agenix/attic-server-token-key";
  };
}
