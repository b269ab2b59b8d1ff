//! Which tensor gets which encoding.

mod components;
mod uniform;

pub use components::{ComponentRules, PLAIN};
pub use uniform::Uniform;
