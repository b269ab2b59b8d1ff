// GEMM in f32 without tensor cores: every encoding, any group size, any number of tokens. The path for shapes that the
// tensor-core kernels do not take; a block makes 64 tokens x 64 rows in steps of 32 columns.
#pragma once
#include "matrix.cuh"

constexpr u32 PLAIN_THREADS = 256, PLAIN_TILE = 64, PLAIN_COLS = 32;

template <class E>
__device__ inline void plain(const Matrix& w, const float* x, const float* bias, float* out, u32 tokens) {
    __shared__ float x_tile[PLAIN_COLS][PLAIN_TILE + 4];  // [cols, tokens]
    __shared__ float w_tile[PLAIN_COLS][PLAIN_TILE + 4];  // [cols, rows]
    const u64 row0 = u64(blockIdx.x) * PLAIN_TILE;
    const u32 token0 = blockIdx.y * PLAIN_TILE, thread = threadIdx.x, cols = u32(w.cols);
    const u32 my_token = thread / 16 * 4, my_row = thread % 16 * 4;
    float sums[4][4] = {};
    for (u32 start = 0; start < cols; start += PLAIN_COLS) {
        __syncthreads();
#pragma unroll 1
        for (u32 i = thread; i < PLAIN_COLS * PLAIN_TILE; i += PLAIN_THREADS) {
            u32 column = i % PLAIN_COLS, line = i / PLAIN_COLS;
            bool inside = start + column < cols;
            x_tile[column][line] =
                inside && token0 + line < tokens ? x[u64(token0 + line) * cols + start + column] : 0.0f;
            w_tile[column][line] =
                inside && row0 + line < w.rows ? E::weight(w, row0 + line, start + column) : 0.0f;
        }
        __syncthreads();
#pragma unroll 4
        for (u32 column = 0; column < PLAIN_COLS; column++) {
            float4 a = *reinterpret_cast<const float4*>(&x_tile[column][my_token]);
            float4 b = *reinterpret_cast<const float4*>(&w_tile[column][my_row]);
            const float as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
#pragma unroll
                for (u32 j = 0; j < 4; j++) sums[i][j] = fmaf(as[i], bs[j], sums[i][j]);
            }
        }
    }
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            u64 row = row0 + my_row + j;
            u32 token = token0 + my_token + i;
            if (token < tokens && row < w.rows) {
                out[u64(token) * w.rows + row] = sums[i][j] + (bias ? bias[row] : 0.0f);
            }
        }
    }
}

#define PLAIN(NAME, ENCODING)                                                                              \
    KERNEL(PLAIN_THREADS)                                                                                  \
    gemm_plain_##NAME(Matrix w, const float* x, const float* bias, float* out, u32 tokens) {               \
        plain<ENCODING>(w, x, bias, out, tokens);                                                          \
    }
