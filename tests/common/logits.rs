//! Logits of a model on any back end.

use bkpack::{model::Model, ops::Ops, tensor::TensorSource};

/// The logits of all positions, computed in batches of so many tokens: `[tokens, vocab_size]`.
pub fn logits<O: Ops>(source: &dyn TensorSource, ops: &O, tokens: &[u32], batch: usize) -> Vec<f32> {
    let model = Model::load(source, ops).unwrap();
    let mut state = model.state(tokens.len()).unwrap();
    let mut all = Vec::new();
    for batch in tokens.chunks(batch) {
        let hidden = model.forward(batch, &mut state).unwrap();
        let mut logits = Vec::new();
        ops.read(&model.logits(&hidden, 0, batch.len()).unwrap(), &mut logits).unwrap();
        all.extend(logits);
    }
    all
}
