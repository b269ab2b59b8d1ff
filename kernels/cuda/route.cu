// The k experts with the largest logits of each token, largest first, equal ones by their index, NaN last, and the softmax
// over them: logits [tokens, experts] to chosen and weights [tokens, k]. Chosen are their numbers as f32. A warp a token;
// 1 <= k <= experts <= 2^24.
#include "device.cuh"

struct Candidate {
    float value;
    u32 index;
};

// Whether `a` comes before `b`.
__device__ inline bool before(Candidate a, Candidate b) {
    bool a_nan = a.value != a.value, b_nan = b.value != b.value;
    if (a_nan != b_nan) return b_nan;
    if (!a_nan && a.value != b.value) return a.value > b.value;
    return a.index < b.index;
}

KERNEL(128) route(const float* logits, float* chosen, float* weights, u32 tokens, u32 experts, u32 k) {
    constexpr u32 NONE = 0xffffffffu;
    const u32 lane = threadIdx.x % WARP;
    const u64 token = u64(blockIdx.x) * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (token >= tokens) return;
    const float* row = logits + token * experts;
    Candidate last = {0, NONE};
    float max = 0, sum = 0;
    for (u32 slot = 0; slot < k; slot++) {
        Candidate best = {NAN_F, NONE};
        for (u32 i = lane; i < experts; i += WARP) {
            Candidate candidate = {row[i], i};
            bool left = slot == 0 || before(last, candidate);
            if (left && before(candidate, best)) best = candidate;
        }
        for (u32 step = WARP / 2; step > 0; step /= 2) {
            float value = __shfl_xor_sync(ALL_LANES, best.value, step);
            u32 index = __shfl_xor_sync(ALL_LANES, best.index, step);
            if (before({value, index}, best)) best = {value, index};
        }
        if (slot == 0) max = best.value;
        float weight = expf(best.value - max);
        sum += weight;
        if (lane == 0) {
            chosen[token * k + slot] = float(best.index);
            weights[token * k + slot] = weight;
        }
        last = best;
    }
    __syncwarp();
    for (u32 slot = lane; slot < k; slot += WARP) weights[token * k + slot] /= sum;
}
