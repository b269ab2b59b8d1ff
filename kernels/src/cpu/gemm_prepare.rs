//! Activations of many tokens, made ready once for all weights that take them in one form.

use super::Cpu;
use super::amx::{self, Amx};
use super::dequantize::zero_point;
use super::gemm_exact;
use super::gemm_int8;
use super::matmul::Shape;
use super::panel::grow;
use super::pool::for_each_piece;
use super::rounding::{Block, Quantize, blocks};
use crate::matrix::Layout;

/// The activations of a call, in the forms that its weights take. Memory for the most of them is kept for the next call.
#[derive(Default)]
pub(super) struct Prepared {
    interleaved: Vec<f32>,
    /// How many of these values are of this call.
    interleaved_len: usize,
    rounded: Vec<Rounded>,
    used: usize,
}

impl Prepared {
    /// Forgets what was made of earlier activations.
    pub(super) fn clear(&mut self) {
        self.interleaved_len = 0;
        self.used = 0;
    }

    /// Makes what [`interleaved`](Self::interleaved) gives.
    pub(super) fn interleave(&mut self, cpu: Cpu, x: &[f32], cols: usize) {
        if std::mem::replace(&mut self.interleaved_len, x.len()) == x.len() {
            return;
        }
        let height = cpu.dispatch(gemm_exact::RegisterShape).tokens;
        grow(&mut self.interleaved, x.len(), 0.0);
        for_each_piece(&mut self.interleaved[..x.len()], height * cols, |index, to| {
            let from = &x[index * height * cols..][..to.len()];
            let height = to.len() / cols;
            for (token, from) in from.chunks_exact(cols).enumerate() {
                scatter(from, &mut to[token..], height);
            }
        });
    }

    /// The tokens of each tile of `height` interleaved, so that a tile reads them in order: [tokens / height, cols, height].
    /// The last tile has as many tokens as remain.
    pub(super) fn interleaved(&self) -> &[f32] {
        &self.interleaved[..self.interleaved_len]
    }

    /// Rounds the activations to INT8 for weights of `layout`; gives what [`rounded`](Self::rounded) finds them by.
    pub(super) fn round(&mut self, cpu: Cpu, x: &[f32], cols: usize, layout: Layout) -> usize {
        let grid = layout.grid;
        let form = (layout.group, if grid.has_zero_points() { 1.0 } else { -zero_point(grid, &[], 0) });
        if let Some(index) = self.rounded[..self.used].iter().position(|rounded| rounded.form == form) {
            return index;
        }
        if self.rounded.len() == self.used {
            self.rounded.push(Rounded::default());
        }
        self.rounded[self.used].make(cpu, x, cols, layout, form);
        self.used += 1;
        self.used - 1
    }

    pub(super) fn rounded(&self, index: usize) -> &Rounded {
        &self.rounded[index]
    }
}

/// Rounded activations.
#[derive(Default)]
pub(super) struct Rounded {
    /// The group of the weights, and what [`Tile::starts`] are times the sums of the codes.
    form: (usize, f32),
    pub(super) blocks: Vec<Block>,
    /// Units of four codes of a token.
    pub(super) units: usize,
    pub(super) amx: Option<Amx>,
    tiles: Vec<Tile>,
    used: usize,
}

/// Some tokens that meet weights together: places for a power of two of them, all taken but for AMX.
#[derive(Default)]
pub(super) struct Tile {
    pub(super) first_token: usize,
    pub(super) tokens: usize,
    pub(super) places: usize,
    /// The bytes of four codes each. [units, places], or for AMX [places, units]
    pub(super) codes: Vec<i32>,
    pub(super) scales: Vec<f32>, // [blocks, places]
    /// Of the codes.
    pub(super) sums: Vec<f32>, // [blocks, places]
    /// The same, times the zero point that all weights share, negated; or just the same where there is none.
    pub(super) starts: Vec<i32>, // [blocks, places]
    token: Token,
}

/// What one token is rounded to.
#[derive(Default)]
struct Token {
    codes: Vec<i32>,  // [units]
    scales: Vec<f32>, // [blocks]
    sums: Vec<f32>,   // [blocks]
}

impl Rounded {
    /// In the order of the tokens.
    pub(super) fn tiles(&self) -> &[Tile] {
        &self.tiles[..self.used]
    }

    /// The tile that products with these activations span.
    pub(super) fn shape(&self, cpu: Cpu) -> Shape {
        match self.amx {
            Some(_) => Shape { tokens: amx::TOKENS, vectors: amx::VECTORS },
            None => cpu.dispatch(gemm_int8::RegisterShape),
        }
    }

    fn make(&mut self, cpu: Cpu, x: &[f32], cols: usize, layout: Layout, form: (usize, f32)) {
        self.form = form;
        self.blocks = blocks(layout, cols);
        self.amx = cpu.amx.filter(|_| amx::pays(&self.blocks));
        self.units = match self.amx {
            Some(_) => amx::pad(&mut self.blocks),
            None => self.blocks.last().map_or(0, |block| block.units().end),
        };
        let most = self.shape(cpu).tokens;
        let tokens = x.len() / cols;
        self.used = 0;
        let mut first_token = 0;
        while first_token < tokens {
            if self.tiles.len() == self.used {
                self.tiles.push(Tile::default());
            }
            let tile = &mut self.tiles[self.used];
            let remaining = tokens - first_token;
            tile.first_token = first_token;
            tile.tokens = match self.amx {
                Some(_) => remaining.min(most),
                None if remaining >= most => most,
                None => 1 << remaining.ilog2(),
            };
            tile.places = if self.amx.is_some() { most } else { tile.tokens };
            first_token += tile.tokens;
            self.used += 1;
        }
        let Self { ref blocks, units, amx, ref mut tiles, used, .. } = *self;
        for_each_piece(&mut tiles[..used], 1, |_, tile| {
            for tile in tile {
                let x = &x[tile.first_token * cols..][..tile.tokens * cols];
                tile.round(cpu, x, cols, (blocks, units), amx.is_some(), form.1);
            }
        });
    }
}

impl Tile {
    fn round(
        &mut self,
        cpu: Cpu,
        x: &[f32],
        cols: usize,
        (blocks, units): (&[Block], usize),
        by_token: bool,
        factor: f32,
    ) {
        let Self { places, ref mut codes, ref mut scales, ref mut sums, ref mut starts, token: ref mut one, .. } =
            *self;
        zeros(&mut one.codes, units);
        zeros(&mut one.scales, blocks.len());
        zeros(&mut one.sums, blocks.len());
        zeros(codes, places * units);
        zeros(scales, places * blocks.len());
        zeros(sums, places * blocks.len());
        zeros(starts, places * blocks.len());
        for (token, x) in x.chunks_exact(cols).enumerate() {
            let rounded = bytemuck::cast_slice_mut(&mut one.codes);
            cpu.dispatch(Quantize { x, blocks, codes: rounded, scales: &mut one.scales, sums: &mut one.sums });
            if by_token {
                codes[token * units..][..units].copy_from_slice(&one.codes);
            } else {
                scatter(&one.codes, &mut codes[token..], places);
            }
            scatter(&one.scales, &mut scales[token..], places);
            scatter(&one.sums, &mut sums[token..], places);
            for (&sum, start) in one.sums.iter().zip(starts[token..].iter_mut().step_by(places)) {
                *start = (factor * sum) as i32;
            }
        }
    }
}

fn zeros<T: Copy + Default>(values: &mut Vec<T>, count: usize) {
    values.clear();
    values.resize(count, T::default());
}

fn scatter<T: Copy>(from: &[T], to: &mut [T], stride: usize) {
    for (to, &from) in to.iter_mut().step_by(stride).zip(from) {
        *to = from;
    }
}
