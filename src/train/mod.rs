//! What learns from a text: gradients, the importance of tensors, the costs of encodings, calibrated rounding; and a conversion that uses
//! them.

pub mod contest;
pub mod conversion;
pub mod fisher;
pub mod gradients;
pub mod importance;
pub mod rounding;
pub mod sensitivity;
