//! A Granary node: the hands around the mind in `granary-protocol`.

pub mod config;
pub mod clock;
pub mod identity;
pub mod metrics;
pub mod store;
pub mod index;
pub mod mesh;
pub mod serve;
pub mod binary_cache;
pub mod substituter;
pub mod status;
pub mod daemon;
pub mod cli;
