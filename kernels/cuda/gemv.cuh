// Product of a few rows of activations with a packed matrix, for decoding: out[t, r] = sum_c x[t, c] * w[r, c] + bias[r].
//
// Bound by the bandwidth at which weights arrive, so every byte of them is read once, evict-first, and unpacked in
// registers. A warp takes two rows (its lanes neighbouring units of columns, so that loads coalesce) and shares each
// activation between them; activations are staged in shared memory in the order in which lanes want them. Sums are f32.
// Launch: blocks of 32 to 256 threads, with two rows for each of their warps.
// Limits: 1 <= tokens <= T; any group size, those that are no multiple of a lane's unit at a much lower speed.
#pragma once
#include "matrix.cuh"

constexpr u32 GEMV_THREADS = 256;
constexpr u32 GEMV_ROWS = 2;  // a warp's

template <class E, u32 T>
__device__ inline void gemv(const Matrix& w, const float* x, const float* bias, float* out, u32 tokens) {
    constexpr u32 STEP = WARP * E::UNIT;  // columns that a warp unpacks at a time
    constexpr u32 QUADS = E::UNIT / 4;
    constexpr u32 TILE = T == 1 ? 4096 : T == 4 ? 2048 : 1024;  // columns staged at a time, but at least a step
    constexpr u32 STEPS = TILE > STEP ? TILE / STEP : 1;
    // One place more than lanes, so that neither the writes nor the reads of a warp meet in a bank.
    constexpr u32 PITCH = WARP + 1;
    __shared__ float4 stage[T * STEPS * QUADS * PITCH];  // [T, STEPS, QUADS, lanes]

    const u32 lane = threadIdx.x % WARP;
    const u64 first_row = (u64(blockIdx.x) * (blockDim.x / WARP) + threadIdx.x / WARP) * GEMV_ROWS;
    const u32 cols = u32(w.cols), alignment = row_alignment(w);
    const bool whole_quads = cols % 4 == 0 && reinterpret_cast<u64>(x) % 16 == 0;
    u64 rows[GEMV_ROWS];
#pragma unroll
    for (u32 r = 0; r < GEMV_ROWS; r++) rows[r] = min(first_row + r, w.rows - 1);

    // Whether a lane's unit sees one scale (for ternary, whose units are not aligned to groups: at most two).
    const bool fast = !E::SCALED || w.group >= w.cols ||
                      (E::TERNARY ? w.group % 4 == 0 && w.group >= E::UNIT : w.group % E::UNIT == 0);
    const u32 group = u32(min(w.group, w.cols));

    float sums[GEMV_ROWS][T] = {};
    u32 next[GEMV_ROWS][E::WORDS];
#pragma unroll 1
    for (u32 start = 0; start < cols; start += STEPS * STEP) {
        if (fast) {
#pragma unroll
            for (u32 r = 0; r < GEMV_ROWS; r++) E::load(next[r], w, rows[r], start / E::UNIT + lane, alignment);
        }
        __syncthreads();
        for (u32 i = threadIdx.x; i < T * STEPS * STEP / 4; i += blockDim.x) {
            u32 token = i / (STEPS * STEP / 4), quad = i % (STEPS * STEP / 4);
            u32 column = start + 4 * quad;
            float4 value = make_float4(0, 0, 0, 0);
            const float* from = x + u64(token) * cols + column;
            if (token < tokens && column < cols) {
                if (whole_quads) {
                    value = *reinterpret_cast<const float4*>(from);
                } else {
                    value.x = from[0];
                    if (column + 1 < cols) value.y = from[1];
                    if (column + 2 < cols) value.z = from[2];
                    if (column + 3 < cols) value.w = from[3];
                }
            }
            u32 step = quad / (WARP * QUADS), owner = quad / QUADS % WARP;
            stage[((token * STEPS + step) * QUADS + quad % QUADS) * PITCH + owner] = value;
        }
        __syncthreads();
#pragma unroll 1
        for (u32 step = 0; step < STEPS && start + step * STEP < cols; step++) {
            const u32 unit = (start + step * STEP) / E::UNIT + lane, column = unit * E::UNIT;
            const float4* staged = stage + step * QUADS * PITCH + lane;  // [T: STEPS * QUADS * PITCH, QUADS: PITCH]
            if (fast) {
                u32 words[GEMV_ROWS][E::WORDS];
#pragma unroll
                for (u32 r = 0; r < GEMV_ROWS; r++) {
#pragma unroll
                    for (u32 i = 0; i < E::WORDS; i++) words[r][i] = next[r][i];
                    if (step + 1 < STEPS) E::load(next[r], w, rows[r], unit + WARP, alignment);
                }
                float scales[GEMV_ROWS], zeros[GEMV_ROWS], later[GEMV_ROWS];
                u32 boundary = E::UNIT;  // columns of this unit that have the first scale
                if constexpr (E::SCALED) {
                    u32 at = min(column, cols - 1) / group;
                    if constexpr (E::TERNARY) boundary = min((at + 1) * group - min(column, cols - 1), E::UNIT);
#pragma unroll
                    for (u32 r = 0; r < GEMV_ROWS; r++) {
                        scales[r] = scale_of(w, rows[r], at);
                        zeros[r] = E::zero(w, rows[r], at);
                        if constexpr (E::TERNARY) {
                            later[r] = boundary < E::UNIT && at + 1 < w.groups ? scale_of(w, rows[r], at + 1) : 0.0f;
                        }
                    }
                }
                float partial[GEMV_ROWS][T] = {};
                u32 state[GEMV_ROWS] = {};
#pragma unroll
                for (u32 quad = 0; quad < QUADS; quad++) {
                    float weights[GEMV_ROWS][4];
#pragma unroll
                    for (u32 r = 0; r < GEMV_ROWS; r++) {
                        if constexpr (E::TERNARY) {
                            // The boundary is a multiple of four from the unit's start.
                            if (quad > 0 && 4 * quad == boundary) {
#pragma unroll
                                for (u32 t = 0; t < T; t++) {
                                    sums[r][t] += scales[r] * partial[r][t];
                                    partial[r][t] = 0;
                                }
                                scales[r] = later[r];
                            }
                        }
#pragma unroll
                        for (u32 i = 0; i < 4; i++) {
                            float value = E::code(words[r], 4 * quad + i, state[r]);
                            if constexpr (E::SCALED) value -= zeros[r];
                            weights[r][i] = value;
                        }
                    }
#pragma unroll
                    for (u32 t = 0; t < T; t++) {
                        float4 v = staged[(t * STEPS * QUADS + quad) * PITCH];
#pragma unroll
                        for (u32 r = 0; r < GEMV_ROWS; r++) {
                            partial[r][t] = fmaf(v.x, weights[r][0], partial[r][t]);
                            partial[r][t] = fmaf(v.y, weights[r][1], partial[r][t]);
                            partial[r][t] = fmaf(v.z, weights[r][2], partial[r][t]);
                            partial[r][t] = fmaf(v.w, weights[r][3], partial[r][t]);
                        }
                    }
                }
#pragma unroll
                for (u32 r = 0; r < GEMV_ROWS; r++) {
#pragma unroll
                    for (u32 t = 0; t < T; t++) {
                        sums[r][t] = E::SCALED ? fmaf(scales[r], partial[r][t], sums[r][t]) : sums[r][t] + partial[r][t];
                    }
                }
            } else {
#pragma unroll 1
                for (u32 i = 0; i < E::UNIT && column + i < cols; i++) {
#pragma unroll
                    for (u32 r = 0; r < GEMV_ROWS; r++) {
                        float weight = E::weight(w, rows[r], column + i);
#pragma unroll
                        for (u32 t = 0; t < T; t++) {
                            const float4* quad = staged + (t * STEPS * QUADS + i / 4) * PITCH;
                            sums[r][t] = fmaf(reinterpret_cast<const float*>(quad)[i % 4], weight, sums[r][t]);
                        }
                    }
                }
            }
        }
    }
#pragma unroll
    for (u32 r = 0; r < GEMV_ROWS; r++) {
#pragma unroll
        for (u32 t = 0; t < T; t++) {
            float sum = warp_sum(sums[r][t]);
            if (lane == 0 && t < tokens && first_row + r < w.rows) {
                out[u64(t) * w.rows + first_row + r] = sum + (bias ? bias[first_row + r] : 0.0f);
            }
        }
    }
}

#define GEMV(NAME, ENCODING, T)                                                                               \
    KERNEL(GEMV_THREADS, 2)                                                                                    \
    gemv_##NAME##_t##T(Matrix w, const float* x, const float* bias, float* out, u32 tokens) {                 \
        gemv<ENCODING, T>(w, x, bias, out, tokens);                                                           \
    }

// The same of one token, with a layer for each of the experts that it goes through: blockIdx.y is one of its choices.

// A layer of an expert. Where `w` has no codes, it is of another encoding, and another launch computes it.
struct ExpertLayer {
    Matrix w;
    const float* bias;  // [rows], nullable
};

// layers [experts]; chosen: the number of the expert of each choice; x has `stride` floats from one choice to the next, none
// where all share a row; out [choices, rows]. NaN for a choice that is no expert.
template <class E>
__device__ inline void gemv_chosen(const ExpertLayer* layers, u32 experts, const float* chosen, const float* x, u32 stride,
                                   float* out, u32 rows) {
    const float choice = chosen[blockIdx.y];
    out += u64(blockIdx.y) * rows;
    if (!(choice >= 0 && choice < float(experts))) {
        const u32 each = blockDim.x / WARP * GEMV_ROWS, row = blockIdx.x * each + threadIdx.x;
        if (threadIdx.x < each && row < rows) out[row] = NAN_F;
        return;
    }
    // In registers it would leave room for fewer warps.
    __shared__ ExpertLayer layer;
    constexpr u32 WORDS = sizeof(ExpertLayer) / sizeof(u64);
    if (threadIdx.x < WORDS) {
        reinterpret_cast<u64*>(&layer)[threadIdx.x] = reinterpret_cast<const u64*>(layers + u32(choice))[threadIdx.x];
    }
    __syncthreads();
    if (layer.w.codes) gemv<E, 1>(layer.w, x + u64(blockIdx.y) * stride, layer.bias, out, 1);
}

#define GEMV_CHOSEN(NAME, ENCODING)                                                                           \
    KERNEL(GEMV_THREADS, 2)                                                                                   \
    gemv_##NAME##_chosen(const ExpertLayer* layers, u32 experts, const float* chosen, const float* x,         \
                         u32 stride, float* out, u32 rows) {                                                  \
        gemv_chosen<ENCODING>(layers, experts, chosen, x, stride, out, rows);                                 \
    }
