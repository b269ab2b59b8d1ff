// Rotary position embedding (Su et al., 2021) as Hugging Face's Llama has it: element i of a head turns with element
// i + head_dim / 2. In place on x [tokens, heads * head_dim]; cos and sin are [tokens, head_dim / 2].
#include "device.cuh"

KERNEL(256)
rope(float* x, const float* cos, const float* sin, u32 tokens, u32 heads, u32 head_dim) {
    const u32 half = head_dim / 2;
    for (u64 i = global_index(); i < u64(tokens) * heads * half; i += grid_threads()) {
        u64 head = i / half;  // of all tokens
        u32 element = u32(i % half);
        u64 turn = head / heads * half + element;
        float* at = x + head * head_dim + element;
        float a = at[0], b = at[half];
        at[0] = a * cos[turn] - b * sin[turn];
        at[half] = b * cos[turn] + a * sin[turn];
    }
}
