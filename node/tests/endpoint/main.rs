//! The endpoint that Nix asks, byte for byte: real daemons over real chroot stores, raw requests
//! on a socket, and peers that lie, die, stall or are asked for too much.
//!
//! Every node has a loopback address of its own, so ports never collide. A [`Proxy`] stands before
//! a provider's transfer port where a test decides how much of a NAR gets through.

mod answers;
mod attacks;
mod bounds;
#[path = "../shared/browser.rs"]
#[allow(dead_code, reason = "each page is visited in its own way")]
mod browser;
mod client;
mod conformance;
#[path = "../shared/exposition.rs"]
#[allow(dead_code, reason = "tests of documentation look at families")]
mod exposition;
mod faults;
mod floods;
mod page;
#[path = "../shared/pages.rs"]
mod pages;
mod lan;
mod machine;
mod process;
mod public;
mod proxy;
mod restart;
#[path = "../shared/smuggling.rs"]
mod smuggling;
#[path = "../shared/terminal.rs"]
mod terminal;
mod routes;
mod sharing;
mod start;
mod strangers;
mod roots;
mod upstreams;
mod watch;
mod web;
