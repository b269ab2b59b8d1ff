// Product of many rows of activations with a packed matrix on tensor cores, for prefill and evaluation:
// out[t, r] = sum_c x[t, c] * w[r, c] + bias[r].
//
// Activations come as one BF16 term (`bf16`) or as the sum of two (`exact`, about 2^-17 relative), made once by
// split_activations. Codes are unpacked to exact small integers in BF16, multiplied with f32 accumulation, and each
// group's sum is scaled in f32. F32 and F16 weights are split in two terms, too; float weights come as `exact` alone.
// A block makes 64 tokens x 128 rows in steps of 64 columns; activations arrive by cp.async one step ahead, codes in
// registers one step ahead.
// Dynamic shared memory: 16384 X_TERMS + 16384 W_TERMS + 1024 bytes.
// Limits: group % 32 == 0 or one group a row; hi and lo [tokens, padded] with padded = cols rounded up to 64.
#pragma once
#include "matrix.cuh"

constexpr u32 GEMM_THREADS = 256;
constexpr u32 GEMM_TOKENS = 64, GEMM_ROWS = 128, GEMM_COLS = 64;
constexpr u32 GEMM_HALF = 32;  // columns that a thread unpacks, and over which a scale is the same

// Place of a segment of eight elements in rows of 64, so that neither rows nor columns of segments meet in a bank.
__device__ inline u32 segment(u32 row, u32 index) { return row * GEMM_COLS + (index ^ row % 8) * 8; }

// Thirty-two columns of a row, yet packed.
template <class E>
struct Packed {
    static constexpr u32 UNITS = E::TERNARY ? 1 : GEMM_HALF / E::UNIT;
    u32 words[UNITS][E::WORDS];

    __device__ void load(const Matrix& w, u64 row, u32 column, u32 alignment) {
        if constexpr (E::TERNARY) {
            // 32 columns from any digit of a byte lie in at most eight bytes.
            u32 first = column / 5, all = u32(w.code_bytes);
            const u8* bytes = w.codes + row * w.code_bytes + first;
            words[0][0] = first < all ? E::word(bytes, all - first) : 0;
            words[0][1] = first + 4 < all ? E::word(bytes + 4, all - first - 4) : 0;
        } else {
#pragma unroll
            for (u32 i = 0; i < UNITS; i++) E::load(words[i], w, row, column / E::UNIT + i, alignment);
        }
    }

    // The values of columns in order, minus `zero` where there are scales; zeros past the row's end do not matter,
    // since activations there are zero.
    template <class Store>
    __device__ void unpack(u32 column, float zero, Store store) {
        if constexpr (E::TERNARY) {
            u32 digit = column % 5, byte = 0, state = words[0][0] & 0xff;
            for (u32 skip = digit; skip > 0; skip--) state = state * 171 >> 9;
#pragma unroll
            for (u32 pair = 0; pair < GEMM_HALF / 2; pair++) {
                float values[2];
#pragma unroll
                for (u32 i = 0; i < 2; i++) {
                    u32 rest = state * 171 >> 9;
                    values[i] = biased(state - 3 * rest) - zero;
                    state = rest;
                    if (++digit == 5) {
                        digit = 0, byte++;
                        state = (byte < 4 ? words[0][0] >> 8 * byte : words[0][1] >> (8 * (byte - 4))) & 0xff;
                    }
                }
                store(pair, values[0], values[1]);
            }
        } else {
            u32 state = 0;
#pragma unroll
            for (u32 pair = 0; pair < GEMM_HALF / 2; pair++) {
                float values[2];
#pragma unroll
                for (u32 i = 0; i < 2; i++) {
                    u32 at = 2 * pair + i;
                    values[i] = E::code(words[at / E::UNIT], at % E::UNIT, state);
                    if constexpr (E::SCALED) values[i] -= zero;
                }
                store(pair, values[0], values[1]);
            }
        }
    }
};

// X_TERMS and W_TERMS: BF16 terms of an activation and of a weight.
template <class E, u32 X_TERMS, u32 W_TERMS>
__device__ inline void gemm(const Matrix& w, const u16* hi, const u16* lo, const float* bias, float* out, u32 tokens,
                            u32 padded) {
    constexpr u32 X_TILE = GEMM_TOKENS * GEMM_COLS, W_TILE = GEMM_ROWS * GEMM_COLS;
    DYNAMIC_SHARED(u16, tiles);
    u16* x_tiles = tiles;                         // [2 stages, X_TERMS, GEMM_TOKENS, GEMM_COLS]
    u16* w_tiles = tiles + 2 * X_TERMS * X_TILE;  // [W_TERMS, GEMM_ROWS, GEMM_COLS]
    float* scales = reinterpret_cast<float*>(w_tiles + W_TERMS * W_TILE);  // [2 halves of a step, GEMM_ROWS]

    const u32 thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    const u64 row0 = u64(blockIdx.x) * GEMM_ROWS;
    const u32 token0 = blockIdx.y * GEMM_TOKENS;
    const u32 cols = u32(w.cols), group = u32(min(w.group, w.cols)), alignment = row_alignment(w);
    const u32 steps = padded / GEMM_COLS;

    // What this thread unpacks: half `half` of row `unpacked`.
    const u32 unpacked = thread / 2, half = thread % 2;
    const u64 row = min(row0 + unpacked, w.rows - 1);
    // What its warp multiplies: 32 tokens x 32 rows.
    const u32 warp_token = warp / 4 * 32, warp_row = warp % 4 * 32;

    auto fetch_activations = [&](u32 step, u32 stage) {
        for (u32 i = thread; i < X_TERMS * X_TILE / 8; i += GEMM_THREADS) {
            u32 term = i / (X_TILE / 8), token = i / 8 % GEMM_TOKENS, index = i % 8;
            bool there = token0 + token < tokens;
            u64 from = u64(there ? token0 + token : 0) * padded + step * GEMM_COLS + index * 8;
            const u16* source = term == 0 ? hi : lo;
            copy_async(x_tiles + (stage * X_TERMS + term) * X_TILE + segment(token, index), source + from, there);
        }
        copy_commit();
    };

    float sums[2][4][4] = {};   // [16 tokens, 8 rows, fragment]
    float parts[2][4][4] = {};  // of the group so far
    Packed<E> packed;
    packed.load(w, row, half * GEMM_HALF, alignment);
    fetch_activations(0, 0);
    for (u32 step = 0; step < steps; step++) {
        const u32 start = step * GEMM_COLS, column = start + half * GEMM_HALF;
        float zero = 0;
        if constexpr (E::SCALED) {
            u32 at = min(column, cols - 1) / group;
            zero = E::zero(w, row, at);
            scales[half * GEMM_ROWS + unpacked] = scale_of(w, row, at);
        }
        packed.unpack(column, zero, [&](u32 pair, float first, float second) {
            u32 index = segment(unpacked, half * 4 + pair / 4) + pair % 4 * 2;
            u32 term = bf16_pair(first, second);
            *reinterpret_cast<u32*>(w_tiles + index) = term;
            if constexpr (W_TERMS == 2) {
                float rest_first = first - __uint_as_float(term << 16);
                float rest_second = second - __uint_as_float(term & 0xffff0000u);
                *reinterpret_cast<u32*>(w_tiles + W_TILE + index) = bf16_pair(rest_first, rest_second);
            }
        });
        copy_wait<0>();
        __syncthreads();
        if (step + 1 < steps) {
            fetch_activations(step + 1, (step + 1) % 2);
            packed.load(w, row, column + GEMM_COLS, alignment);
        }
        const u16* x_stage = x_tiles + step % 2 * X_TERMS * X_TILE;
#pragma unroll
        for (u32 k = 0; k < GEMM_COLS / 16; k++) {
            u32 b[W_TERMS][2][4];  // two n8 tiles a load: [k 0..8 | 8..16] of rows 0..8, then of rows 8..16
#pragma unroll
            for (u32 term = 0; term < W_TERMS; term++) {
#pragma unroll
                for (u32 n = 0; n < 2; n++) {
                    u32 from_row = warp_row + n * 16 + lane / 16 * 8 + lane % 8;
                    load_matrices(b[term][n], w_tiles + term * W_TILE + segment(from_row, k * 2 + lane / 8 % 2));
                }
            }
#pragma unroll
            for (u32 x_term = 0; x_term < X_TERMS; x_term++) {
#pragma unroll
                for (u32 m = 0; m < 2; m++) {
                    u32 a[4];
                    u32 from_row = warp_token + m * 16 + lane % 16;
                    load_matrices(a, x_stage + x_term * X_TILE + segment(from_row, k * 2 + lane / 16));
#pragma unroll
                    for (u32 n = 0; n < 4; n++) {
                        multiply_add(parts[m][n], a, b[0][n / 2][n % 2 * 2], b[0][n / 2][n % 2 * 2 + 1]);
                        if constexpr (W_TERMS == 2) {
                            // The product of two low terms is below what the sum of the others is rounded to.
                            if (x_term == 0) {
                                multiply_add(parts[m][n], a, b[1][n / 2][n % 2 * 2], b[1][n / 2][n % 2 * 2 + 1]);
                            }
                        }
                    }
                }
            }
            if constexpr (E::SCALED) {
                u32 end = start + (k + 1) * 16;
                if (k % 2 == 1 && (end % group == 0 || (step + 1 == steps && k + 1 == GEMM_COLS / 16))) {
#pragma unroll
                    for (u32 n = 0; n < 4; n++) {
#pragma unroll
                        for (u32 i = 0; i < 4; i++) {
                            float scale = scales[k / 2 * GEMM_ROWS + warp_row + n * 8 + lane % 4 * 2 + i % 2];
#pragma unroll
                            for (u32 m = 0; m < 2; m++) {
                                sums[m][n][i] = fmaf(scale, parts[m][n][i], sums[m][n][i]);
                                parts[m][n][i] = 0;
                            }
                        }
                    }
                }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (u32 m = 0; m < 2; m++) {
#pragma unroll
        for (u32 n = 0; n < 4; n++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                u64 to = row0 + warp_row + n * 8 + lane % 4 * 2 + i % 2;
                u32 token = token0 + warp_token + m * 16 + i / 2 * 8 + lane / 4;
                if (to < w.rows && token < tokens) {
                    float sum = E::SCALED ? sums[m][n][i] : parts[m][n][i];
                    out[u64(token) * w.rows + to] = sum + (bias ? bias[to] : 0.0f);
                }
            }
        }
    }
}

#define GEMM_EXACT(NAME, ENCODING, W_TERMS)                                                                \
    KERNEL(GEMM_THREADS, 2)                                                                                \
    gemm_##NAME##_exact(Matrix w, const u16* hi, const u16* lo, const float* bias, float* out, u32 tokens, \
                        u32 padded) {                                                                      \
        gemm<ENCODING, 2, W_TERMS>(w, hi, lo, bias, out, tokens, padded);                                  \
    }

#define GEMM_BF16(NAME, ENCODING)                                                                       \
    KERNEL(GEMM_THREADS, 2)                                                                             \
    gemm_##NAME##_bf16(Matrix w, const u16* hi, const float* bias, float* out, u32 tokens, u32 padded) { \
        gemm<ENCODING, 1, 1>(w, hi, nullptr, bias, out, tokens, padded);                                \
    }
