//! Simulations: thousands of minds in one process, replayed from one number.
//!
//! Depends on `granary-protocol` only, so that what is simulated is what ships. The world, the
//! network and the scenarios grow here; until then the stories of several minds stand in
//! `protocol/src/mesh/tests.rs`.
