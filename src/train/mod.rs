//! What learns from a text: gradients, the importance of tensors, the costs of encodings, calibrated rounding, a conversion that uses
//! them; and training through what the packed file will hold.

pub mod contest;
pub mod conversion;
pub mod fisher;
pub mod gradients;
pub mod importance;
pub mod qat;
pub mod rounding;
pub mod sensitivity;
