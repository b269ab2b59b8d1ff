//! Products of a few tokens: one weight or several over the same activations.
//!
//! Activations are prepared once a call, in the form that the weights need; then tasks of some rows each read every
//! packed byte once. See [`gemv_exact`](super::gemv_exact), [`gemv_short`](super::gemv_short),
//! [`gemv_eights`](super::gemv_eights), [`gemv_wide`](super::gemv_wide) and [`gemv_int8`](super::gemv_int8) for the order of the
//! sums.

use std::cell::RefCell;
use std::ops::Range;

use super::Cpu;
use super::ahead::announce;
use super::gemv_codes::{Bytes, Decode, Halves, Hold, Nibbles, Single, Stream, Ternary, TernaryBlocks, Wide};
use super::gemv_eights::EightsProduct;
use super::gemv_exact::{BF16, ExactProduct, F16, F32, FloatProduct};
use super::gemv_int8::RoundedProduct;
use super::gemv_prepare::{Form, Order, Prepare, Prepared, Scaling};
use super::gemv_row::{Scratch, Task, constant_zero};
use super::gemv_short::ShortProduct;
use super::gemv_wide::WideProduct;
use super::matmul::Output;
use super::pool::for_each_in_shares;
use super::simd::LANES;
use crate::matrix::{Data, FloatType, Grid, Layout, Matrix};

/// The most tokens that are a few.
pub(super) const MAX_TOKENS: usize = 7;

/// Weight bytes of a task: few enough that threads end together.
const BYTES_A_TASK: std::ops::RangeInclusive<usize> = 1 << 14..=1 << 17;

/// Tasks for each thread, within [`BYTES_A_TASK`].
const TASKS_A_THREAD: usize = 8;

/// Weights of one parallel region.
pub(super) const WEIGHTS_AT_A_TIME: usize = 8;

/// How a matrix product takes its activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Arithmetic {
    /// As they are, in f32: [`Cpu::matmul`].
    Exact,
    /// Rounded to INT8 where the weights have codes: [`Cpu::matmul_int8`].
    Int8,
}

thread_local! {
    /// Of the last call, kept for its memory.
    static PREPARED: RefCell<Vec<Prepared>> = const { RefCell::new(Vec::new()) };
    /// What a thread keeps for the rows at hand.
    static SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch::new()) };
}

/// The form in which `w` takes its activations.
fn form(w: &Matrix, arithmetic: Arithmetic) -> Form {
    let Data::Quantized { layout, .. } = w.data() else { return Form::Natural };
    match arithmetic {
        Arithmetic::Exact => Form::exact(layout, w.cols()),
        Arithmetic::Int8 => Form::rounded(layout, w.cols(), constant_zero(layout.grid).map(|zero| zero as i32)),
    }
}

/// Whether no step meets two groups, where groups are whole steps or steps whole groups.
fn uniform<H: Hold>(layout: Layout, w: &Matrix) -> bool {
    layout.group >= H::COLUMNS.min(w.cols())
}

/// One weight of a call, split into tasks of some rows.
struct Job<'a> {
    w: &'a Matrix<'a>,
    /// Which of the prepared activations it takes.
    x: usize,
    out: Output<'a>,
    rows_a_task: usize,
    /// The number of the first task after this weight's.
    end: usize,
}

impl Cpu {
    /// `out = w * x` on the calling thread alone: bit for bit what [`matmul`](Self::matmul) gives for one token. `x` is
    /// `[cols]`, `out` is `[rows]`.
    ///
    /// # Panics
    /// If `x` or `out` has another length.
    pub fn matvec(self, x: &[f32], w: &Matrix, out: &mut [f32]) {
        assert_eq!((x.len(), out.len()), (w.cols(), w.rows()), "the vectors do not fit the matrix");
        if x.is_empty() || out.is_empty() {
            out.fill(0.0);
            return;
        }
        let mut prepared = PREPARED.take();
        let index = self.prepare(&mut prepared, &mut 0, x, w.cols(), form(w, Arithmetic::Exact));
        self.rows(w, &prepared[index], 0..w.rows(), &Output::new(out, 1, w.rows()));
        PREPARED.set(prepared);
    }

    /// At most [`MAX_TOKENS`] tokens times at most [`WEIGHTS_AT_A_TIME`] weights of `cols` columns, at least one.
    pub(super) fn few_tokens(
        self,
        x: &[f32],
        cols: usize,
        weights: &[Matrix],
        outs: &mut [&mut [f32]],
        arithmetic: Arithmetic,
    ) {
        let tokens = x.len() / cols;
        let mut prepared = PREPARED.take();
        let (mut used, mut tasks) = (0, 0);
        let threads = rayon::current_num_threads();
        let bytes: usize = weights.iter().map(Matrix::bytes).sum();
        let bytes_a_task = (bytes / (TASKS_A_THREAD * threads)).clamp(*BYTES_A_TASK.start(), *BYTES_A_TASK.end());
        let mut jobs = [const { None }; WEIGHTS_AT_A_TIME];
        for ((w, out), job) in weights.iter().zip(outs).zip(&mut jobs) {
            let rows = w.rows();
            let out = Output::new(out, tokens, rows);
            if rows == 0 || tokens == 0 {
                continue;
            }
            let rows_a_task = (bytes_a_task * rows).div_ceil(w.bytes()).next_multiple_of(LANES);
            tasks += rows.div_ceil(rows_a_task);
            let x = self.prepare(&mut prepared, &mut used, x, cols, form(w, arithmetic));
            *job = Some(Job { w, x, out, rows_a_task, end: tasks });
        }
        let run = |task| {
            let mut first = 0;
            for job in jobs.iter().flatten() {
                if task < job.end {
                    let start = (task - first) * job.rows_a_task;
                    let rows = start..job.w.rows().min(start + job.rows_a_task);
                    return self.rows(job.w, &prepared[job.x], rows, &job.out);
                }
                first = job.end;
            }
        };
        for_each_in_shares(tasks, || announce(weights, threads), run);
        PREPARED.set(prepared);
    }

    /// Prepares `x` where none of the first `used` are of that form, and gives the index of the one that is.
    fn prepare(self, prepared: &mut Vec<Prepared>, used: &mut usize, x: &[f32], cols: usize, form: Form) -> usize {
        if let Some(index) = prepared[..*used].iter().position(|prepared| prepared.form == Some(form)) {
            return index;
        }
        if prepared.len() == *used {
            prepared.push(Prepared::default());
        }
        self.dispatch(Prepare { x, cols, form, to: &mut prepared[*used] });
        *used += 1;
        *used - 1
    }

    /// Some rows of one weight times all prepared tokens, on the calling thread.
    fn rows(self, w: &Matrix, x: &Prepared, rows: Range<usize>, out: &Output) {
        let task = Task { x, w, rows, out };
        let layout = match w.data() {
            Data::Float { dtype: FloatType::F32, .. } => return self.dispatch(FloatProduct::<F32>::new(task)),
            Data::Float { dtype: FloatType::F16, .. } => return self.dispatch(FloatProduct::<F16>::new(task)),
            Data::Float { dtype: FloatType::BF16, .. } => return self.dispatch(FloatProduct::<BF16>::new(task)),
            Data::Quantized { layout, .. } => layout,
        };
        SCRATCH.with_borrow_mut(|scratch| match (x.form, layout.grid) {
            (Some(Form::Wide { order: Order::Single, .. }), grid) if grid.max_code() == 255 => {
                self.wide_grid::<Single<true>>(task, scratch, layout);
            }
            (Some(Form::Wide { order: Order::Single, .. }), _) => {
                self.wide_grid::<Single<false>>(task, scratch, layout)
            }
            (Some(Form::Wide { order: Order::Nibbles, .. }), _) => self.wide_grid::<Nibbles>(task, scratch, layout),
            (Some(Form::Wide { order: Order::Ternary, .. }), _) => {
                self.wide::<TernaryBlocks, true>(task, scratch, layout);
            }
            (Some(Form::Wide { order: Order::Halves, .. }), grid) => match grid.max_code() {
                ..16 => self.wide_grid::<Halves<1>>(task, scratch, layout),
                16..255 => self.wide_grid::<Halves<2>>(task, scratch, layout),
                255 => self.wide_grid::<Bytes>(task, scratch, layout),
            },
            (Some(Form::Rounded { .. }), Grid::Ternary) => {
                self.dispatch(RoundedProduct::<Ternary, true>::new(task, scratch));
            }
            (Some(Form::Rounded { .. }), grid) if grid.has_zero_points() => {
                self.dispatch(RoundedProduct::<Stream, false>::new(task, scratch));
            }
            (Some(Form::Rounded { .. }), _) => self.dispatch(RoundedProduct::<Stream, true>::new(task, scratch)),
            (Some(Form::Eights), grid) => match (grid.has_zero_points(), uniform::<Nibbles>(layout, w)) {
                (false, true) => self.dispatch(EightsProduct::<true, true>::new(task, scratch)),
                (false, false) => self.dispatch(EightsProduct::<true, false>::new(task, scratch)),
                (true, true) => self.dispatch(EightsProduct::<false, true>::new(task, scratch)),
                (true, false) => self.dispatch(EightsProduct::<false, false>::new(task, scratch)),
            },
            (_, Grid::Ternary) => self.exact::<Ternary, true>(task, scratch, layout),
            (_, grid) if grid.max_code() < 16 => self.exact::<Stream, true>(task, scratch, layout),
            _ => self.exact::<Stream, false>(task, scratch, layout),
        });
    }

    fn wide_grid<W: Wide>(self, task: Task, scratch: &mut Scratch, layout: Layout) {
        if layout.grid.has_zero_points() {
            self.wide::<W, false>(task, scratch, layout);
        } else {
            self.wide::<W, true>(task, scratch, layout);
        }
    }

    fn wide<W: Wide, const CONSTANT: bool>(self, task: Task, scratch: &mut Scratch, layout: Layout) {
        if uniform::<W>(layout, task.w) {
            self.dispatch(WideProduct::<W, CONSTANT, true>::new(task, scratch));
        } else {
            self.dispatch(WideProduct::<W, CONSTANT, false>::new(task, scratch));
        }
    }

    fn exact<D: Decode, const NARROW: bool>(self, task: Task, scratch: &mut Scratch, layout: Layout) {
        if task.x.form != Some(Form::Interleaved(Scaling::Steps)) {
            self.dispatch(ExactProduct::<D, NARROW, false>::new(task, scratch));
        } else if uniform::<D>(layout, task.w) {
            self.dispatch(ExactProduct::<D, NARROW, true>::new(task, scratch));
        } else if layout.grid.has_zero_points() {
            self.dispatch(ShortProduct::<D, NARROW, false>::new(task, scratch));
        } else {
            self.dispatch(ShortProduct::<D, NARROW, true>::new(task, scratch));
        }
    }
}
