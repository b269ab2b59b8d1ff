//! The loss of a language model over windows of a text, and its gradients.

use candle_core::Tensor;

use crate::{
    error::{Error, Result},
    eval::{perplexity::Protocol, text::window_bos},
    model::{Model, check_tokens},
    ops::autograd::{AutogradOps, Gradients},
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

    /// A scalar that remembers how it was computed.
    fn recorded_loss(&self, window: &[u32]) -> Result<Tensor> {
        let mut window = window.to_vec();
        if let Some(bos) = self.bos {
            window[0] = bos;
        }
        let hidden = self.model.forward(&window, &mut self.model.state(window.len())?)?;
        let skip = self.protocol.skip;
        // Each row predicts the token after its own.
        let logits = self.model.logits(&hidden, skip - 1, window.len() - skip)?;
        self.ops.mean_cross_entropy(&logits, &window[skip..])
    }

    fn finite(&self, nll: f64) -> Result<f64> {
        if !nll.is_finite() {
            let why = "the model computes logits that are NaN or infinite, so its loss has no gradient".into();
            return Err(Error::Output { path: self.source.path().to_owned(), why });
        }
        Ok(nll)
    }
}
