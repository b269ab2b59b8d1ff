//! How to train.

use serde::Serialize;

use crate::error::{Error, Result};

/// Everything that decides the trained weights, apart from the model, the text and how tensors are packed.
#[derive(Clone, Debug, Serialize)]
pub struct Options {
    /// Updates of the weights.
    pub steps: u64,
    /// Windows whose gradients make one update; as many as there are threads run side by side, each in memory of its own.
    pub batch: usize,
    /// Tokens of a window; see [`Protocol::new`](crate::eval::perplexity::Protocol::new).
    pub ctx: Option<usize>,
    /// The highest learning rate.
    pub learning_rate: f64,
    /// Steps over which the learning rate rises to it.
    pub warmup: u64,
    /// The share of a matrix that a step takes away, times the learning rate.
    pub weight_decay: f64,
    /// The largest norm that the gradient of all weights together may have; a larger one is made shorter.
    pub clip: f64,
    /// What the order of the windows depends on.
    pub seed: u64,
    /// Whether scales are trained, too (LSQ: Esser et al., arXiv 1902.08153).
    pub learn_scales: bool,
    /// How much a teacher counts, if there is one.
    pub distillation: Distillation,
    /// Bits of the activations of a ResNet-BK's core, where they are quantized.
    pub core_bits: Option<u32>,
}

/// How a teacher is followed: the loss is `alpha * temperature^2 * KL(teacher || student)`, both softened by the
/// temperature, and `1 - alpha` times the cross-entropy.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Distillation {
    pub alpha: f64,
    pub temperature: f64,
}

impl Options {
    /// Checks what can be told without a model.
    ///
    /// # Errors
    /// [`Error::Option`] names the first that is out of range.
    pub fn check(&self) -> Result<()> {
        let positive = |value: f64| value.is_finite() && value > 0.0;
        // A window is at most 512 tokens where no other length is asked for.
        let (batch, ctx) = (self.batch as u64, self.ctx.unwrap_or(512) as u64);
        let tokens = self.steps.checked_mul(batch).and_then(|windows| windows.checked_mul(ctx));
        let wrong: [(&'static str, bool, &str); 9] = [
            ("--steps", self.steps == 0, "at least one step is needed"),
            ("--batch", self.batch == 0, "at least one window is needed"),
            ("--batch", tokens.is_none(), "times --steps and the window is more tokens than can be counted"),
            ("--learning-rate", !positive(self.learning_rate), "must be above 0"),
            ("--warmup", self.warmup > self.steps, "is more than --steps"),
            ("--weight-decay", !(self.weight_decay.is_finite() && self.weight_decay >= 0.0), "must not be below 0"),
            ("--clip", !positive(self.clip), "must be above 0"),
            ("--alpha", !(0.0..=1.0).contains(&self.distillation.alpha), "must be from 0 to 1"),
            ("--temperature", !positive(self.distillation.temperature), "must be above 0"),
        ];
        match wrong.into_iter().find(|(_, wrong, _)| *wrong) {
            Some((option, _, why)) => Err(Error::Option { option, why: why.into() }),
            None => Ok(()),
        }
    }
}
