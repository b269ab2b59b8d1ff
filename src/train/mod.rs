//! What learns from a text: calibrated rounding.

pub mod rounding;
