//! The router of a mixture of experts: which experts see a token, and with which weight.

use std::cmp::Ordering;

use super::scratch::Buffer;

/// Chooses the `k` largest logits of each token and weighs them with their softmax (Mixtral's router).
///
/// `logits` is `[tokens, experts]`; `chosen` and `weights` are `[tokens, k]`, in descending order of logit. Of equal
/// logits the lower index comes first. NaN comes after everything else, and makes the weights NaN where it is chosen.
///
/// # Panics
/// If `k` is zero or more than `experts`, or the lengths do not fit together.
pub fn top_k(logits: &[f32], experts: usize, k: usize, chosen: &mut [u32], weights: &mut [f32]) {
    assert!((1..=experts).contains(&k), "{k} of {experts} experts");
    assert!(logits.len().is_multiple_of(experts), "logits are not whole rows of {experts}");
    let slots = logits.len() / experts * k;
    assert_eq!((chosen.len(), weights.len()), (slots, slots), "chosen and weights need {slots} elements");
    let mut order = Buffer::zeros(experts);
    let order: &mut [u32] = bytemuck::cast_slice_mut(&mut order);
    let slots = chosen.chunks_exact_mut(k).zip(weights.chunks_exact_mut(k));
    for (row, (chosen, weights)) in logits.chunks_exact(experts).zip(slots) {
        (0..).zip(order.iter_mut()).for_each(|(index, slot)| *slot = index);
        order.sort_unstable_by(|&a, &b| descending(row[a as usize], row[b as usize]).then(a.cmp(&b)));
        chosen.copy_from_slice(&order[..k]);
        let max = row[chosen[0] as usize];
        for (weight, &index) in weights.iter_mut().zip(chosen.iter()) {
            *weight = (row[index as usize] - max).exp();
        }
        let sum: f32 = weights.iter().sum();
        weights.iter_mut().for_each(|weight| *weight /= sum);
    }
}

fn descending(a: f32, b: f32) -> Ordering {
    b.partial_cmp(&a).unwrap_or_else(|| a.is_nan().cmp(&b.is_nan()))
}
