//! Activations as the products of a few tokens read them: prepared once a call, for all rows.
//!
//! Everything follows steps of 64 columns in which lane `l` of the vector holds columns `4l` to `4l + 3`. Where groups are
//! whole steps ([`Scaling::Steps`]) the scales of a step are one number each. Otherwise ([`Scaling::Lanes`]) each lane has
//! scales of its own; a lane that several blocks of columns meet has a plane for each, with zeros in the others' columns.

use super::Kernel;
use super::matmul_int8::{activation_blocks, round_block};
use super::simd::{LANES, Simd};
use crate::matrix::{Grid, Layout};

/// Columns of a step.
pub(super) const STEP: usize = 64;

/// Columns of a lane.
const LANE: usize = STEP / LANES;

/// How scales lie over the lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scaling {
    /// No step meets two groups or two blocks of activations.
    Steps,
    /// Any other group size.
    Lanes { group: usize },
}

impl Scaling {
    pub(super) fn of(layout: Layout, cols: usize) -> Self {
        let group = layout.group;
        if group.is_multiple_of(STEP) || group >= cols { Self::Steps } else { Self::Lanes { group } }
    }
}

/// What a matrix needs its activations to look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// f32 in the order of the columns.
    Natural,
    /// f32 by columns of a lane.
    Interleaved(Scaling),
    /// INT8 with the sums that a zero point meets: of all groups, or of none.
    Rounded { scaling: Scaling, zero: Option<i32> },
    /// As `Rounded`, in steps of 128 columns in which lane `l` has columns `8l` to `8l + 7`: for codes of four bits.
    Nibbles { zero: Option<i32> },
}

impl Form {
    /// The form in which weights of `layout` take rounded activations.
    pub(super) fn rounded(layout: Layout, cols: usize, zero: Option<i32>) -> Self {
        let whole_steps = layout.group.is_multiple_of(2 * STEP) || layout.group >= cols;
        match layout.grid {
            Grid::Int { bits: 4, .. } if whole_steps => Self::Nibbles { zero },
            _ => Self::Rounded { scaling: Scaling::of(layout, cols), zero },
        }
    }

    /// Whether the scales of a step are one number each.
    pub(super) fn scales_steps(self) -> bool {
        matches!(self, Self::Interleaved(Scaling::Steps) | Self::Rounded { scaling: Scaling::Steps, .. })
    }
}

/// The activations of all tokens.
#[derive(Default)]
pub(super) struct Prepared {
    pub(super) form: Option<Form>,
    pub(super) tokens: usize,
    pub(super) steps: usize,
    /// Planes of a step; 1 but for groups that are not multiples of four.
    pub(super) planes: usize,
    /// For each lane, its group, counted from that of the step's first column; with [`Scaling::Lanes`]. [steps, planes]
    pub(super) groups: Vec<[i32; LANES]>,
    /// The group of each step's first column; with [`Scaling::Lanes`]. [steps]
    pub(super) first_groups: Vec<usize>,
    /// [`Form::Natural`]: [tokens, steps, 4, LANES], padded with zeros. [`Form::Interleaved`]: [tokens, steps, planes, 4,
    /// LANES], where vector `k` has column `k` of each lane.
    pub(super) floats: Vec<[[f32; LANES]; LANE]>,
    /// [`Form::Rounded`], and the rest too: in the order of the columns. [tokens, steps, planes]
    ///
    /// [`Form::Nibbles`]: the even columns, then the odd ones. [tokens, steps, 2]
    pub(super) codes: Vec<[i8; STEP]>,
    /// The constant zero point times minus the sum of each lane's codes. [tokens, steps, planes]
    pub(super) starts: Vec<[i32; LANES]>,
    /// The sum of each lane's codes; without a constant zero point. [tokens, steps, planes]
    pub(super) sums: Vec<[f32; LANES]>,
    /// Scales of whole steps. [tokens, steps]
    pub(super) scales: Vec<f32>,
    /// Scales of lanes. [tokens, steps, planes]
    pub(super) lane_scales: Vec<[f32; LANES]>,
}

/// Prepares whole rows of activations.
pub(super) struct Prepare<'a> {
    pub(super) x: &'a [f32], // [tokens, cols]
    pub(super) cols: usize,
    pub(super) form: Form,
    pub(super) to: &'a mut Prepared,
}

impl Kernel for Prepare<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { x, cols, form, to } = self;
        to.form = Some(form);
        to.tokens = x.len() / cols;
        to.steps = cols.div_ceil(STEP);
        to.planes = 1;
        let scaling = match form {
            Form::Natural => return to.natural(x, cols),
            Form::Nibbles { zero } => return to.round_nibbles(simd, x, cols, zero),
            Form::Interleaved(scaling) | Form::Rounded { scaling, .. } => scaling,
        };
        if let Scaling::Lanes { group } = scaling {
            to.lay_out(group, cols);
        }
        match form {
            Form::Rounded { zero, .. } => to.round(simd, x, cols, scaling, zero),
            _ => to.interleave(x, cols, scaling),
        }
    }
}

/// Calls `work` with each lane that meets `columns`, its columns among them and its plane. `before` is the last lane and
/// plane of the block before.
#[inline(always)]
fn each_lane(
    columns: &std::ops::Range<usize>,
    before: &mut Option<(usize, usize)>,
    mut work: impl FnMut(usize, std::ops::Range<usize>, usize),
) {
    for lane in columns.start / LANE..columns.end.div_ceil(LANE) {
        let plane = match *before {
            Some((last, plane)) if last == lane => plane + 1,
            _ => 0,
        };
        *before = Some((lane, plane));
        work(lane, columns.start.max(lane * LANE)..columns.end.min((lane + 1) * LANE), plane);
    }
}

impl Prepared {
    fn slots(&self) -> usize {
        self.steps * self.planes * self.tokens
    }

    fn natural(&mut self, x: &[f32], cols: usize) {
        self.floats.clear();
        self.floats.resize(self.slots(), [[0.0; LANES]; LANE]);
        for (token, x) in x.chunks_exact(cols).enumerate() {
            for (step, x) in x.chunks(STEP).enumerate() {
                self.floats[token * self.steps + step].as_flattened_mut()[..x.len()].copy_from_slice(x);
            }
        }
    }

    /// Counts the planes and finds the group of each lane.
    fn lay_out(&mut self, group: usize, cols: usize) {
        let mut before = None;
        for columns in activation_blocks(group, cols) {
            each_lane(&columns, &mut before, |_, _, plane| self.planes = self.planes.max(plane + 1));
        }
        self.first_groups.clear();
        self.first_groups.extend((0..self.steps).map(|step| step * STEP / group));
        self.groups.clear();
        self.groups.resize(self.steps * self.planes, [0; LANES]);
        before = None;
        for columns in activation_blocks(group, cols) {
            each_lane(&columns, &mut before, |lane, columns, plane| {
                let step = lane / LANES;
                let from_first = columns.start / group - self.first_groups[step];
                self.groups[step * self.planes + plane][lane % LANES] = from_first as i32;
            });
        }
    }

    fn interleave(&mut self, x: &[f32], cols: usize, scaling: Scaling) {
        let (steps, planes) = (self.steps, self.planes);
        self.floats.clear();
        self.floats.resize(self.slots(), [[0.0; LANES]; LANE]);
        for (token, x) in x.chunks_exact(cols).enumerate() {
            match scaling {
                Scaling::Lanes { group } if planes > 1 => {
                    let mut before = None;
                    for block in activation_blocks(group, cols) {
                        each_lane(&block, &mut before, |lane, columns, plane| {
                            let to = &mut self.floats[(token * steps + lane / LANES) * planes + plane];
                            for column in columns {
                                to[column % LANE][lane % LANES] = x[column];
                            }
                        });
                    }
                }
                _ => {
                    for (step, x) in x.chunks(STEP).enumerate() {
                        let to = &mut self.floats[token * steps + step];
                        let (fours, rest) = x.as_chunks::<LANE>();
                        for (lane, four) in fours.iter().enumerate() {
                            for (to, &value) in to.iter_mut().zip(four) {
                                to[lane] = value;
                            }
                        }
                        for (to, &value) in to.iter_mut().zip(rest) {
                            to[fours.len()] = value;
                        }
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn round<S: Simd>(&mut self, simd: S, x: &[f32], cols: usize, scaling: Scaling, zero: Option<i32>) {
        let (slots, steps, planes) = (self.slots(), self.steps, self.planes);
        self.codes.clear();
        self.codes.resize(slots, [0; STEP]);
        self.scales.clear();
        self.lane_scales.clear();
        match scaling {
            Scaling::Steps => self.scales.resize(slots, 0.0),
            Scaling::Lanes { .. } => self.lane_scales.resize(slots, [0.0; LANES]),
        }
        for (token, x) in x.chunks_exact(cols).enumerate() {
            match scaling {
                Scaling::Steps => {
                    for (step, x) in x.chunks(STEP).enumerate() {
                        let slot = token * steps + step;
                        self.scales[slot] = round_block(simd, x, &mut self.codes[slot]);
                    }
                }
                Scaling::Lanes { group } => {
                    let mut before = None;
                    for block in activation_blocks(group, cols) {
                        let mut rounded = [0; STEP];
                        let scale = round_block(simd, &x[block.clone()], &mut rounded);
                        each_lane(&block, &mut before, |lane, columns, plane| {
                            let slot = (token * steps + lane / LANES) * planes + plane;
                            self.lane_scales[slot][lane % LANES] = scale;
                            for column in columns {
                                self.codes[slot][column % STEP] = rounded[column - block.start];
                            }
                        });
                    }
                }
            }
        }
        self.add_lanes::<1>(zero);
    }

    /// The rounding of [`round`](Self::round) where blocks are of 64 columns.
    #[inline(always)]
    fn round_nibbles<S: Simd>(&mut self, simd: S, x: &[f32], cols: usize, zero: Option<i32>) {
        const COLUMNS: usize = 2 * STEP;
        self.steps = cols.div_ceil(COLUMNS);
        let slots = self.slots();
        self.codes.clear();
        self.codes.resize(2 * slots, [0; STEP]);
        self.scales.clear();
        self.lane_scales.clear();
        self.lane_scales.resize(slots, [0.0; LANES]);
        let pairs = self.codes.as_chunks_mut::<2>().0;
        for (x, (pairs, scales)) in
            x.chunks_exact(cols).zip(pairs.chunks_mut(self.steps).zip(self.lane_scales.chunks_mut(self.steps)))
        {
            for (x, ([even, odd], scales)) in x.chunks(COLUMNS).zip(pairs.iter_mut().zip(scales)) {
                for (half, x) in x.chunks(STEP).enumerate() {
                    let mut codes = [0; STEP];
                    scales[half * LANES / 2..][..LANES / 2].fill(round_block(simd, x, &mut codes));
                    for (i, codes) in codes.as_chunks::<2>().0.iter().enumerate() {
                        [even[half * STEP / 2 + i], odd[half * STEP / 2 + i]] = *codes;
                    }
                }
            }
        }
        self.add_lanes::<2>(zero);
    }

    /// What a zero point meets: the codes of each lane, added over `VECTORS` vectors of them.
    fn add_lanes<const VECTORS: usize>(&mut self, zero: Option<i32>) {
        self.starts.clear();
        self.sums.clear();
        let lane_sums = |vectors: &[[i8; STEP]; VECTORS]| {
            let mut sums = [0; LANES];
            for codes in vectors {
                for (sum, codes) in sums.iter_mut().zip(codes.as_chunks::<LANE>().0) {
                    *sum += codes.iter().map(|&code| i32::from(code)).sum::<i32>();
                }
            }
            sums
        };
        let slots = self.codes.as_chunks::<VECTORS>().0;
        match zero {
            Some(zero) => self.starts.extend(slots.iter().map(|slot| lane_sums(slot).map(|sum| -zero * sum))),
            None => self.sums.extend(slots.iter().map(|slot| lane_sums(slot).map(|sum| sum as f32))),
        }
    }
}
