// Rows of a packed matrix in f32: embedding, and dequantization where `tokens` is null (rows first, first + 1, ...).
// Each weight is the integer level times the scale, rounded once: the same bits as on the CPU. A token outside the table
// gives NaN.
#pragma once
#include "matrix.cuh"

template <class E>
__device__ inline void embed(const Matrix& table, const u32* tokens, u64 first, float* out, u32 count) {
    const u64 place = blockIdx.x;
    if (place >= count) return;
    const u64 row = tokens ? tokens[place] : first + place;
    for (u64 column = u64(blockIdx.y) * blockDim.x + threadIdx.x; column < table.cols;
         column += u64(gridDim.y) * blockDim.x) {
        out[place * table.cols + column] = row < table.rows ? E::weight(table, row, column) : NAN_F;
    }
}

#define EMBED(NAME, ENCODING)                                                            \
    KERNEL(256)                                                                          \
    embed_##NAME(Matrix table, const u32* tokens, u64 first, float* out, u32 count) {    \
        embed<ENCODING>(table, tokens, first, out, count);                               \
    }
