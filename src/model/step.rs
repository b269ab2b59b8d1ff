//! Token by token: a forward pass that a back end may record and repeat.

use super::{Model, Network, Pass, State};
use crate::{
    error::Result,
    ops::{Ops, Step},
};

impl<O: Ops> Model<'_, O> {
    /// Runs the next token of a text and copies its logits `[vocab_size]` to `out`: what [`forward`](Self::forward) and
    /// [`logits`](Self::logits) give, in one piece that a back end may record and repeat. The two agree within the rounding:
    /// a back end that repeats steps sums the experts of a mixture best first, a forward pass by their number.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    ///
    /// # Panics
    /// If the state was made by another model, or before this one was [reduced](Self::reduce) or its
    /// [core kept exact](Self::keep_core_exact).
    pub fn step(&self, token: u32, state: &mut State<O>, out: &mut Vec<f32>) -> Result<()> {
        assert_eq!(state.model, self.id, "a state is stepped by the model that made it");
        let ops = self.ops();
        // A text that runs whole has no next token; what a core computes is read while it runs.
        if !ops.repeats_steps() || self.runs_whole() || state.core.is_some() {
            let hidden = self.forward(&[token], state)?;
            return ops.read(&self.logits(&hidden, 0, 1)?, out);
        }
        self.check_next(&[token], state)?;
        let step = Step { token, position: state.positions };
        let mut graph = std::mem::take(&mut state.step);
        if let (Network::Llama(model), None) = (&self.network, &state.rotations) {
            state.rotations = Some(model.rotation(0, state.capacity)?);
        }
        ops.step(&mut graph, step, &mut || self.run_step(step, state), out)?;
        state.step = graph;
        state.positions += 1;
        Ok(())
    }

    /// The logits after one token, `[1, vocab_size]`.
    fn run_step(&self, step: Step, state: &mut State<O>) -> Result<O::Tensor> {
        let (x, rotation) = match (&self.network, &state.rotations) {
            (Network::Llama(model), Some(rotations)) => {
                let (x, rotation) = model.embed_step(step, rotations)?;
                (x, Some(rotation))
            }
            (Network::Llama(_), None) => unreachable!("steps of this architecture begin with the rotations"),
            (Network::Mamba(model), _) => (model.embed_step(step)?, None),
            (Network::ResNetBk(model), _) => (model.embed_step(step)?, None),
        };
        let pass = Pass { first: step.position, tokens: 1, rotation, step: Some(step) };
        let hidden = self.run(x, &pass, state)?;
        self.logits(&hidden, 0, 1)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use bkpack_kernels::Cpu;

    use super::*;
    use crate::{
        checkpoint::{self, Checkpoint},
        model::core_activations::{COMPONENT, scale_name},
        ops::cpu::{Activations, CpuOps},
        tensor::{ActivationQuantization, CalibrationText, Tensor, TensorSource, mixed::Mixed},
    };

    fn fixture(name: &str) -> Checkpoint {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/architectures");
        checkpoint::open(&folder.join(name)).unwrap()
    }

    /// A back end without steps of its own runs them by the operations that it has: the same bits as a forward pass.
    #[track_caller]
    fn assert_steps_are_forward_passes(name: &str, source: &dyn TensorSource) {
        let ops = CpuOps::new(Cpu::detect(), Activations::Exact);
        let model = Model::load(source, &ops).unwrap();
        assert_eq!(model.quantizes_core(), !source.activations().is_empty());
        let [mut forward, mut stepped] = [(); 2].map(|()| model.state(8).unwrap());
        if let Network::Llama(model) = &model.network {
            stepped.rotations = Some(model.rotation(0, 8).unwrap());
        }
        for (position, token) in [5, 9, 2, 6, 5, 3].into_iter().enumerate() {
            let hidden = model.forward(&[token], &mut forward).unwrap();
            let (mut expected, mut found) = (Vec::new(), Vec::new());
            ops.read(&model.logits(&hidden, 0, 1).unwrap(), &mut expected).unwrap();
            let logits = model.run_step(Step { token, position }, &mut stepped).unwrap();
            ops.read(&logits, &mut found).unwrap();
            assert_eq!(found, expected, "{name}, position {position}");
        }
    }

    #[test]
    fn a_step_is_a_forward_pass() {
        for name in ["mixtral", "mixtral_stacked", "qwen3", "mamba", "resnet_bk"] {
            assert_steps_are_forward_passes(name, &fixture(name));
        }
    }

    #[test]
    fn a_step_rounds_the_core_by_the_scales_of_its_position() {
        let source = fixture("resnet_bk");
        let positions = 8;
        let scales: Vec<f32> = (1..=3 * positions).map(|index| index as f32 / 64.0).collect(); // [3, positions]
        let record = ActivationQuantization {
            component: COMPONENT.into(),
            bits: 8,
            group_size: 1,
            positions: positions as u64,
            samples: 1,
            text: CalibrationText { name: String::new(), blake3: String::new() },
            scales: (0..3).map(scale_name).collect(),
        };
        let added = record.scales.iter().map(|name| (name.clone(), Tensor::floats(vec![3, positions], &scales)));
        let records = [record.clone()];
        let quantized = Mixed::new(&source, added.collect()).with_activations(&records);
        assert_steps_are_forward_passes("a quantized core", &quantized);
    }

    /// It would replay the rounding.
    #[test]
    #[should_panic(expected = "a state is stepped by the model that made it")]
    fn a_step_on_a_state_from_before_the_core_was_kept_exact() {
        let (source, ops) = (fixture("resnet_bk"), CpuOps::new(Cpu::detect(), Activations::Exact));
        let mut model = Model::load(&source, &ops).unwrap();
        let mut state = model.state(2).unwrap();
        let mut out = Vec::new();
        model.step(1, &mut state, &mut out).unwrap();
        model.keep_core_exact();
        model.step(1, &mut state, &mut out).unwrap();
    }
}
