// RMSNorm (Zhang and Sennrich, 2019) and LayerNorm (Ba et al., 2016): a block a row [cols], any number of columns.
// Per head: rows are heads. `out` may be `x`.
#include "device.cuh"

KERNEL(256) rms_norm(const float* x, const float* gain, float* out, u32 cols, float epsilon) {
    __shared__ float scratch[WARP];
    const u64 row = u64(blockIdx.x) * cols;
    float squares = 0;
    for (u32 i = threadIdx.x; i < cols; i += blockDim.x) squares = fmaf(x[row + i], x[row + i], squares);
    const float scale = 1.0f / sqrtf(block_sum(squares, scratch) / float(cols) + epsilon);
    for (u32 i = threadIdx.x; i < cols; i += blockDim.x) out[row + i] = x[row + i] * scale * gain[i];
}

KERNEL(256) layer_norm(const float* x, const float* gain, const float* bias, float* out, u32 cols, float epsilon) {
    __shared__ float scratch[WARP];
    const u64 row = u64(blockIdx.x) * cols;
    float sum = 0;
    for (u32 i = threadIdx.x; i < cols; i += blockDim.x) sum += x[row + i];
    const float mean = block_sum(sum, scratch) / float(cols);
    // A second pass: the squares minus the square of the mean would cancel.
    float squares = 0;
    for (u32 i = threadIdx.x; i < cols; i += blockDim.x) {
        float deviation = x[row + i] - mean;
        squares = fmaf(deviation, deviation, squares);
    }
    const float scale = 1.0f / sqrtf(block_sum(squares, scratch) / float(cols) + epsilon);
    for (u32 i = threadIdx.x; i < cols; i += blockDim.x) out[row + i] = (x[row + i] - mean) * scale * gain[i] + bias[i];
}
