//! The loss of a language model over windows of a text, and its gradients.

use candle_core::Tensor;

use crate::{
    error::{Error, Result},
    eval::{perplexity::Protocol, text::window_bos},
    model::{Model, check_tokens, sample::Sampler},
    ops::{
        Ops,
        autograd::{AutogradOps, Gradients},
    },
    tensor::TensorSource,
};

/// A model whose loss is differentiated one window of tokens at a time: memory is that of the weights, of their
/// gradients and of what one window computes.
pub struct Differentiator<'a> {
    source: &'a dyn TensorSource,
    ops: &'a AutogradOps,
    model: Model<'a, AutogradOps>,
    protocol: Protocol,
    bos: Option<u32>,
}

/// The loss of one window and its gradients.
pub struct WindowLoss {
    /// Mean negative log-likelihood of a scored token, in nats.
    pub nll: f64,
    pub gradients: Gradients,
}

impl<'a> Differentiator<'a> {
    /// Loads a model; windows are those of [`evaluate`](crate::eval::perplexity::evaluate) with this `ctx` and `skip`.
    ///
    /// # Errors
    /// As [`Model::load`] and [`Protocol::new`].
    pub fn new(source: &'a dyn TensorSource, ops: &'a AutogradOps, ctx: Option<usize>, skip: usize) -> Result<Self> {
        let model = Model::load(source, ops)?;
        let protocol = Protocol::new(ctx, skip, model.max_positions())?;
        Ok(Self { source, ops, model, protocol, bos: window_bos(source)? })
    }

    /// How a text is cut into windows, and which of their positions are scored.
    pub fn protocol(&self) -> Protocol {
        self.protocol
    }

    /// The model, on the variables of its back end.
    pub fn model(&self) -> &Model<'a, AutogradOps> {
        &self.model
    }

    /// The first `count` windows of a text, of `ctx` tokens each.
    ///
    /// # Errors
    /// [`Error::Tokens`] for ids outside of the vocabulary, or too few of them.
    pub fn windows<'t>(&self, tokens: &'t [u32], count: usize) -> Result<Vec<&'t [u32]>> {
        check_tokens("the text", tokens, self.model.vocab_size())?;
        let ctx = self.protocol.ctx;
        let windows: Vec<&[u32]> = tokens.chunks_exact(ctx).take(count).collect();
        if windows.len() < count {
            let (found, filled) = (tokens.len(), windows.len());
            let why = format!(
                "{found} tokens fill {filled} windows of {ctx}, where {count} are asked for; \
                 pass a longer text, fewer windows or a smaller --ctx"
            );
            return Err(Error::Tokens { source_name: "the text".into(), why });
        }
        Ok(windows)
    }

    /// The loss of one window of `ctx` tokens: the mean negative log-likelihood of a scored token, in nats.
    ///
    /// # Errors
    /// As [`Model::forward`]; [`Error::Output`] where the loss is NaN or infinite.
    pub fn loss(&self, window: &[u32]) -> Result<f64> {
        self.finite(self.ops.value(|| self.recorded_loss(window))?)
    }

    /// The loss of one window of `ctx` tokens, and its gradients.
    ///
    /// # Errors
    /// As [`loss`](Self::loss).
    pub fn gradients(&self, window: &[u32]) -> Result<WindowLoss> {
        let (nll, gradients) = self.ops.gradients(|| self.recorded_loss(window))?;
        Ok(WindowLoss { nll: self.finite(nll)?, gradients })
    }

    /// The same where, after each token of the window, the model is to predict one that it would itself have drawn: the
    /// squares of such gradients are, on average, the Fisher information over the number of scored tokens.
    ///
    /// # Errors
    /// As [`loss`](Self::loss).
    pub fn fisher_gradients(&self, window: &[u32], sampler: &mut Sampler) -> Result<WindowLoss> {
        let (nll, gradients) = self.ops.gradients(|| {
            let (logits, _) = self.recorded_logits(window)?;
            let mut values = Vec::new();
            self.ops.read(&logits, &mut values)?;
            let drawn: Vec<u32> =
                values.chunks_exact_mut(self.model.vocab_size()).map(|logits| sampler.draw(logits)).collect();
            self.ops.mean_cross_entropy(&logits, &drawn)
        })?;
        Ok(WindowLoss { nll: self.finite(nll)?, gradients })
    }

    /// A scalar that remembers how it was computed.
    fn recorded_loss(&self, window: &[u32]) -> Result<Tensor> {
        let (logits, targets) = self.recorded_logits(window)?;
        self.ops.mean_cross_entropy(&logits, targets)
    }

    /// The logits of the scored positions, `[scored, vocab_size]`, and the tokens that they are to predict.
    fn recorded_logits<'w>(&self, window: &'w [u32]) -> Result<(Tensor, &'w [u32])> {
        let mut begun = window.to_vec();
        if let Some(bos) = self.bos {
            begun[0] = bos;
        }
        let hidden = self.model.forward(&begun, &mut self.model.state(window.len())?)?;
        let skip = self.protocol.skip;
        // Each row predicts the token after its own.
        Ok((self.model.logits(&hidden, skip - 1, window.len() - skip)?, &window[skip..]))
    }

    fn finite(&self, nll: f64) -> Result<f64> {
        if !nll.is_finite() {
            let why = "the model computes logits that are NaN or infinite, so its loss has no gradient".into();
            return Err(Error::Output { path: self.source.path().to_owned(), why });
        }
        Ok(nll)
    }
}
