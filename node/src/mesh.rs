//! (in progress)

pub mod discovery;
pub mod links;
pub mod swarm;
