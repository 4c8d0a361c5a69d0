//! The anchor: its storage, what it keeps, and what real clients see.
//!
//! S3 is served in process by `s3s-fs` behind a lock, with a hook that makes it fail ([`s3`]).

mod access;
mod administration;
mod attic;
#[path = "../shared/browser.rs"]
#[allow(dead_code, reason = "each page is visited in its own way")]
mod browser;
mod ci;
mod collection;
mod command;
mod documented;
#[path = "../shared/exposition.rs"]
mod exposition;
mod killed;
mod members;
mod memory;
mod hostile;
mod import;
mod nix;
mod oidc;
mod page;
#[path = "../shared/pages.rs"]
mod pages;
mod pushing;
mod queue;
mod reading;
mod rig;
mod s3;
mod scrub;
mod sizes;
#[path = "../shared/smuggling.rs"]
mod smuggling;
mod stock;
mod storage;
mod tls;
mod watching;
