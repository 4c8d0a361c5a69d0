//! The formats and decisions of the Granary mesh: bytes in, values out.
//!
//! Nothing here performs I/O, reads a clock or draws ambient randomness: `now` and seeds are
//! arguments. That makes every decision replayable, and lets `simulations` run the code that ships.
//! Modules stand in reading order: Nix's formats, then trust, then the words nodes exchange, then
//! the mind ([`mesh::Mesh`]) that decides what to say.

pub mod nix32;
pub mod hash;
pub mod store_path;
pub mod content_address;
pub mod signature;
pub mod narinfo;
pub mod cache_info;
pub mod nar;
pub mod worker;
pub mod seekable;
pub mod pieces;
mod line;
pub mod peer;
pub mod certificate;
pub mod revocation;
pub mod ticket;
pub mod admission;
pub mod voucher;
pub mod contact;
pub mod token;
pub mod assertion;
pub mod sharing;
pub mod announcement;
pub mod wire;
pub mod message;
pub mod availability;
pub mod network;
pub mod mesh;
