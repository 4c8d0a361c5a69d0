//! The `granary` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    // Several crates bring a cryptography provider; this one is the default, whoever asks.
    // It fails only if one is installed already, which would be this one.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    granary::cli::run()
}
