//! What learns from a text: gradients, the importance of tensors, calibrated rounding.

pub mod gradients;
pub mod importance;
pub mod rounding;
