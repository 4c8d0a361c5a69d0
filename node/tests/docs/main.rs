//! The manual (README.md, docs/), held against what it speaks of.

mod configuration;
mod markdown;
mod machine;
mod session;
mod commands;
