//! (in progress)

pub mod database;
pub mod nar;
pub mod watcher;
