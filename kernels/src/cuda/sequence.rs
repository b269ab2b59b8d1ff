//! What mixes the positions of a text: attention, convolution, scan and resolvent.

use std::{cell::Cell, rc::Rc};

use super::{
    Cuda, MOST_BLOCKS,
    context::{Arguments, LaunchShape},
    elements,
    error::{CudaError, Result},
    line,
    memory::Buffer,
    size,
    values::DeviceValues,
};

/// Tokens up to which attention is split over the positions seen.
const FEW: usize = 8;

/// The widest head that the kernels have room for.
const MOST_HEAD_DIM: usize = 256;

/// Tokens up to which the scan goes step by step.
const STEPS: usize = 16;

/// Positions that one block of the resolvent's kernels takes.
const TILE: usize = 2048;

/// The keys and values of the positions that one attention layer has seen.
#[derive(Debug)]
pub struct DeviceCache {
    keys: Buffer,   // f32 [kv_heads, capacity, head_dim]
    values: Buffer, // f32 [kv_heads, capacity, head_dim]
    kv_heads: usize,
    head_dim: usize,
    capacity: usize,
    positions: Rc<Cell<usize>>,
}

impl DeviceCache {
    /// Forgets every position.
    pub fn clear(&mut self) {
        self.positions.set(0);
    }
}

/// The value of [`Cuda::causal_resolvent`] at the last position, from which the next goes on.
#[derive(Debug)]
pub struct DeviceCarry(Buffer); // f64 [2]

/// The operands of [`Cuda::selective_scan`].
#[derive(Clone, Copy, Debug)]
pub struct DeviceScan<'a> {
    pub x: &'a DeviceValues,     // [tokens, channels]
    pub delta: &'a DeviceValues, // [tokens, channels]
    pub a: &'a DeviceValues,     // [channels, states]
    pub b: &'a DeviceValues,     // [tokens, states]
    pub c: &'a DeviceValues,     // [tokens, states]
    pub d: &'a DeviceValues,     // [1, channels]
}

impl Cuda {
    /// Rotary position embedding: turns element `i` of each head with element `i + head_dim / 2`. `x` is
    /// `[tokens, heads * head_dim]`, `cos` and `sin` are `[tokens, head_dim / 2]`.
    ///
    /// # Panics
    /// If the shapes do not fit together.
    ///
    /// # Errors
    /// [`CudaError::Call`].
    pub fn rope(&self, x: DeviceValues, heads: usize, cos: &DeviceValues, sin: &DeviceValues) -> Result<DeviceValues> {
        let head_dim = x.cols() / heads;
        let angles = x.rows() * (head_dim / 2);
        assert!(x.cols() == heads * head_dim && cos.len() == angles && sin.len() == angles, "angles of each token");
        let x = x.changing();
        let arguments = Arguments::default()
            .buffer(&x.buffer)
            .buffer(&cos.buffer)
            .buffer(&sin.buffer)
            .u32(size("tokens", x.rows())?)
            .u32(size("heads", heads)?)
            .u32(size("the head", head_dim)?);
        // SAFETY: rope(x, cos, sin, tokens, heads, head_dim), whose shapes are checked above.
        unsafe { self.launch("rope", ["rope", "", ""], elements(x.len() / 2), arguments)? };
        Ok(x)
    }

    /// An empty cache with room for `capacity` positions.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`], [`CudaError::TooLarge`] for wide heads.
    pub fn cache(&self, kv_heads: usize, head_dim: usize, capacity: usize) -> Result<DeviceCache> {
        if head_dim > MOST_HEAD_DIM {
            return Err(CudaError::TooLarge { what: "a head", found: head_dim, most: MOST_HEAD_DIM });
        }
        size("a context", capacity)?;
        let half = || self.buffer(kv_heads.saturating_mul(head_dim).saturating_mul(capacity), size_of::<f32>());
        let (keys, values) = (half()?, half()?);
        Ok(DeviceCache { keys, values, kv_heads, head_dim, capacity, positions: Rc::default() })
    }

    /// Causal grouped-query attention over the cache, to which `key` and `value` `[tokens, kv_heads * head_dim]` are
    /// appended first: `query` `[tokens, heads * head_dim]` to the same shape. Each token sees the last `window` positions
    /// up to its own.
    ///
    /// # Panics
    /// If the shapes do not fit together or the cache has no room.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`], [`CudaError::Call`]; [`CudaError::TooLarge`] for more than 65,535 tokens with wide heads
    /// on a card whose blocks have little shared memory.
    #[expect(clippy::too_many_arguments, reason = "each is a part of the operation's definition")]
    pub fn attention(
        &self,
        query: &DeviceValues,
        key: &DeviceValues,
        value: &DeviceValues,
        cache: &mut DeviceCache,
        heads: usize,
        scale: f32,
        window: usize,
    ) -> Result<DeviceValues> {
        let &mut DeviceCache { kv_heads, head_dim, capacity, .. } = cache;
        let (tokens, past) = (query.rows(), cache.positions.get());
        assert!(query.cols() == heads * head_dim && heads.is_multiple_of(kv_heads), "heads of {head_dim} elements");
        let width = kv_heads * head_dim;
        let fits = |x: &DeviceValues| x.rows() == tokens && x.cols() == width;
        assert!(fits(key) && fits(value) && past + tokens <= capacity, "keys and values that the cache has room for");
        self.set_past(past)?;
        self.slots.note_cache(&cache.positions, capacity);
        let count = size("tokens", tokens)?;
        let arguments = Arguments::default()
            .buffer(&key.buffer)
            .buffer(&value.buffer)
            .buffer(&cache.keys)
            .buffer(&cache.values)
            .buffer(&self.slots.words)
            .u32(count)
            .u32(kv_heads as u32)
            .u32(head_dim as u32)
            .u32(capacity as u32);
        // SAFETY: kv_append(key, value, keys, values, past, tokens, kv_heads, head_dim, capacity); positions beyond the
        // capacity are dropped.
        unsafe { self.launch("attention", ["kv_append", "", ""], elements(key.len()), arguments)? };
        let out = self.scratch(tokens, query.cols())?;
        let padded = head_dim.next_multiple_of(32) as u32;
        let shared_bytes = 4 * (2 * 32 * (padded + 4) + 32 * padded + 32 * 36);
        // Few tokens share the positions out among blocks; many fill the card without.
        let splits = match tokens <= FEW {
            true => Some(capacity.div_ceil(128).clamp(1, 64) as u32),
            false => (shared_bytes > self.card.shared_memory).then_some(1),
        };
        let partial = match splits {
            // A grid is shorter in its other dimensions than in its first.
            Some(_) if count > MOST_BLOCKS => {
                return Err(CudaError::TooLarge {
                    what: "a batch of tokens",
                    found: tokens,
                    most: MOST_BLOCKS as usize,
                });
            }
            Some(splits) => {
                Some((self.buffer(tokens * heads * splits as usize * (head_dim + 2), size_of::<f32>())?, splits))
            }
            None => None,
        };
        let arguments = Arguments::default()
            .buffer(&query.buffer)
            .buffer(&cache.keys)
            .buffer(&cache.values)
            .buffer(partial.as_ref().map_or(&out.buffer, |(partial, _)| partial))
            .buffer(&self.slots.words)
            .u32(count)
            .u32(heads as u32)
            .u32(kv_heads as u32)
            .u32(head_dim as u32)
            .u32(capacity as u32)
            .u32(u32::try_from(window).unwrap_or(u32::MAX))
            .f32(scale);
        match &partial {
            Some((partial, splits)) => {
                let groups = kv_heads * heads.div_ceil(kv_heads).div_ceil(4);
                let shape = LaunchShape { grid: [groups as u32, *splits, count], block: 128, shared_bytes: 0 };
                // SAFETY: attention_decode(q, keys, values, partial, past, tokens, heads, kv_heads, head_dim, capacity,
                // window, scale, splits), whose shapes are checked above.
                unsafe { self.launch("attention", ["attention_decode", "", ""], shape, arguments.u32(*splits))? };
                let arguments = Arguments::default()
                    .buffer(partial)
                    .buffer(&out.buffer)
                    .u32(count)
                    .u32(heads as u32)
                    .u32(head_dim as u32)
                    .u32(*splits);
                let shape = LaunchShape { grid: [heads as u32, count, 1], block: 128, shared_bytes: 0 };
                // SAFETY: attention_combine(partial, out, tokens, heads, head_dim, splits).
                unsafe { self.launch("attention", ["attention_combine", "", ""], shape, arguments)? };
            }
            None => {
                let shape = LaunchShape { grid: [count.div_ceil(32), heads as u32, 1], block: 256, shared_bytes };
                // SAFETY: attention_prefill(q, keys, values, out, past, tokens, heads, kv_heads, head_dim, capacity,
                // window, scale), whose shapes are checked above.
                unsafe { self.launch("attention", ["attention_prefill", "", ""], shape, arguments)? };
            }
        }
        cache.positions.set(past + tokens);
        Ok(out)
    }

    /// Causal depthwise convolution of `x` `[tokens, channels]` with `weight` `[channels, kernel]`; `history`
    /// `[kernel - 1, channels]` holds the rows before the first, oldest first, and then those before the next call's.
    ///
    /// # Panics
    /// If the shapes do not fit together.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`], [`CudaError::Call`].
    pub fn depthwise_conv(
        &self,
        x: &DeviceValues,
        weight: &DeviceValues,
        bias: Option<&DeviceValues>,
        history: &mut DeviceValues,
    ) -> Result<DeviceValues> {
        let (tokens, channels) = (x.rows(), x.cols());
        let kernel = weight.len() / channels.max(1);
        let fits = kernel > 0 && weight.len() == channels * kernel && history.len() == channels * (kernel - 1);
        assert!(fits && bias.is_none_or(|bias| bias.len() == channels), "a kernel for each channel");
        let out = self.scratch(tokens, channels)?;
        let sizes = (size("tokens", tokens)?, size("channels", channels)?, size("a kernel", kernel)?);
        let arguments = Arguments::default()
            .buffer(&x.buffer)
            .buffer(&weight.buffer)
            .optional(bias.map(|bias| &bias.buffer))
            .buffer(&history.buffer)
            .buffer(&out.buffer)
            .u32(sizes.0)
            .u32(sizes.1)
            .u32(sizes.2);
        // SAFETY: depthwise_conv(x, weight, bias, history, out, tokens, channels, kernel), shapes checked above.
        unsafe { self.launch("conv", ["depthwise_conv", "", ""], elements(out.len()), arguments)? };
        if kernel > 1 {
            let arguments =
                Arguments::default().buffer(&x.buffer).buffer(&history.buffer).u32(sizes.0).u32(sizes.1).u32(sizes.2);
            let shape = line(channels.div_ceil(256) as u32, 256);
            // SAFETY: conv_history(x, history, tokens, channels, kernel), shapes checked above.
            unsafe { self.launch("conv", ["conv_history", "", ""], shape, arguments)? };
        }
        Ok(out)
    }

    /// The selective scan of Mamba: `h = exp(delta * a) * h + delta * b * x`, `y = c * h + d * x`; `state`
    /// `[channels, states]` is `h` before and after.
    ///
    /// # Panics
    /// If the shapes do not fit together.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`], [`CudaError::Call`].
    pub fn selective_scan(&self, scan: DeviceScan<'_>, state: &mut DeviceValues) -> Result<DeviceValues> {
        let DeviceScan { x, delta, a, b, c, d } = scan;
        let (tokens, channels, states) = (x.rows(), x.cols(), a.cols());
        let fits = delta.len() == x.len()
            && a.len() == channels * states
            && state.len() == a.len()
            && b.len() == tokens * states
            && c.len() == b.len()
            && d.len() == channels;
        assert!(fits, "the operands of a scan over {tokens} tokens, {channels} channels, {states} states");
        let out = self.scratch(tokens, channels)?;
        let arguments = Arguments::default()
            .buffer(&x.buffer)
            .buffer(&delta.buffer)
            .buffer(&a.buffer)
            .buffer(&b.buffer)
            .buffer(&c.buffer)
            .buffer(&d.buffer)
            .buffer(&state.buffer)
            .buffer(&out.buffer)
            .u32(size("tokens", tokens)?)
            .u32(size("channels", channels)?)
            .u32(size("states", states)?);
        let blocks = |width: usize| channels.div_ceil(width) as u32;
        let (name, shape) = match tokens <= STEPS {
            true => ("selective_scan_step", line(blocks(64), 64)),
            false => ("selective_scan", line(blocks(32), 512)),
        };
        // SAFETY: both take (x, delta, a, b, c, d, state, out, tokens, channels, states), shapes checked above.
        unsafe { self.launch("scan", [name, "", ""], shape, arguments)? };
        Ok(out)
    }

    /// The diagonal of `(H - zI)^-1` with `H = tridiag(1, v - 2, 1)`: `v` `[positions, 1]` to `[positions, 2]`, real and
    /// imaginary part.
    ///
    /// # Panics
    /// If `v` has not one column.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`], [`CudaError::Call`].
    pub fn resolvent(&self, v: &DeviceValues, z: [f32; 2]) -> Result<DeviceValues> {
        let n = v.rows();
        let out = self.resolvent_output(v)?;
        let about = || Arguments::default().buffer(&v.buffer).u64(n).f32(z[0]).f32(z[1]);
        let starts = self.resolvent_starts(v, z, true, None)?;
        let right = self.buffer(2 * n, size_of::<f64>())?;
        let shape = line(n.div_ceil(TILE) as u32, 256);
        let arguments = about().buffer(&starts).buffer(&right);
        // SAFETY: resolvent_right(v, n, zr, zi, starts, right).
        unsafe { self.launch("resolvent", ["resolvent_right", "", ""], shape, arguments)? };
        let starts = self.resolvent_starts(v, z, false, None)?;
        let arguments = about().buffer(&starts).buffer(&right).buffer(&out.buffer);
        // SAFETY: resolvent_full(v, n, zr, zi, starts, right, out).
        unsafe { self.launch("resolvent", ["resolvent_full", "", ""], shape, arguments)? };
        Ok(out)
    }

    /// The same with each position's matrix cut off after it. `last` is the value of the position before the first, and then
    /// of the last.
    ///
    /// # Panics
    /// If `v` has not one column.
    ///
    /// # Errors
    /// As [`resolvent`](Self::resolvent).
    pub fn causal_resolvent(&self, v: &DeviceValues, z: [f32; 2], last: &mut DeviceCarry) -> Result<DeviceValues> {
        let n = v.rows();
        let out = self.resolvent_output(v)?;
        let starts = self.resolvent_starts(v, z, false, Some(&last.0))?;
        let arguments = Arguments::default()
            .buffer(&v.buffer)
            .u64(n)
            .f32(z[0])
            .f32(z[1])
            .buffer(&starts)
            .buffer(&out.buffer)
            .buffer(&last.0);
        let shape = line(n.div_ceil(TILE) as u32, 256);
        // SAFETY: resolvent_causal(v, n, zr, zi, starts, out, last).
        unsafe { self.launch("resolvent", ["resolvent_causal", "", ""], shape, arguments)? };
        Ok(out)
    }

    /// The value that [`causal_resolvent`](Self::causal_resolvent) begins a text with: zero.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`], [`CudaError::Call`].
    pub fn carry(&self) -> Result<DeviceCarry> {
        let mut carry = DeviceCarry(self.buffer(2, size_of::<f64>())?);
        self.clear_carry(&mut carry)?;
        Ok(carry)
    }

    /// Forgets the text.
    ///
    /// # Errors
    /// [`CudaError::Call`].
    pub fn clear_carry(&self, carry: &mut DeviceCarry) -> Result<()> {
        self.context.zero(&mut carry.0, 2 * size_of::<f64>())
    }

    fn resolvent_output(&self, v: &DeviceValues) -> Result<DeviceValues> {
        assert_eq!(v.cols(), 1, "one potential for each position");
        size("positions", v.rows())?;
        self.scratch(v.rows(), 2)
    }

    /// The value that each tile starts from, when the positions are gone through from one end.
    fn resolvent_starts(
        &self,
        v: &DeviceValues,
        z: [f32; 2],
        backward: bool,
        start: Option<&Buffer>,
    ) -> Result<Buffer> {
        let tiles = v.rows().div_ceil(TILE);
        let maps = self.buffer(8 * tiles, size_of::<f64>())?;
        let starts = self.buffer(2 * tiles, size_of::<f64>())?;
        if tiles > 1 {
            let arguments = Arguments::default()
                .buffer(&v.buffer)
                .u64(v.rows())
                .f32(z[0])
                .f32(z[1])
                .u32(backward.into())
                .buffer(&maps);
            // SAFETY: resolvent_tiles(v, n, zr, zi, backward, tiles).
            unsafe { self.launch("resolvent", ["resolvent_tiles", "", ""], line(tiles as u32, 256), arguments)? };
        }
        let arguments = Arguments::default().buffer(&maps).u32(tiles as u32).optional(start).buffer(&starts);
        // SAFETY: resolvent_carry(tiles, count, start, starts).
        unsafe { self.launch("resolvent", ["resolvent_carry", "", ""], line(1, 32), arguments)? };
        Ok(starts)
    }
}
