//! Which tensor gets which encoding.

pub mod budget;
mod components;
pub mod importance;
mod uniform;

pub use components::{ComponentRules, PLAIN};
pub use uniform::Uniform;
