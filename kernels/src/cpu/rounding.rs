//! Activations rounded to INT8, block by block.

use std::ops::Range;

use super::Kernel;
use super::simd::{LANES, Simd};
use crate::matrix::Layout;

/// The columns that share one activation scale when activations are rounded to INT8.
///
/// Blocks restart at each weight group and are `min(group, 64)` columns wide; the last block of a group, and of the row,
/// may be shorter. So no block crosses a group, and at most 64 products of a code (at most 255) and an activation (at most
/// 127) add up to an integer that f32 holds exactly.
pub fn activation_blocks(group: usize, cols: usize) -> impl Iterator<Item = Range<usize>> {
    let mut start = 0;
    std::iter::from_fn(move || {
        let group_end = cols.min((start / group + 1).saturating_mul(group));
        let block = start..group_end.min(start + 64);
        start = block.end;
        (!block.is_empty()).then_some(block)
    })
}

/// A block and where it stands.
#[derive(Clone)]
pub(super) struct Block {
    pub(super) columns: Range<usize>,
    pub(super) group: usize,
    /// Where its codes start in units of four; each block is padded to whole units.
    pub(super) unit: usize,
}

impl Block {
    pub(super) fn units(&self) -> Range<usize> {
        self.unit..self.unit + self.columns.len().div_ceil(4)
    }
}

pub(super) fn blocks(layout: Layout, cols: usize) -> Vec<Block> {
    let mut unit = 0;
    activation_blocks(layout.group, cols)
        .map(|columns| {
            let block = Block { group: columns.start / layout.group, columns, unit };
            unit = block.units().end;
            block
        })
        .collect()
}

/// Rounds the activations of one token.
pub(super) struct Quantize<'a> {
    pub(super) x: &'a [f32], // [cols]
    pub(super) blocks: &'a [Block],
    pub(super) codes: &'a mut [[i8; 4]], // [units]
    pub(super) scales: &'a mut [f32],    // [blocks]
    pub(super) sums: &'a mut [f32],      // [blocks], of the codes; exact
}

impl Kernel for Quantize<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (i, block) in self.blocks.iter().enumerate() {
            let mut codes = [0; 64];
            self.scales[i] = round_block(simd, &self.x[block.columns.clone()], &mut codes);
            let codes = &codes[..4 * block.units().len()];
            self.codes[block.units()].as_flattened_mut().copy_from_slice(codes);
            self.sums[i] = codes.iter().map(|&code| i32::from(code)).sum::<i32>() as f32;
        }
    }
}

/// Rounds one block of at most 64 activations to INT8, halves to even, and gives its scale, `absmax / 127`: NaN, with codes
/// of zero, where an activation is not finite. What lies after the block in `codes` becomes zero.
///
/// A subnormal scale is itself rounded, so that a quotient may be beyond 127; it saturates.
#[inline(always)]
pub(super) fn round_block<S: Simd>(simd: S, x: &[f32], codes: &mut [i8; 64]) -> f32 {
    let mut padded;
    let x: &[f32; 64] = if let Ok(whole) = x.try_into() {
        whole
    } else {
        padded = [0.0; 64];
        padded[..x.len()].copy_from_slice(x);
        &padded
    };
    let (x, codes) = (x.as_chunks::<LANES>().0, codes.as_chunks_mut::<LANES>().0);
    let zero = simd.splat(0.0);
    let (mut most, mut poison) = (zero, zero);
    for x in x {
        let x = simd.load(x);
        most = simd.max(simd.abs(x), most);
        // Stays zero until infinity or NaN makes it NaN.
        poison = simd.mul_add(x, zero, poison);
    }
    let scale = simd.max_lane(most) / 127.0 + simd.sum(poison);
    for (x, codes) in x.iter().zip(codes) {
        let mut offset = [0x80; LANES];
        if scale > 0.0 {
            let rounded = simd.round_even(simd.div(simd.load(x), simd.splat(scale)));
            offset = simd.to_u8(simd.add(rounded, simd.splat(128.0)));
        }
        for (code, offset) in codes.iter_mut().zip(offset) {
            *code = (offset ^ 0x80) as i8;
        }
    }
    scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_restart_at_groups() {
        let blocks = |group, cols| activation_blocks(group, cols).collect::<Vec<_>>();
        assert_eq!(blocks(32, 70), [0..32, 32..64, 64..70]);
        assert_eq!(blocks(100, 230), [0..64, 64..100, 100..164, 164..200, 200..230]);
        assert_eq!(blocks(1, 3), [0..1, 1..2, 2..3]);
        assert_eq!(blocks(usize::MAX, 65), [0..64, 64..65]);
        assert_eq!(blocks(7, 0), []);
    }
}
