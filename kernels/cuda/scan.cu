// The selective scan of Mamba (Gu and Dao, 2023), for each channel and state: h = exp(delta * a) * h + delta * b * x,
// out = sum of c * h + d * x. x, delta and out are [tokens, channels], a and state [channels, states], b and c
// [tokens, states], d [channels]. Any number of tokens, channels and states; the state is carried from call to call.
#include "device.cuh"

constexpr u32 STATES = 16;    // held in registers at a time
constexpr u32 SEGMENTS = 16;  // of a tile, one a warp
constexpr u32 LENGTH = 16;    // tokens of a segment
constexpr float LOG2_E = 1.4426950408889634f;

// The tokens from `first` up to `end` of one channel, for states from `state0` on; `rates` are a * log2(e).
template <bool WRITE>
__device__ inline void steps(const float* x, const float* delta, const float* b, const float* c, float d, float* out,
                             u32 first, u32 end, u32 channel, u32 channels, u32 states, u32 state0,
                             const float (&rates)[STATES], float (&h)[STATES], float& deltas) {
    for (u32 token = first; token < end; token++) {
        const u64 at = u64(token) * channels + channel, row = u64(token) * states + state0;
        const float value = x[at], step = delta[at], input = step * value;
        deltas += step;
        float sum = state0 == 0 ? d * value : 0.0f;
#pragma unroll
        for (u32 s = 0; s < STATES; s++) {
            // The same for a whole warp. States beyond the last stay zero.
            if (state0 + s >= states) break;
            h[s] = fmaf(exp2f(step * rates[s]), h[s], input * b[row + s]);
            if (WRITE) sum = fmaf(c[row + s], h[s], sum);
        }
        if (WRITE) out[at] = state0 == 0 ? sum : out[at] + sum;
    }
}

__device__ inline void load_states(const float* from, u32 channel, u32 states, u32 state0, float factor,
                                   float (&to)[STATES]) {
#pragma unroll
    for (u32 s = 0; s < STATES; s++) {
        to[s] = state0 + s < states ? from[u64(channel) * states + state0 + s] * factor : 0.0f;
    }
}

__device__ inline void store_states(float* to, u32 channel, u32 states, u32 state0, const float (&from)[STATES]) {
#pragma unroll
    for (u32 s = 0; s < STATES; s++) {
        if (state0 + s < states) to[u64(channel) * states + state0 + s] = from[s];
    }
}

// A block takes 32 channels, a lane each; a tile of tokens is cut into a segment for each warp. The map of a segment from
// state to state is h -> exp(a * sum of delta) * h + e, with e where it ends from zero: a warp finds it, a scan over the
// warps gives where each starts, and the warp walks its segment again from there.
KERNEL(512)
selective_scan(const float* x, const float* delta, const float* a, const float* b, const float* c, const float* d,
               float* state, float* out, u32 tokens, u32 channels, u32 states) {
    __shared__ float ends[SEGMENTS][STATES][WARP];
    __shared__ float sums[SEGMENTS][WARP];  // of delta
    __shared__ float carried[STATES][WARP];
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const u32 channel = blockIdx.x * WARP + lane;
    const bool there = channel < channels;
    for (u32 state0 = 0; state0 < states; state0 += STATES) {
        float rates[STATES], h[STATES];
        load_states(a, there ? channel : 0, states, state0, LOG2_E, rates);
        load_states(state, there ? channel : 0, states, state0, 1.0f, h);
        __syncthreads();
        if (warp == 0) {
#pragma unroll
            for (u32 s = 0; s < STATES; s++) carried[s][lane] = h[s];
        }
        for (u32 tile = 0; tile < tokens; tile += SEGMENTS * LENGTH) {
            const u32 first = min(tile + warp * LENGTH, tokens), end = min(first + LENGTH, tokens);
            float deltas = 0;
#pragma unroll
            for (u32 s = 0; s < STATES; s++) h[s] = 0;
            if (there) {
                steps<false>(x, delta, b, c, 0, out, first, end, channel, channels, states, state0, rates, h, deltas);
            }
#pragma unroll
            for (u32 s = 0; s < STATES; s++) ends[warp][s][lane] = h[s];
            sums[warp][lane] = deltas;
            __syncthreads();
            // Warp w scans states w, w + 16, ...: with as many warps as states, one each.
            {
                const float* rate = a + u64(there ? channel : 0) * states + state0 + warp;
                const float own = state0 + warp < states ? *rate * LOG2_E : 0.0f;
                float value = carried[warp][lane];
                for (u32 segment = 0; segment < SEGMENTS; segment++) {
                    float end_from_zero = ends[segment][warp][lane];
                    ends[segment][warp][lane] = value;
                    value = fmaf(exp2f(own * sums[segment][lane]), value, end_from_zero);
                }
                carried[warp][lane] = value;
            }
            __syncthreads();
#pragma unroll
            for (u32 s = 0; s < STATES; s++) h[s] = ends[warp][s][lane];
            if (there) {
                float skip = d[channel];
                steps<true>(x, delta, b, c, skip, out, first, end, channel, channels, states, state0, rates, h, deltas);
            }
            __syncthreads();
        }
        if (warp == 0 && there) {
#pragma unroll
            for (u32 s = 0; s < STATES; s++) h[s] = carried[s][lane];
            store_states(state, channel, states, state0, h);
        }
        __syncthreads();
    }
}

// The same token after token, a thread a channel: for the few tokens of a decoding step.
KERNEL(64)
selective_scan_step(const float* x, const float* delta, const float* a, const float* b, const float* c, const float* d,
                    float* state, float* out, u32 tokens, u32 channels, u32 states) {
    const u32 channel = u32(global_index());
    if (channel >= channels) return;
    for (u32 state0 = 0; state0 < states; state0 += STATES) {
        float rates[STATES], h[STATES], deltas = 0;
        load_states(a, channel, states, state0, LOG2_E, rates);
        load_states(state, channel, states, state0, 1.0f, h);
        steps<true>(x, delta, b, c, d[channel], out, 0, tokens, channel, channels, states, state0, rates, h, deltas);
        store_states(state, channel, states, state0, h);
    }
}
static_assert(STATES == SEGMENTS, "a warp scans one state over the segments");
