//! Running a model with less compute than it was made for.

use serde::Serialize;

use super::{Model, Network, new_id};
use crate::{
    error::{Error, Result},
    ops::Ops,
};

/// What to leave out of a forward pass; by default nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub struct Reduction {
    /// Blocks that are left out: what enters them goes on to the next.
    pub skipped_layers: Vec<usize>,
    /// Of a mixture: how many experts each token goes through.
    pub experts_per_token: Option<usize>,
    /// Of attention: how many positions a token sees at most, its own included.
    pub attention_window: Option<usize>,
}

/// What of a model can be reduced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compute {
    pub layers: usize,
    /// `None` where there is no mixture of experts.
    pub experts_per_token: Option<usize>,
    /// The widest window of a layer, `usize::MAX` where it sees the whole context; `None` where there is no attention.
    pub attention_window: Option<usize>,
}

impl<O: Ops> Model<'_, O> {
    /// What can be reduced.
    pub fn compute(&self) -> Compute {
        let (experts_per_token, attention_window) = match &self.network {
            Network::Llama(model) => {
                let config = model.config();
                (config.experts.map(|experts| experts.chosen), config.windows.iter().copied().max())
            }
            Network::Mamba(_) => (None, None),
            Network::ResNetBk(model) => (Some(model.config().experts.chosen), None),
        };
        Compute { layers: self.layers(), experts_per_token, attention_window }
    }

    /// Leaves out what `reduction` says; the layers that stay are numbered anew.
    ///
    /// # Errors
    /// [`Error::Reduction`] for a layer that is not there, for no layer left, for experts or a window that the model does
    /// not have or that are none or more than it has.
    pub fn reduce(&mut self, reduction: &Reduction) -> Result<()> {
        let compute = self.compute();
        let wrong = |why: String| Err(Error::Reduction { path: self.path.to_owned(), why });
        let kept: Vec<bool> = (0..compute.layers).map(|layer| !reduction.skipped_layers.contains(&layer)).collect();
        if let Some(layer) = reduction.skipped_layers.iter().find(|&&layer| layer >= compute.layers) {
            return wrong(format!("there is no layer {layer} to skip"));
        }
        if !kept.contains(&true) {
            return wrong("one layer at least must stay".into());
        }
        let within = |asked: Option<usize>, most: Option<usize>| {
            asked.is_none_or(|asked| most.is_some_and(|most| (1..=most).contains(&asked)))
        };
        if !within(reduction.experts_per_token, compute.experts_per_token) {
            return wrong("it has no mixture with as many experts for a token".into());
        }
        if !within(reduction.attention_window, compute.attention_window) {
            return wrong("it has no attention with so wide a window".into());
        }
        match &mut self.network {
            Network::Llama(model) => model.reduce(&kept, reduction),
            Network::Mamba(model) => model.reduce(&kept),
            Network::ResNetBk(model) => model.reduce(&kept, reduction),
        }
        self.id = new_id();
        Ok(())
    }
}

/// Keeps the items whose flag is set.
pub(super) fn retain<T>(items: &mut Vec<T>, kept: &[bool]) {
    let mut kept = kept.iter();
    items.retain(|_| *kept.next().expect("a flag each"));
}
