//! The anchor: its storage, what it keeps, and what real clients see.
//!
//! S3 is served in process by `s3s-fs` behind a lock, with a hook that makes it fail ([`s3`]).

mod access;
mod attic;
mod ci;
mod collection;
mod command;
mod documented;
#[path = "../shared/exposition.rs"]
mod exposition;
mod killed;
mod memory;
mod hostile;
mod import;
mod nix;
mod pushing;
mod queue;
mod reading;
mod rig;
mod s3;
mod scrub;
mod sizes;
mod storage;
mod tls;
mod watching;
