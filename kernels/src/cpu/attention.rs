//! Causal grouped-query attention over a key-value cache.
//!
//! Keys are stored transposed in blocks of 16 positions, so that a vector of keys gives 16 scores without a horizontal
//! sum. Both products (queries by keys, probabilities by values) are then outer products of a few rows with a few
//! vectors, held in registers. The softmax is the online one (Milakov and Gimelshein, 2018; FlashAttention, Dao et al.,
//! 2022): positions are visited in tiles, and earlier sums are rescaled when a larger score appears. Tiles start at
//! fixed positions and every row keeps its own order of operations, so a token's result depends neither on the tokens it
//! is computed with nor on the number of threads: decoding repeats prefill bit for bit.

use std::ops::Range;

use super::matmul::Output;
use super::pool::for_each;
use super::scratch::Buffer;
use super::simd::Simd;
use super::{Cpu, Kernel};

/// Positions whose scores are held at a time: their keys and values stay in the second-level cache.
const TILE: usize = 256;

/// Rows (query heads of tokens) of one task; they share the keys and values that it reads.
const TASK_ROWS: usize = 48;

/// Rows of one outer product.
const PANEL: usize = 6;

/// Multiply-adds below which no other thread is asked to help.
const SEQUENTIAL: usize = 1 << 15;

/// The keys and values of one layer for all positions so far.
#[derive(Clone, Debug)]
pub struct KeyValueCache {
    kv_heads: usize,
    head_dim: usize,
    /// `head_dim` rounded up to whole vectors.
    value_stride: usize,
    capacity: usize,
    len: usize,
    keys: Vec<f32>,   // [kv_heads, ceil(capacity / 16), head_dim, 16]
    values: Vec<f32>, // [kv_heads, capacity, value_stride]
}

impl KeyValueCache {
    /// An empty cache with room for `capacity` positions of `kv_heads` heads of `head_dim` elements.
    ///
    /// # Panics
    /// If there are no heads, a head has no elements, or the size overflows.
    pub fn new(kv_heads: usize, head_dim: usize, capacity: usize) -> Self {
        assert!(kv_heads > 0 && head_dim > 0, "{kv_heads} heads of {head_dim}");
        let value_stride = head_dim.next_multiple_of(16);
        let size = |positions: usize, stride| {
            let head = positions.checked_mul(stride);
            head.and_then(|head| head.checked_mul(kv_heads)).expect("the capacity overflows")
        };
        let keys = vec![0.0; size(capacity.next_multiple_of(16), head_dim)];
        let values = vec![0.0; size(capacity, value_stride)];
        Self { kv_heads, head_dim, value_stride, capacity, len: 0, keys, values }
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no position is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Positions that fit.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets all positions.
    pub fn clear(&mut self) {
        self.len = 0;
    }

    /// Adds positions at the end; `k` and `v` are `[tokens, kv_heads * head_dim]`.
    ///
    /// # Panics
    /// If they are not whole positions of one number, or exceed the capacity.
    pub fn append(&mut self, k: &[f32], v: &[f32]) {
        let width = self.kv_heads * self.head_dim;
        assert!(k.len() == v.len() && k.len().is_multiple_of(width), "k and v are not equal rows of {width}");
        let tokens = k.len() / width;
        assert!(tokens <= self.capacity - self.len, "{tokens} more positions than the capacity allows");
        let (key_head, value_head) = (self.key_head(), self.value_head());
        for head in 0..self.kv_heads {
            let elements = head * self.head_dim..(head + 1) * self.head_dim;
            for (token, (k, v)) in k.chunks_exact(width).zip(v.chunks_exact(width)).enumerate() {
                let position = self.len + token;
                let key_start = head * key_head + position / 16 * self.head_dim * 16 + position % 16;
                let keys = self.keys[key_start..].iter_mut().step_by(16);
                keys.zip(&k[elements.clone()]).for_each(|(to, &from)| *to = from);
                let value_start = head * value_head + position * self.value_stride;
                self.values[value_start..][..self.head_dim].copy_from_slice(&v[elements.clone()]);
            }
        }
        self.len += tokens;
    }

    /// Key elements of one head.
    fn key_head(&self) -> usize {
        self.capacity.next_multiple_of(16) * self.head_dim
    }

    /// Value elements of one head.
    fn value_head(&self) -> usize {
        self.capacity * self.value_stride
    }
}

impl Cpu {
    /// Causal grouped-query attention: `softmax(scale * q k^T) v` for each head, where a query sees the last `window`
    /// positions up to its own (`usize::MAX` for all of them). The queries are the last positions of the cache, which
    /// already holds their keys and values.
    ///
    /// `q` and `out` are `[tokens, heads * head_dim]`. Query head `h` reads head `h / (heads / kv_heads)` of the cache.
    ///
    /// # Panics
    /// If `heads` is not a multiple of the cache's heads, `window` is zero, the lengths do not fit together, or there
    /// are more tokens than the cache has positions.
    pub fn attention(self, q: &[f32], heads: usize, cache: &KeyValueCache, scale: f32, window: usize, out: &mut [f32]) {
        assert!(window > 0, "a window of no positions");
        let (kv_heads, head_dim) = (cache.kv_heads, cache.head_dim);
        let width = heads * head_dim;
        assert!(heads > 0 && heads.is_multiple_of(kv_heads), "{heads} heads over {kv_heads} in the cache");
        assert!(q.len() == out.len() && q.len().is_multiple_of(width), "q and out are not equal rows of {width}");
        let tokens = q.len() / width;
        assert!(tokens <= cache.len, "{tokens} queries over {} positions", cache.len);

        let group = heads / kv_heads;
        // Heads that share keys are computed together, unless that leaves threads idle.
        let share = if tokens * kv_heads < rayon::current_num_threads() { 1 } else { group };
        let runs = heads / share; // of `share` heads in a token
        let task_tokens = (TASK_ROWS / share).max(1);
        let tasks = tokens.div_ceil(task_tokens) * runs;
        let out = &Output::new(out, tokens, width);
        let run = |task: usize| {
            // Later tokens see more positions: the longest tasks first, so that threads end together.
            let task = tasks - 1 - task;
            let (first_token, run) = (task / runs * task_tokens, task % runs);
            self.dispatch(Task {
                q,
                width,
                tokens: first_token..tokens.min(first_token + task_tokens),
                share,
                first_column: run * share * head_dim,
                cache,
                kv_head: run * share / group,
                first_visible: cache.len - tokens + first_token + 1,
                window,
                scale,
                out,
            });
        };
        if tokens * cache.len.min(window) * width < SEQUENTIAL {
            (0..tasks).for_each(run);
        } else {
            for_each(tasks, run);
        }
    }
}

/// The attention of a few consecutive tokens, in a few heads that share keys and values.
///
/// A row is one head of one token; rows are ordered by token.
struct Task<'a> {
    q: &'a [f32], // [tokens, width]
    width: usize,
    tokens: Range<usize>,
    /// Heads of a token.
    share: usize,
    /// Where the first head starts in a row of `q` and `out`.
    first_column: usize,
    cache: &'a KeyValueCache,
    kv_head: usize,
    /// Positions up to the first token's own.
    first_visible: usize,
    /// How many of the last positions a token sees.
    window: usize,
    scale: f32,
    out: &'a Output<'a>, // [tokens, width]
}

/// What a row has seen so far: its largest score `max`, and the sum of `exp(score - max)`.
type Seen = [f32; 2];

impl Kernel for Task<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (head_dim, stride) = (self.cache.head_dim, self.cache.value_stride);
        let rows = self.tokens.len() * self.share;
        let columns = self.first_column..self.first_column + self.share * head_dim;
        let mut queries = Buffer::zeros(rows * head_dim); // [rows, head_dim], times the scale
        for (token, to) in self.tokens.clone().zip(queries.chunks_exact_mut(columns.len())) {
            let from = &self.q[token * self.width..][columns.clone()];
            to.iter_mut().zip(from).for_each(|(to, &from)| *to = from * self.scale);
        }
        let mut sums = Buffer::zeros(rows * stride); // [rows, value_stride], values times exp(score - max)
        let mut seen = Buffer::zeros(rows * 2);
        let (seen, _) = seen.as_chunks_mut::<2>();
        seen.fill([f32::NEG_INFINITY, 0.0]);

        let (first, last) = (self.visible(0).start, self.visible(rows - 1).end);
        for start in (first / TILE * TILE..last).step_by(TILE) {
            let mut row = 0;
            while row < rows {
                let height = match rows - row {
                    PANEL.. => PANEL,
                    5 => 4,
                    fewer => fewer,
                };
                let panel = Panel {
                    queries: &queries[row * head_dim..(row + height) * head_dim],
                    sums: &mut sums[row * stride..(row + height) * stride],
                    seen: &mut seen[row..row + height],
                };
                match height {
                    1 => self.advance::<S, 1>(simd, panel, row, start),
                    2 => self.advance::<S, 2>(simd, panel, row, start),
                    3 => self.advance::<S, 3>(simd, panel, row, start),
                    4 => self.advance::<S, 4>(simd, panel, row, start),
                    _ => self.advance::<S, PANEL>(simd, panel, row, start),
                }
                row += height;
            }
        }

        let mut rows = sums.chunks_exact(stride).zip(seen.iter());
        for token in self.tokens.clone() {
            // SAFETY: every task has heads or tokens of its own, and this one makes one reference at a time.
            let out = unsafe { self.out.segment(token, columns.clone()) };
            for (out, (sums, &[_, sum])) in out.chunks_exact_mut(head_dim).zip(&mut rows) {
                out.iter_mut().zip(sums).for_each(|(out, &value)| *out = value / sum);
            }
        }
    }
}

/// The rows of one outer product.
struct Panel<'a> {
    queries: &'a [f32],   // [R, head_dim]
    sums: &'a mut [f32],  // [R, value_stride]
    seen: &'a mut [Seen], // [R]
}

impl Task<'_> {
    /// The positions that a row sees.
    #[inline(always)]
    fn visible(&self, row: usize) -> Range<usize> {
        let end = self.first_visible + row / self.share;
        end.saturating_sub(self.window)..end
    }

    /// Shows the tile of positions from `start` to `R` rows from `row`.
    #[inline(always)]
    fn advance<S: Simd, const R: usize>(&self, simd: S, panel: Panel, row: usize, start: usize) {
        // What each row sees of the tile; both ends grow from row to row.
        let mut visible = [(0, 0); R];
        for (index, visible) in visible.iter_mut().enumerate() {
            let positions = self.visible(row + index);
            *visible = (positions.start.saturating_sub(start).min(TILE), positions.end.saturating_sub(start).min(TILE));
        }
        let (first, last) = (visible[0].0, visible[R - 1].1);
        if first >= last {
            return;
        }
        let (head_dim, stride) = (self.cache.head_dim, self.cache.value_stride);
        let blocks = first / 16..last.div_ceil(16);

        let mut scores = [[0.0; TILE]; R];
        let keys = Product {
            rows: panel.queries,
            row_step: head_dim,
            columns: &self.cache.keys[self.kv_head * self.cache.key_head() + (start + blocks.start * 16) * head_dim..],
            depth: head_dim,
            depth_step: 16,
            vector_step: head_dim * 16,
        };
        keys.add_to::<S, R>(simd, blocks.len(), &mut scores.as_flattened_mut()[blocks.start * 16..], TILE);

        let rows = scores.iter_mut().zip(panel.seen).zip(panel.sums.chunks_exact_mut(stride));
        for (((scores, seen), sums), (from, to)) in rows.zip(visible) {
            // A row that has seen nothing yet has no largest score to subtract.
            if from < to {
                scores[blocks.start * 16..from].fill(f32::NEG_INFINITY);
                scores[to..blocks.end * 16].fill(f32::NEG_INFINITY);
                exponentiate(simd, &mut scores[blocks.start * 16..blocks.end * 16], seen, sums);
            }
        }

        // The positions that all rows see. Those that only some see are not added to the other rows with weight 0,
        // because an infinite value would become NaN there. Every row adds in the order of positions.
        let shared = visible[R - 1].0..visible[0].1.max(visible[R - 1].0);
        let columns = &self.cache.values[self.kv_head * self.cache.value_head() + start * stride..];
        let values = |rows, positions: Range<usize>| Product {
            rows,
            row_step: TILE,
            columns: &columns[positions.start * stride..],
            depth: positions.len(),
            depth_step: stride,
            vector_step: 16,
        };
        let ends = scores.iter().zip(visible);
        for ((scores, (from, to)), sums) in ends.clone().zip(panel.sums.chunks_exact_mut(stride)) {
            let before = from..to.min(shared.start);
            if !before.is_empty() {
                values(&scores[before.start..], before).add_to::<S, 1>(simd, stride / 16, sums, stride);
            }
        }
        if !shared.is_empty() {
            let rows = &scores.as_flattened()[shared.start..];
            values(rows, shared.clone()).add_to::<S, R>(simd, stride / 16, panel.sums, stride);
        }
        for ((scores, (from, to)), sums) in ends.zip(panel.sums.chunks_exact_mut(stride)) {
            let after = from.max(shared.end)..to;
            if !after.is_empty() {
                values(&scores[after.start..], after).add_to::<S, 1>(simd, stride / 16, sums, stride);
            }
        }
    }
}

/// Replaces the scores of a row by `exp(score - max)`, with the largest score so far as `max`, and rescales what the
/// row has summed up if that is a new one.
#[inline(always)]
fn exponentiate<S: Simd>(simd: S, scores: &mut [f32], seen: &mut Seen, sums: &mut [f32]) {
    let scores = scores.as_chunks_mut::<16>().0;
    let mut max = simd.splat(f32::NEG_INFINITY);
    for v in scores.iter() {
        max = simd.max(simd.load(v), max);
    }
    let max = simd.max_lane(max);
    let [largest, total] = seen;
    if max > *largest {
        let factor = simd.exp(simd.splat(*largest - max));
        for v in sums.as_chunks_mut::<16>().0 {
            simd.store(simd.mul(simd.load(v), factor), v);
        }
        // All lanes of the factor are equal, and a sixteenth of their sum is exact.
        *total *= simd.sum(factor) / 16.0;
        *largest = max;
    }
    let shift = simd.splat(*largest);
    let mut sum = simd.splat(0.0);
    for v in scores {
        let weight = simd.exp(simd.sub(simd.load(v), shift));
        simd.store(weight, v);
        sum = simd.add(sum, weight);
    }
    *total += simd.sum(sum);
}

/// A matrix product of few rows: rows `[R, depth]` by columns `[depth, vectors * 16]`.
struct Product<'a> {
    /// Element `k` of row `r` is at `r * row_step + k`.
    rows: &'a [f32],
    row_step: usize,
    /// Vector `n` of depth `k` starts at `k * depth_step + n * vector_step`.
    columns: &'a [f32],
    depth: usize,
    depth_step: usize,
    vector_step: usize,
}

impl Product<'_> {
    /// Adds the product to `out`, whose rows are `out_step` apart.
    #[inline(always)]
    fn add_to<S: Simd, const R: usize>(&self, simd: S, vectors: usize, out: &mut [f32], out_step: usize) {
        let mut first = 0;
        // As many vectors at a time as their sums fit in registers beside one vector and one broadcast.
        if S::REGISTERS >= 32 || R == 1 {
            while first + 4 <= vectors {
                self.add_tile::<S, R, 4>(simd, first, out, out_step);
                first += 4;
            }
        } else if R == 2 {
            while first + 2 <= vectors {
                self.add_tile::<S, R, 2>(simd, first, out, out_step);
                first += 2;
            }
        }
        while first < vectors {
            self.add_tile::<S, R, 1>(simd, first, out, out_step);
            first += 1;
        }
    }

    /// Adds `N` vectors of the product, from vector `first`.
    #[inline(always)]
    fn add_tile<S: Simd, const R: usize, const N: usize>(
        &self,
        simd: S,
        first: usize,
        out: &mut [f32],
        out_step: usize,
    ) {
        let Self { rows, row_step, columns, depth, depth_step, vector_step } = *self;
        if depth == 0 {
            return;
        }
        let columns = &columns[first * vector_step..];
        assert!(rows.len() >= (R - 1) * row_step + depth);
        assert!(columns.len() >= (depth - 1) * depth_step + (N - 1) * vector_step + 16);
        let mut tile = [[simd.splat(0.0); N]; R];
        for (r, tile) in tile.iter_mut().enumerate() {
            let out = out[r * out_step + first * 16..].as_chunks::<16>().0;
            for (tile, out) in tile.iter_mut().zip(&out[..N]) {
                *tile = simd.load(out);
            }
        }
        for k in 0..depth {
            let mut vectors = [simd.splat(0.0); N];
            for (n, vector) in vectors.iter_mut().enumerate() {
                // SAFETY: k < depth and n < N, so the second assertion covers these 16 elements.
                let from = unsafe { &*columns.as_ptr().add(k * depth_step + n * vector_step).cast::<[f32; 16]>() };
                *vector = simd.load(from);
            }
            for (r, tile) in tile.iter_mut().enumerate() {
                // SAFETY: k < depth and r < R, so the first assertion covers this element.
                let row = simd.splat(unsafe { *rows.get_unchecked(r * row_step + k) });
                for (tile, &vector) in tile.iter_mut().zip(&vectors) {
                    *tile = simd.mul_add(row, vector, *tile);
                }
            }
        }
        for (r, tile) in tile.iter().enumerate() {
            let out = out[r * out_step + first * 16..].as_chunks_mut::<16>().0;
            for (&tile, out) in tile.iter().zip(&mut out[..N]) {
                simd.store(tile, out);
            }
        }
    }
}
