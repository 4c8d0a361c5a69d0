//! A Granary node: the hands around the mind in `granary-protocol`.

pub mod clock;
pub mod identity;
pub mod metrics;
pub mod activity;
pub mod state_folder;
pub mod secret;
pub mod authority;
pub mod loopback_key;
pub mod listener;
pub mod supervisor;
pub mod store;
pub mod config;
pub mod index;
pub mod serve;
pub mod binary_cache;
pub mod mesh;
pub mod upload;
pub mod status;
pub mod substituter;
pub mod anchor;
pub mod nix_conf;
pub mod daemon;
pub mod loopback;
pub mod demo;
pub mod doctor;
pub mod cli;
