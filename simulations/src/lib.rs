//! Simulations: thousands of minds in one process, replayed from one number.
//!
//! Depends on `granary-protocol` only, so that what is simulated is what ships: every honest machine is
//! a [`granary_protocol::mesh::Mesh`] with an index, a store and hands that do in virtual time what
//! the node's do. Start reading at [`world`], whose loop everything passes; [`checker`] says what must
//! hold, `scenarios/` what happens.

pub mod scenario;
pub mod world;
pub mod network;
pub mod machine;
pub mod hands;
pub mod transfer;
pub mod index;
pub mod content;
pub mod workload;
pub mod faults;
pub mod liar;
pub mod checker;
pub mod report;
pub mod trace;
mod describe;
mod chance;
