//! The anchor: the durable role, which keeps what machines collect or lose and signs it centrally.

pub mod object_store;
pub mod frames;
