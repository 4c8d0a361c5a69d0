//! (in progress)

pub mod tls;
