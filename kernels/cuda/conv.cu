// Causal depthwise convolution: out[t, c] = bias[c] + sum_j weight[c, j] * x[t - kernel + 1 + j, c], where rows before the
// first come from history [kernel - 1, channels], oldest first. conv_history, after it, keeps the rows for the next call.
#include "device.cuh"

KERNEL(256)
depthwise_conv(const float* x, const float* weight, const float* bias, const float* history, float* out, u32 tokens,
               u32 channels, u32 kernel) {
    for (u64 i = global_index(); i < u64(tokens) * channels; i += grid_threads()) {
        u32 token = u32(i / channels), channel = u32(i % channels);
        float sum = bias ? bias[channel] : 0.0f;
        for (u32 j = 0; j < kernel; j++) {
            u64 row = u64(token) + j;  // counted from the oldest of the history
            float value = row < kernel - 1 ? history[row * channels + channel] : x[(row - (kernel - 1)) * channels + channel];
            sum = fmaf(weight[u64(channel) * kernel + j], value, sum);
        }
        out[i] = sum;
    }
}

KERNEL(256) conv_history(const float* x, float* history, u32 tokens, u32 channels, u32 kernel) {
    const u64 channel = global_index();
    if (channel >= channels) return;
    // Rows move towards the older end, so that in this order none is overwritten before it is read.
    for (u64 row = 0; row + 1 < kernel; row++) {
        u64 from = row + tokens;
        history[row * channels + channel] =
            from < kernel - 1 ? history[from * channels + channel] : x[(from - (kernel - 1)) * channels + channel];
    }
}
