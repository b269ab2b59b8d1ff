//! Which tensor gets which encoding.

mod components;
pub mod importance;
mod uniform;

pub use components::{ComponentRules, PLAIN};
pub use uniform::Uniform;
