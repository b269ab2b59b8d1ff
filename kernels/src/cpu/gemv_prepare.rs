//! Activations as the products of a few tokens read them: prepared once a call, for all rows.
//!
//! In general, steps are of 64 columns, of which lane `l` of the vector holds columns `4l` to `4l + 3`. Usually a lane has one
//! scale ([`Scaling::Steps`]). Otherwise ([`Scaling::Lanes`]) a lane that several blocks of columns meet has a plane for
//! each, with zeros in the others' columns.
//!
//! Where no lane meets two blocks, steps and lanes are those that the codes are unpacked to fastest: for activations as they
//! are times four bits ([`Form::Eights`]), and for rounded ones ([`Form::Wide`]).

use super::Kernel;
use super::gemv_codes::{TERNARY_COLUMNS, TERNARY_WIDE, WIDE, ternary_phase};
use super::rounding::{activation_blocks, round_block};
use super::simd::{Aligned, LANES, Simd};
use crate::bits::TERNARY_PER_BYTE;
use crate::matrix::{Grid, Layout};

/// Columns of a step.
pub(super) const STEP: usize = 64;

/// Columns of a lane.
const LANE: usize = STEP / LANES;

/// Columns of a lane in a step of 128.
pub(super) const EIGHT: usize = WIDE / LANES;

/// The activations of such a step: those of column `k` of all lanes.
pub(super) type Eights = [[f32; LANES]; EIGHT];

/// How scales lie over the lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scaling {
    /// Steps are whole groups or groups whole steps, and no lane meets two groups.
    Steps,
    /// Any other group size.
    Lanes { group: usize },
}

impl Scaling {
    pub(super) fn of(layout: Layout, cols: usize) -> Self {
        let group = layout.group;
        if Order::Single.takes(group, cols) { Self::Steps } else { Self::Lanes { group } }
    }
}

/// What a matrix needs its activations to look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// f32 in the order of the columns.
    Natural,
    /// f32 by columns of a lane.
    Interleaved(Scaling),
    /// f32 in steps of 128 columns, of which a lane has eight, by columns of a lane.
    Eights,
    /// INT8 with lanes that have scales of their own, and the sums that a zero point meets: of all groups, or of none.
    Rounded { group: usize, zero: Option<i32> },
    /// INT8 in steps of one or more blocks of `block` columns, each of which has lanes of its own.
    Wide { order: Order, block: usize, zero: Option<i32> },
}

/// How columns lie in the vectors of a wide step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// 64 columns as they come.
    Single,
    /// 128 columns: the even ones, then the odd ones.
    Nibbles,
    /// 128 columns: 0 to 31 and 64 to 95, then the rest.
    Halves,
    /// 256 columns, in a vector for each of the five that share a byte.
    Ternary,
}

impl Order {
    /// Columns of a step.
    pub(super) const fn columns(self) -> usize {
        match self {
            Self::Single => STEP,
            Self::Nibbles | Self::Halves => WIDE,
            Self::Ternary => TERNARY_WIDE,
        }
    }

    /// Whether steps are whole groups, or groups whole steps (a row of one group is both), and no lane has columns of two.
    fn takes(self, group: usize, cols: usize) -> bool {
        // Columns of the fewest lanes that a group has for itself.
        let least = match self {
            Self::Single => LANE,
            Self::Nibbles => 2 * LANE,
            Self::Halves | Self::Ternary => STEP,
        };
        let columns = self.columns();
        group >= cols || group.is_multiple_of(columns) || group.is_multiple_of(least) && columns.is_multiple_of(group)
    }
}

impl Form {
    /// The form in which weights of `layout` take activations as they are.
    pub(super) fn exact(layout: Layout, cols: usize) -> Self {
        let eights = matches!(layout.grid, Grid::Int { bits: 4, .. });
        if eights && Order::Nibbles.takes(layout.group, cols) {
            Self::Eights
        } else {
            Self::Interleaved(Scaling::of(layout, cols))
        }
    }

    /// The form in which weights of `layout` take rounded activations.
    pub(super) fn rounded(layout: Layout, cols: usize, zero: Option<i32>) -> Self {
        let group = layout.group;
        let order = match layout.grid {
            Grid::Int { bits: 4, .. } => Order::Nibbles,
            Grid::Ternary => Order::Ternary,
            _ if group < STEP && group < cols => Order::Single,
            _ => Order::Halves,
        };
        if order.takes(group, cols) {
            let block = if group < cols { group.min(STEP) } else { STEP };
            Self::Wide { order, block, zero }
        } else {
            Self::Rounded { group, zero }
        }
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
    pub(super) floats: Vec<Aligned<[[f32; LANES]; LANE]>>,
    /// [`Form::Eights`]: vector `k` has column `k` of each lane, padded with zeros. [tokens, steps]
    pub(super) eights: Vec<Aligned<Eights>>,
    /// [`Form::Rounded`], and the rest too: in the order of the columns. [tokens, steps, planes]
    ///
    /// [`Form::Wide`]: [tokens, steps, vectors of a step], in its order.
    pub(super) codes: Vec<Aligned<[i8; STEP]>>,
    /// The constant zero point times minus the sum of each lane's codes. [tokens, steps, planes]
    pub(super) starts: Vec<Aligned<[i32; LANES]>>,
    /// The sum of each lane's codes; without a constant zero point. [tokens, steps, planes]
    pub(super) sums: Vec<Aligned<[f32; LANES]>>,
    /// The scale of each lane's codes. [tokens, steps, planes]
    pub(super) scales: Vec<Aligned<[f32; LANES]>>,
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
        if let Form::Interleaved(Scaling::Lanes { group }) | Form::Rounded { group, .. } = form {
            to.lay_out(group, cols);
        }
        match form {
            Form::Natural => to.natural(x, cols),
            Form::Interleaved(scaling) => to.interleave(x, cols, scaling),
            Form::Eights => to.eights(x, cols),
            Form::Rounded { group, zero } => to.round(simd, x, cols, group, zero),
            Form::Wide { order, block, zero } => match order {
                Order::Single => to.round_wide::<S, 1>(simd, x, cols, order, block, zero),
                Order::Nibbles | Order::Halves => to.round_wide::<S, 2>(simd, x, cols, order, block, zero),
                Order::Ternary => to.round_wide::<S, TERNARY_PER_BYTE>(simd, x, cols, order, block, zero),
            },
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
        self.floats.resize(self.slots(), Aligned([[0.0; LANES]; LANE]));
        for (token, x) in x.chunks_exact(cols).enumerate() {
            for (step, x) in x.chunks(STEP).enumerate() {
                self.floats[token * self.steps + step].as_flattened_mut()[..x.len()].copy_from_slice(x);
            }
        }
    }

    fn eights(&mut self, x: &[f32], cols: usize) {
        self.steps = cols.div_ceil(WIDE);
        self.eights.clear();
        self.eights.resize(self.slots(), Aligned([[0.0; LANES]; EIGHT]));
        for (x, to) in x.chunks_exact(cols).flat_map(|x| x.chunks(WIDE)).zip(&mut self.eights) {
            let (lanes, rest) = x.as_chunks::<EIGHT>();
            for (lane, x) in lanes.iter().map(|x| &x[..]).chain([rest]).enumerate() {
                for (to, &x) in to.iter_mut().zip(x) {
                    to[lane] = x;
                }
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
        self.floats.resize(self.slots(), Aligned([[0.0; LANES]; LANE]));
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
    fn round<S: Simd>(&mut self, simd: S, x: &[f32], cols: usize, group: usize, zero: Option<i32>) {
        let (slots, steps, planes) = (self.slots(), self.steps, self.planes);
        self.codes.clear();
        self.codes.resize(slots, Aligned([0; STEP]));
        self.scales.clear();
        self.scales.resize(slots, Aligned([0.0; LANES]));
        for (token, x) in x.chunks_exact(cols).enumerate() {
            let mut before = None;
            for block in activation_blocks(group, cols) {
                let mut rounded = [0; STEP];
                let scale = round_block(simd, &x[block.clone()], &mut rounded);
                each_lane(&block, &mut before, |lane, columns, plane| {
                    let slot = (token * steps + lane / LANES) * planes + plane;
                    self.scales[slot][lane % LANES] = scale;
                    for column in columns {
                        self.codes[slot][column % STEP] = rounded[column - block.start];
                    }
                });
            }
        }
        self.add_lanes::<S, 1>(simd, zero);
    }

    /// The rounding of [`round`](Self::round) where blocks have lanes of their own.
    #[inline(always)]
    fn round_wide<S: Simd, const VECTORS: usize>(
        &mut self,
        simd: S,
        x: &[f32],
        cols: usize,
        order: Order,
        block: usize,
        zero: Option<i32>,
    ) {
        let columns = order.columns();
        self.steps = cols.div_ceil(columns);
        let slots = self.slots();
        self.codes.clear();
        self.codes.resize(VECTORS * slots, Aligned([0; STEP]));
        self.scales.clear();
        self.scales.resize(slots, Aligned([0.0; LANES]));
        let vectors = self.codes.as_chunks_mut::<VECTORS>().0;
        let lanes = LANES * block / columns;
        for (token, x) in x.chunks_exact(cols).enumerate() {
            for (step, x) in x.chunks(columns).enumerate() {
                let slot = token * self.steps + step;
                // In the order of the columns; each block is rounded with zeros up to 64.
                let mut codes = [0; TERNARY_WIDE + STEP];
                for (i, x) in x.chunks(block).enumerate() {
                    let Some(rounded) = codes[i * block..].first_chunk_mut() else { unreachable!("there is room") };
                    self.scales[slot][i * lanes..][..lanes].fill(round_block(simd, x, rounded));
                }
                let vectors = &mut vectors[slot];
                match order {
                    Order::Single => vectors[0].copy_from_slice(&codes[..STEP]),
                    Order::Nibbles => {
                        for (i, pair) in codes[..WIDE].as_chunks::<2>().0.iter().enumerate() {
                            [vectors[0][i], vectors[1][i]] = *pair;
                        }
                    }
                    Order::Halves => {
                        for (i, codes) in codes[..WIDE].as_chunks::<32>().0.iter().enumerate() {
                            vectors[i % 2][i / 2 * 32..][..32].copy_from_slice(codes);
                        }
                    }
                    Order::Ternary => {
                        for (&at, &code) in TERNARY_COLUMNS[ternary_phase(step)].iter().zip(&codes) {
                            vectors[usize::from(at) / STEP][usize::from(at) % STEP] = code;
                        }
                    }
                }
            }
        }
        self.add_lanes::<S, VECTORS>(simd, zero);
    }

    /// What a zero point meets: the codes of each lane, added over `VECTORS` vectors of them.
    #[inline(always)]
    fn add_lanes<S: Simd, const VECTORS: usize>(&mut self, simd: S, zero: Option<i32>) {
        let slots = self.codes.as_chunks::<VECTORS>().0;
        self.starts.clear();
        self.sums.clear();
        match zero {
            Some(_) => self.starts.resize(slots.len(), Aligned([0; LANES])),
            None => self.sums.resize(slots.len(), Aligned([0.0; LANES])),
        }
        let [ones, _] = simd.nibbles(&[0x11; STEP]);
        for (i, slot) in slots.iter().enumerate() {
            let mut sum = simd.splat_i32(0);
            for codes in slot {
                sum = simd.dot_codes(ones, codes, sum, false);
            }
            match zero {
                Some(zero) => simd.store_i32(simd.mul_i32(sum, simd.splat_i32(-zero)), &mut self.starts[i]),
                None => simd.store(simd.i32_to_f32(sum), &mut self.sums[i]),
            }
        }
    }
}
