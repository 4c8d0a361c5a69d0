//! Machines on a LAN, with the real Nix client: the promises a user cares about, proven end to end.
//!
//! Every test lays a [`machine::Lan`] (a bridge in a network namespace of its own) and puts [`machine::Machine`]s on
//! it. A machine is a network namespace, a Nix store of its own (a chroot store, so that all of
//! them stand on one disk), a state folder, and a `granary node`. Nothing is skipped: without root,
//! Nix or `ip` a test fails and says what is missing. Nothing leaves the namespaces, so tests run
//! beside each other, each on the same addresses.
//!
//! An ERROR line in any node's log fails the test, unless the test declared that it expects one.
//!
//! `GRANARY_LAN_KEEP=1` keeps the folders of a test; `GRANARY_LAN_NIX="$PWD/node/tests/lan/in-root /debian-sid"`
//! puts that command before every call of Nix on machines other than builders, to run the same tests with
//! another release as the client. `GRANARY_LAN_IDLE_SECONDS=60` has `office` watch an idle office that long.

mod network;
mod process;
mod http;
mod nix;
mod machine;
mod admission;
mod status;
mod proxy;
mod tap;
mod anchor;
#[path = "../anchor/s3.rs"]
#[allow(dead_code, reason = "the anchor's own tests use all of it")]
mod s3;

mod substitution;
mod slow_link;
mod freshness;
mod strangers;
mod revocation;
mod joining;
mod vouching;
mod without_granary;
mod conference;
mod networks;
mod corruption;
mod garbage;
mod roaming;
mod faults;
mod office;
mod durable;
mod published;
mod membership;
