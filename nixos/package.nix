# The `granary` binary. Everything NixOS-specific (modules, VM tests) stands in this folder and knows
# only the binary's command line and its TOML.
#
# aws-lc, SQLite and zstd are compiled from the crates' own sources; a C compiler is all they need.
{
  lib,
  stdenv,
  rustPlatform,
  installShellFiles,
}:

let
  manifest = lib.importTOML ../Cargo.toml;
  root = ../.;
in
rustPlatform.buildRustPackage {
  pname = "granary";
  version = manifest.workspace.package.version;

  src = lib.fileset.toSource {
    inherit root;
    fileset = lib.fileset.unions [
      ../Cargo.lock
      ../Cargo.toml
      ../clippy.toml
      ../node
      ../protocol
      ../rustfmt.toml
      ../simulations
    ];
  };

  cargoLock.lockFile = ../Cargo.lock;
  cargoBuildFlags = [ "--package=granary" ];

  # The LAN tests need root and network namespaces, which a build sandbox has not; .ci/test runs them.
  cargoTestFlags = [
    "--workspace"
    "--lib"
    "--bins"
  ];

  nativeBuildInputs = [ installShellFiles ];

  # The binary writes them itself, where it can run.
  postInstall = lib.optionalString (stdenv.buildPlatform.canExecute stdenv.hostPlatform) ''
    "$out/bin/granary" man man-pages
    installManPage man-pages/*
    installShellCompletion --cmd granary \
      --bash <("$out/bin/granary" completions bash) \
      --fish <("$out/bin/granary" completions fish) \
      --zsh <("$out/bin/granary" completions zsh)
  '';

  meta = {
    inherit (manifest.workspace.package) description;
    homepage = manifest.workspace.package.repository;
    license = with lib.licenses; [
      mit
      asl20
    ];
    mainProgram = "granary";
    platforms = lib.platforms.linux;
  };
}
