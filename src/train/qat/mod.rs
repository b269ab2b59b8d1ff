//! Quantization-aware training: weights are trained through what the packed file will hold of them, so that the file that
//! is written is the model that was trained (Jacob et al., arXiv 1712.05877; straight-through: Bengio et al., arXiv
//! 1308.3432), alone or to follow a teacher (Hinton et al., arXiv 1503.02531).

mod adamw;
pub mod grid;
pub mod loss;
mod options;
mod output;
mod parameter;
mod record;
mod saved;
mod trainer;
mod windows;

pub use self::{
    adamw::learning_rate,
    options::{Distillation, Options},
    output::{check_room, check_target, file_bytes},
    record::{History, StepRecord, ValidationRecord},
    saved::check_saved,
    trainer::{Trained, Training, least_bits},
    windows::Data,
};
