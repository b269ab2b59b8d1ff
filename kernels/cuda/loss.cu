// What is measured on rows of logits [rows, vocab], and greedy sampling: a block a row. Exponentials are f32, their sums
// f64 beyond a thread's block of 64, so that rounding does not grow with the vocabulary.
#include "device.cuh"

constexpr u32 BLOCK = 64;  // exponentials that a thread sums in f32

// The largest value; NaN is passed over.
__device__ inline float largest(const float* row, u32 vocab, float* scratch) {
    float max = -INFINITY_F;
    for (u32 i = threadIdx.x; i < vocab; i += blockDim.x) max = fmaxf(max, row[i]);
    return block_max(max, scratch);
}

// The sum of term(i) over i below vocab.
template <class Term>
__device__ inline double sum_terms(u32 vocab, double* scratch, Term term) {
    double total = 0;
    float part = 0;
    u32 terms = 0;
    for (u32 i = threadIdx.x; i < vocab; i += blockDim.x) {
        part += term(i);
        if (++terms % BLOCK == 0) total += double(part), part = 0;
    }
    return block_sum(total + double(part), scratch);
}

// Index of the largest value, the lowest of several, NaN never; every thread gets it.
__device__ inline u32 index_of_largest(const float* row, u32 vocab, float max, u32* scratch) {
    u32 best = vocab;
    for (u32 i = threadIdx.x; i < vocab; i += blockDim.x) {
        if (row[i] == max) {
            best = i;
            break;
        }
    }
    for (u32 step = WARP / 2; step > 0; step /= 2) best = min(best, __shfl_xor_sync(ALL_LANES, best, step));
    __syncthreads();
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = best;
    __syncthreads();
    for (u32 warp = 0; warp < blockDim.x / WARP; warp++) best = min(best, scratch[warp]);
    return best < vocab ? best : 0;
}

// The negative log-likelihood of each row's target, in nats.
KERNEL(256) cross_entropy(const float* logits, const u32* targets, double* out, u32 vocab) {
    __shared__ float floats[WARP];
    __shared__ double doubles[WARP];
    const float* row = logits + u64(blockIdx.x) * vocab;
    const float max = largest(row, vocab, floats);
    const double sum = sum_terms(vocab, doubles, [&](u32 i) { return expf(row[i] - max); });
    if (threadIdx.x == 0) {
        u32 target = targets[blockIdx.x];
        double logit = target < vocab ? double(row[target]) : double(NAN_F);
        out[blockIdx.x] = log(sum) - (logit - double(max));
    }
}

KERNEL(256) arg_max(const float* logits, u32* out, u32 vocab) {
    __shared__ float floats[WARP];
    __shared__ u32 indices[WARP];
    const float* row = logits + u64(blockIdx.x) * vocab;
    u32 best = index_of_largest(row, vocab, largest(row, vocab, floats), indices);
    if (threadIdx.x == 0) out[blockIdx.x] = best;
}

// KL(softmax(baseline) || softmax(other)) of each row in nats, and whether both have the same largest logit.
//
// With r_i = log q_i - log p_i the divergence is the sum of p_i (exp(r_i) - 1 - r_i), since the added terms sum to zero;
// no term is negative, so a divergence far below the rounding of a log-probability keeps its leading digits.
KERNEL(256) compare_logits(const float* baseline, const float* other, double* kl, u32* same_top, u32 vocab) {
    __shared__ float floats[WARP];
    __shared__ double doubles[WARP];
    __shared__ u32 indices[WARP];
    const float* a = baseline + u64(blockIdx.x) * vocab;
    const float* b = other + u64(blockIdx.x) * vocab;
    const float a_max = largest(a, vocab, floats), b_max = largest(b, vocab, floats);
    const double a_sum = sum_terms(vocab, doubles, [&](u32 i) { return expf(a[i] - a_max); });
    const double b_sum = sum_terms(vocab, doubles, [&](u32 i) { return expf(b[i] - b_max); });
    // The difference of the normalizers as a sum of logits' differences, which keeps its digits where rows are alike.
    const double shift = (double(a_max) - double(b_max)) + log(a_sum / b_sum);
    const double sum = sum_terms(vocab, doubles, [&](u32 i) {
        float weight = expf(a[i] - a_max);
        if (weight == 0.0f) return 0.0f;
        float ratio = float(double(b[i]) - double(a[i]) + shift);
        // Near zero the difference of nearly equal numbers is replaced by its series.
        float term = fabsf(ratio) < 0.25f
                         ? ratio * ratio *
                               (0.5f + ratio * (1.0f / 6 + ratio * (1.0f / 24 + ratio * (1.0f / 120 + ratio / 720))))
                         : expm1f(ratio) - ratio;
        return weight * term;
    });
    const u32 a_top = index_of_largest(a, vocab, a_max, indices), b_top = index_of_largest(b, vocab, b_max, indices);
    if (threadIdx.x == 0) {
        kl[blockIdx.x] = sum / a_sum;
        same_top[blockIdx.x] = a_top == b_top;
    }
}

// softmax(x * scale) of each row, in place.
KERNEL(256) softmax(float* x, u32 vocab, float scale) {
    __shared__ float floats[WARP];
    __shared__ double doubles[WARP];
    float* row = x + u64(blockIdx.x) * vocab;
    float max = -INFINITY_F;
    for (u32 i = threadIdx.x; i < vocab; i += blockDim.x) max = fmaxf(max, row[i] * scale);
    max = block_max(max, floats);
    const double sum = sum_terms(vocab, doubles, [&](u32 i) { return expf(row[i] * scale - max); });
    for (u32 i = threadIdx.x; i < vocab; i += blockDim.x) row[i] = float(double(expf(row[i] * scale - max)) / sum);
}
