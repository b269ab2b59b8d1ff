// Embedding: rows of a packed matrix in f32. Each weight is the integer level times the scale, rounded once: the same bits
// as on the CPU. A token outside the table gives NaN.
#pragma once
#include "matrix.cuh"

template <class E>
__device__ inline void embed(const Matrix& table, const u32* tokens, float* out) {
    const u64 place = blockIdx.x, row = tokens[place];
    for (u64 column = u64(blockIdx.y) * blockDim.x + threadIdx.x; column < table.cols;
         column += u64(gridDim.y) * blockDim.x) {
        out[place * table.cols + column] = row < table.rows ? E::weight(table, row, column) : NAN_F;
    }
}

#define EMBED(NAME, ENCODING) \
    KERNEL(256) embed_##NAME(Matrix table, const u32* tokens, float* out) { embed<ENCODING>(table, tokens, out); }
