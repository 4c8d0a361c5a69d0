{
  description = "Granary: a peer-to-peer cache mesh for Nix on the local network";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";

  outputs =
    { self, nixpkgs }:
    let
      systems = [
        "x86_64-linux"
        "aarch64-linux"
      ];
      forEachSystem = make: nixpkgs.lib.genAttrs systems (system: make nixpkgs.legacyPackages.${system});
      packageOf = pkgs: self.packages.${pkgs.stdenv.hostPlatform.system}.granary;
    in
    {
      packages = forEachSystem (pkgs: {
        default = packageOf pkgs;
        granary = pkgs.callPackage ./nixos/package.nix { };
      });

      overlays.default = final: _previous: {
        granary = final.callPackage ./nixos/package.nix { };
      };

      nixosModules = {
        default = self.nixosModules.node;
        node = ./nixos/node.nix;
        anchor = ./nixos/anchor.nix;
        keystone = ./nixos/keystone.nix;
      };

      # `nix flake check` builds the package, evaluates every example, and runs the virtual machines.
      checks = forEachSystem (
        pkgs:
        {
          package = packageOf pkgs;
          examples = pkgs.writeText "examples.json" (
            builtins.toJSON (import ./nixos/tests/evaluate.nix { inherit (pkgs) lib; }).examples
          );
        }
        // import ./nixos/tests/vm.nix { inherit pkgs; }
      );

      devShells = forEachSystem (pkgs: {
        default = pkgs.mkShell {
          inputsFrom = [ (packageOf pkgs) ];
          packages = with pkgs; [
            cargo-deny
            cargo-nextest
            clippy
            iproute2
            rustfmt
          ];
        };
      });

      formatter = forEachSystem (pkgs: pkgs.nixfmt-rfc-style);
    };
}
