//! What a calibration sees of a model: the second moments of the inputs of its linear layers.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Mutex, PoisonError},
};

use bkpack_kernels::Cpu;

use crate::quant::hessian::Hessian;

/// Collects the inputs of linear layers while a model runs on the CPU; layers that share an input share its moments.
#[derive(Debug, Default)]
pub struct InputRecorder(Mutex<Recorded>);

#[derive(Debug, Default)]
struct Recorded {
    /// Names of weights that are asked for.
    wanted: BTreeSet<String>,
    /// Which input each weight sees.
    inputs: HashMap<String, usize>,
    moments: Vec<Moments>,
    /// The input that was recorded last.
    last: Option<(blake3::Hash, usize)>,
}

#[derive(Debug)]
struct Moments {
    hessian: Hessian,
    /// What was added last: the next weight that shares the input must not add it again.
    last: blake3::Hash,
}

impl InputRecorder {
    /// Forgets what was recorded and goes on with the inputs of these weights.
    pub fn start(&self, wanted: BTreeSet<String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Recorded { wanted, ..Recorded::default() };
    }

    /// Ends the recording: for each input the weights that see it and its second moments.
    pub fn finish(&self) -> Vec<(Vec<String>, Hessian)> {
        let mut recorded = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Recorded { inputs, moments, .. } = std::mem::take(&mut *recorded);
        let mut all: Vec<(Vec<String>, Hessian)> =
            moments.into_iter().map(|moments| (Vec::new(), moments.hessian)).collect();
        let mut inputs: Vec<_> = inputs.into_iter().collect();
        inputs.sort();
        inputs.into_iter().for_each(|(name, input)| all[input].0.push(name));
        all
    }

    /// Adds the input `[tokens, cols]` of a weight, if it is asked for.
    pub fn record(&self, cpu: Cpu, weight: &str, x: &[f32], cols: usize) {
        let mut recorded = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !recorded.wanted.contains(weight) || x.is_empty() {
            return;
        }
        let hash = blake3::Hasher::new().update_rayon(bytemuck::cast_slice(x)).finalize();
        let input = match (recorded.inputs.get(weight), recorded.last) {
            (Some(&input), _) => input,
            (None, Some((last, input))) if last == hash => input,
            (None, _) => {
                recorded.moments.push(Moments { hessian: Hessian::new(cols), last: blake3::Hash::from_bytes([0; 32]) });
                recorded.moments.len() - 1
            }
        };
        recorded.inputs.insert(weight.to_owned(), input);
        recorded.last = Some((hash, input));
        let moments = &mut recorded.moments[input];
        if moments.last != hash {
            moments.hessian.add(cpu, x);
            moments.last = hash;
        }
    }
}
