//! Gradients of the loss, and what is made of them.

pub mod gradients;
pub mod importance;
