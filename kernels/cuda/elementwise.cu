// Operations on each element, copies of rows and columns, and the BF16 terms of activations. Loops over the grid: any
// number of elements. In place on the first argument unless it is const.
#include "device.cuh"

#define EACH(i, n) for (u64 i = global_index(); i < (n); i += grid_threads())

KERNEL(256) silu(float* x, u64 n) {
    EACH(i, n) x[i] = x[i] / (1.0f + expf(-x[i]));
}

KERNEL(256) relu(float* x, u64 n) {
    // A comparison, not fmaxf: a NaN stays one.
    EACH(i, n) x[i] = x[i] < 0.0f ? 0.0f : x[i];
}

KERNEL(256) softplus(float* x, u64 n) {
    EACH(i, n) x[i] = x[i] > 20.0f ? x[i] : log1pf(expf(x[i]));
}

KERNEL(256) negative_exp(float* x, u64 n) {
    EACH(i, n) x[i] = -expf(x[i]);
}

KERNEL(256) clamp(float* x, u64 n, float limit) {
    EACH(i, n) {
        float value = x[i];
        x[i] = value > limit ? limit : value < -limit ? -limit : value;
    }
}

KERNEL(256) add(float* x, const float* y, u64 n) {
    EACH(i, n) x[i] += y[i];
}

// x + scale * y; scale is one value in memory.
KERNEL(256) add_scaled(float* x, const float* y, const float* scale, u64 n) {
    EACH(i, n) x[i] = fmaf(*scale, y[i], x[i]);
}

KERNEL(256) silu_multiply(float* gate, const float* up, u64 n) {
    EACH(i, n) gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

// The nearest multiple of an element's own scale, halves to even, at most `largest` steps; zero for a zero scale.
KERNEL(256) round_to_grid(float* x, const float* scales, u64 n, float largest) {
    EACH(i, n) {
        float steps = rintf(__fdiv_rn(x[i], scales[i]));
        steps = steps > largest ? largest : steps < -largest ? -largest : steps;
        x[i] = scales[i] == 0.0f ? 0.0f : steps * scales[i];
    }
}

// Columns first..first + count of x [rows, cols] to out [rows, count]; n = rows * count.
KERNEL(256) copy_columns(const float* x, float* out, u64 n, u32 cols, u32 first, u32 count) {
    EACH(i, n) out[i] = x[i / count * cols + first + i % count];
}

// The rows of x [.., cols] that `rows` names; n = rows * cols.
KERNEL(256) gather_rows(const float* x, const u32* rows, float* out, u64 n, u32 cols) {
    EACH(i, n) out[i] = x[u64(rows[i / cols]) * cols + i % cols];
}

// sum[token] += weights[token, slot] * y[i] for places [count, 2] of (token, slot); n = count * cols. No token occurs
// twice, so that no two threads add to one element.
KERNEL(256)
scatter_add(float* sum, const float* y, const u32* places, const float* weights, u64 n, u32 cols, u32 chosen) {
    EACH(i, n) {
        u64 place = i / cols;
        u64 token = places[2 * place], slot = places[2 * place + 1];
        float* to = sum + token * cols + i % cols;
        *to = fmaf(weights[token * chosen + slot], y[i], *to);
    }
}

// out[c] = sum over rows of weights[row] * y[row, c], first rows first; n columns.
KERNEL(256) weighted_sum(const float* weights, const float* y, float* out, u64 n, u32 rows) {
    EACH(i, n) {
        float sum = 0;
        for (u32 row = 0; row < rows; row++) sum = fmaf(weights[row], y[row * n + i], sum);
        out[i] = sum;
    }
}

// x [tokens, cols] as hi + lo in BF16, both [tokens, padded], zero beyond cols; lo may be null. padded % 8 == 0.
KERNEL(256) split_activations(const float* x, u16* hi, u16* lo, u32 tokens, u32 cols, u32 padded) {
    EACH(i, u64(tokens) * padded / 8) {
        u64 token = i / (padded / 8);
        u32 column = u32(i % (padded / 8)) * 8;
        u32 high[4], low[4];
#pragma unroll
        for (u32 pair = 0; pair < 4; pair++) {
            float values[2];
#pragma unroll
            for (u32 j = 0; j < 2; j++) {
                u32 at = column + 2 * pair + j;
                values[j] = at < cols ? x[token * cols + at] : 0.0f;
            }
            high[pair] = bf16_pair(values[0], values[1]);
            low[pair] = bf16_pair(values[0] - __uint_as_float(high[pair] << 16),
                                  values[1] - __uint_as_float(high[pair] & 0xffff0000u));
        }
        reinterpret_cast<uint4*>(hi)[i] = make_uint4(high[0], high[1], high[2], high[3]);
        if (lo) reinterpret_cast<uint4*>(lo)[i] = make_uint4(low[0], low[1], low[2], low[3]);
    }
}
