//! Setting a machine up and leaving again, as a person does it: `granary use`, `up`, `doctor`.
//!
//! `GRANARY_LAN_NIX="nix-versions run trixie"` puts that command before every call of Nix, to see what
//! another release makes of nix.conf.

mod leaving;
mod machine;
#[path = "../shared/terminal.rs"]
mod terminal;
mod doctor;
mod up;
