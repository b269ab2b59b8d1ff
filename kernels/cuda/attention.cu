// Causal attention with grouped queries and a sliding window over a cache of keys and values in f32, each
// [kv_heads, capacity, head_dim]; token t of a call stands at position *past + t and sees the last `window` positions up to
// its own. head_dim <= 256.
//
// Prefill follows FlashAttention (Dao et al., 2022): tiles of 32 queries x 32 keys with a running maximum and sum, so the
// scores are never written. Decoding splits the keys over blocks, which write unnormalized outputs with their maximum and
// sum, and combines them (Flash-Decoding, 2023). All arithmetic in f32.
#include "device.cuh"

KERNEL(256)
kv_append(const float* key, const float* value, float* keys, float* values, const u32* past, u32 tokens, u32 kv_heads,
          u32 head_dim, u32 capacity) {
    const u64 width = u64(kv_heads) * head_dim, first = *past;
    for (u64 i = global_index(); i < tokens * width; i += grid_threads()) {
        u64 position = first + i / width, head = i % width / head_dim;
        if (position >= capacity) continue;
        u64 to = (head * capacity + position) * head_dim + i % head_dim;
        keys[to] = key[i];
        values[to] = value[i];
    }
}

// The positions that a token at `position` sees: from this one on.
__device__ inline u32 first_visible(u32 position, u32 window) { return position < window ? 0 : position - window + 1; }

constexpr u32 TILE = 32;  // queries, and keys, of a tile
constexpr u32 MAX_QUADS = 8;  // of 32 elements, in a head

// Shared: q and k [TILE, D + 4], v [TILE, D], p [TILE, TILE + 4] with D = head_dim rounded up to 32.
KERNEL(256)
attention_prefill(const float* q, const float* keys, const float* values, float* out, const u32* past, u32 tokens,
                  u32 heads, u32 kv_heads, u32 head_dim, u32 capacity, u32 window, float scale) {
    DYNAMIC_SHARED(float, shared);
    const u32 dim = (head_dim + 31) / 32 * 32, pitch = dim + 4;
    float* q_tile = shared;
    float* k_tile = q_tile + TILE * pitch;
    float* v_tile = k_tile + TILE * pitch;
    float* p_tile = v_tile + TILE * dim;
    const u32 thread = threadIdx.x, query = thread / 8, slot = thread % 8;
    const u32 head = blockIdx.y, token0 = blockIdx.x * TILE;
    const u64 cache = u64(head / (heads / kv_heads)) * capacity * head_dim;
    const u32 first = *past, position = first + token0 + query;
    const u32 from = first_visible(position, window);
    const u32 count = min(TILE, tokens - token0);

    for (u32 i = thread; i < TILE * dim; i += blockDim.x) {
        u32 row = i / dim, element = i % dim;
        bool there = row < count && element < head_dim;
        q_tile[row * pitch + element] =
            there ? q[(u64(token0 + row) * heads + head) * head_dim + element] * scale : 0.0f;
    }
    float max = -INFINITY_F, sum = 0;
    float4 result[MAX_QUADS];  // elements 32 i + 4 slot and the three after it
#pragma unroll
    for (u32 i = 0; i < MAX_QUADS; i++) result[i] = make_float4(0, 0, 0, 0);

    const u32 end = min(first + token0 + count, capacity);
    for (u32 key0 = first_visible(first + token0, window) / TILE * TILE; key0 < end; key0 += TILE) {
        __syncthreads();
        for (u32 i = thread; i < TILE * dim; i += blockDim.x) {
            u32 row = i / dim, element = i % dim;
            bool there = key0 + row < end && element < head_dim;
            u64 at = cache + u64(key0 + row) * head_dim + element;
            k_tile[row * pitch + element] = there ? keys[at] : 0.0f;
            v_tile[row * dim + element] = there ? values[at] : 0.0f;
        }
        __syncthreads();
        float scores[4] = {};  // of keys slot, slot + 8, ...
        for (u32 element = 0; element < dim; element += 4) {
            float4 a = *reinterpret_cast<const float4*>(q_tile + query * pitch + element);
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                float4 b = *reinterpret_cast<const float4*>(k_tile + (slot + 8 * j) * pitch + element);
                scores[j] = fmaf(a.x, b.x, fmaf(a.y, b.y, fmaf(a.z, b.z, fmaf(a.w, b.w, scores[j]))));
            }
        }
        float tile_max = -INFINITY_F;
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            u32 key = key0 + slot + 8 * j;
            if (key < from || key > position || key >= end) scores[j] = -INFINITY_F;
            tile_max = fmaxf(tile_max, scores[j]);
        }
        for (u32 step = 1; step < 8; step *= 2) tile_max = fmaxf(tile_max, __shfl_xor_sync(ALL_LANES, tile_max, step));
        const float new_max = fmaxf(max, tile_max);
        // Where a query has seen no key yet, both are -inf, and their difference would be NaN.
        const float base = new_max == -INFINITY_F ? 0.0f : new_max, keep = expf(max - base);
        sum *= keep;
        max = new_max;
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            float p = expf(scores[j] - base);
            sum += p;
            p_tile[query * (TILE + 4) + slot + 8 * j] = p;
        }
        // A query's row of p is written and read by the same warp.
        __syncwarp();
#pragma unroll
        for (u32 i = 0; i < MAX_QUADS; i++) {
            result[i].x *= keep, result[i].y *= keep, result[i].z *= keep, result[i].w *= keep;
        }
        for (u32 key = 0; key < TILE; key++) {
            float p = p_tile[query * (TILE + 4) + key];
#pragma unroll
            for (u32 i = 0; i < MAX_QUADS; i++) {
                if (32 * i >= dim) break;
                float4 v = *reinterpret_cast<const float4*>(v_tile + key * dim + 32 * i + 4 * slot);
                result[i].x = fmaf(p, v.x, result[i].x);
                result[i].y = fmaf(p, v.y, result[i].y);
                result[i].z = fmaf(p, v.z, result[i].z);
                result[i].w = fmaf(p, v.w, result[i].w);
            }
        }
    }
    for (u32 step = 1; step < 8; step *= 2) sum += __shfl_xor_sync(ALL_LANES, sum, step);
    if (query >= count) return;
    float* to = out + (u64(token0 + query) * heads + head) * head_dim;
#pragma unroll
    for (u32 i = 0; i < MAX_QUADS; i++) {
        const float part[4] = {result[i].x, result[i].y, result[i].z, result[i].w};
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            u32 element = 32 * i + 4 * slot + j;
            if (element < head_dim) to[element] = part[j] / sum;
        }
    }
}

constexpr u32 SHARERS = 4;  // query heads that a block reads keys and values for
constexpr u32 KEYS = 64;    // keys of a tile
constexpr u32 MAX_HEAD = 256;

// partial [tokens, heads, splits, head_dim + 2]: unnormalized outputs, their maximum score and their sum.
KERNEL(128)
attention_decode(const float* q, const float* keys, const float* values, float* partial, const u32* past, u32 tokens,
                 u32 heads, u32 kv_heads, u32 head_dim, u32 capacity, u32 window, float scale, u32 splits) {
    __shared__ float queries[SHARERS][MAX_HEAD];
    __shared__ float weights[SHARERS][KEYS];
    __shared__ float keeps[SHARERS];
    const u32 thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    const u32 group = heads / kv_heads, parts = (group + SHARERS - 1) / SHARERS;
    const u32 kv_head = blockIdx.x / parts, token = blockIdx.z;
    const u32 head0 = kv_head * group + blockIdx.x % parts * SHARERS;
    const u32 sharers = min(SHARERS, (kv_head + 1) * group - head0);
    const u32 position = *past + token, from = first_visible(position, window);
    const u32 end = min(position + 1, capacity), visible = end > from ? end - from : 0;
    const u32 share = (visible + splits - 1) / splits;
    const u32 split_from = min(from + blockIdx.y * share, end), split_end = min(split_from + share, end);
    const float* head_keys = keys + u64(kv_head) * capacity * head_dim;
    const float* head_values = values + u64(kv_head) * capacity * head_dim;

    for (u32 i = thread; i < SHARERS * head_dim; i += blockDim.x) {
        u32 sharer = i / head_dim, element = i % head_dim;
        queries[sharer][element] =
            sharer < sharers ? q[(u64(token) * heads + head0 + sharer) * head_dim + element] * scale : 0.0f;
    }
    // Warp w keeps the maximum and the sum of head w; a thread the elements `thread` and `thread + 128` of every head.
    float max = -INFINITY_F, sum = 0;
    float results[SHARERS][2] = {};
    for (u32 key0 = split_from; key0 < split_end; key0 += KEYS) {
        __syncthreads();
        // Eight lanes a key: their loads are whole sectors.
        for (u32 i = thread / 8; i < KEYS; i += 16) {
            float scores[SHARERS] = {};
            if (key0 + i < split_end) {
                const float* key = head_keys + u64(key0 + i) * head_dim;
#pragma unroll 4
                for (u32 element = thread % 8; element < head_dim; element += 8) {
                    float value = key[element];
#pragma unroll
                    for (u32 sharer = 0; sharer < SHARERS; sharer++) {
                        scores[sharer] = fmaf(value, queries[sharer][element], scores[sharer]);
                    }
                }
            }
#pragma unroll
            for (u32 sharer = 0; sharer < SHARERS; sharer++) {
                for (u32 step = 1; step < 8; step *= 2) {
                    scores[sharer] += __shfl_xor_sync(ALL_LANES, scores[sharer], step);
                }
                if (thread % 8 == 0) weights[sharer][i] = key0 + i < split_end ? scores[sharer] : -INFINITY_F;
            }
        }
        __syncthreads();
        {
            float a = weights[warp][lane], b = weights[warp][lane + WARP];
            float new_max = fmaxf(max, warp_max(fmaxf(a, b)));
            float base = new_max == -INFINITY_F ? 0.0f : new_max, keep = expf(max - base);
            float pa = expf(a - base), pb = expf(b - base);
            weights[warp][lane] = pa, weights[warp][lane + WARP] = pb;
            sum = sum * keep + warp_sum(pa + pb);
            max = new_max;
            if (lane == 0) keeps[warp] = keep;
        }
        __syncthreads();
#pragma unroll
        for (u32 sharer = 0; sharer < SHARERS; sharer++) {
            results[sharer][0] *= keeps[sharer], results[sharer][1] *= keeps[sharer];
        }
        const u32 count = min(KEYS, split_end - key0);
#pragma unroll 4
        for (u32 i = 0; i < count; i++) {
            const float* value = head_values + u64(key0 + i) * head_dim;
            float low = thread < head_dim ? value[thread] : 0.0f;
            float high = thread + 128 < head_dim ? value[thread + 128] : 0.0f;
#pragma unroll
            for (u32 sharer = 0; sharer < SHARERS; sharer++) {
                results[sharer][0] = fmaf(weights[sharer][i], low, results[sharer][0]);
                results[sharer][1] = fmaf(weights[sharer][i], high, results[sharer][1]);
            }
        }
    }
#pragma unroll
    for (u32 sharer = 0; sharer < SHARERS; sharer++) {
        if (sharer >= sharers) break;
        float* to = partial + ((u64(token) * heads + head0 + sharer) * splits + blockIdx.y) * (head_dim + 2);
#pragma unroll
        for (u32 part = 0; part < 2; part++) {
            if (thread + part * 128 < head_dim) to[thread + part * 128] = results[sharer][part];
        }
        if (warp == sharer && lane == 0) to[head_dim] = max, to[head_dim + 1] = sum;
    }
}

KERNEL(128)
attention_combine(const float* partial, float* out, u32 tokens, u32 heads, u32 head_dim, u32 splits) {
    const u64 head = u64(blockIdx.y) * heads + blockIdx.x;  // of all tokens
    const float* from = partial + head * splits * (head_dim + 2);
    float max = -INFINITY_F, sum = 0;
    for (u32 split = 0; split < splits; split++) max = fmaxf(max, from[u64(split) * (head_dim + 2) + head_dim]);
    const float base = max == -INFINITY_F ? 0.0f : max;
    for (u32 split = 0; split < splits; split++) {
        const float* part = from + u64(split) * (head_dim + 2) + head_dim;
        sum += expf(part[0] - base) * part[1];
    }
    for (u32 element = threadIdx.x; element < head_dim; element += blockDim.x) {
        float value = 0;
        for (u32 split = 0; split < splits; split++) {
            const float* part = from + u64(split) * (head_dim + 2);
            value = fmaf(expf(part[head_dim] - base), part[element], value);
        }
        out[head * head_dim + element] = value / sum;
    }
}
