// A matrix exactly as it lies in a packed file (spec/bkpack-v1.md, section 4), and how its codes come out of words.
#pragma once
#include "device.cuh"

// [rows, cols], passed by value. Rows of codes may start at any multiple of the encoding's element.
struct Matrix {
    const u8* codes;   // [rows, code_bytes]; the values of a float encoding
    const u8* scales;  // [rows, groups] F32 or F16; null for float encodings
    const u8* zeros;   // [rows, zero_bytes]; null unless asymmetric
    u64 rows;
    u64 cols;
    u64 group;  // columns that share a scale
    u64 groups;
    u64 code_bytes;
    u64 zero_bytes;
    u32 scale_type;  // 0 F32, 1 F16
    u32 reserved;
};

__device__ inline float scale_of(const Matrix& w, u64 row, u32 group) {
    u64 index = row * w.groups + group;
    if (w.scale_type == 1) return f16_value(reinterpret_cast<const u16*>(w.scales)[index]);
    return reinterpret_cast<const float*>(w.scales)[index];
}

// Code `index` of a dense stream of BITS-bit codes.
template <u32 BITS>
__device__ inline u32 stream_code(const u8* stream, u64 index) {
    u64 bit = index * BITS;
    const u32* words = reinterpret_cast<const u32*>(stream) + bit / 32;
    u32 shift = u32(bit % 32);
    u32 code = words[0] >> shift;
    if (shift + BITS > 32) code |= words[1] << (32 - shift);
    return code & ((1u << BITS) - 1);
}

// An unsigned integer below 2^23, plus BIAS, as f32: one operation where a conversion takes four times as long. The bias
// is subtracted together with the zero point, exactly.
constexpr float BIAS = 8388608.0f;  // 2^23
__device__ inline float biased(u32 value) { return __uint_as_float(0x4b000000u | value); }

// W whole words from `from`, of which those at and after `there` are zero. `alignment` is that of every row in bytes.
template <u32 W>
__device__ inline void load_words(u32 (&to)[W], const u32* from, u32 there, u32 alignment) {
    if constexpr (W % 4 == 0) {
        if (there >= W && alignment >= 16) {
#pragma unroll
            for (u32 i = 0; i < W / 4; i++) {
                uint4 four = __ldcs(reinterpret_cast<const uint4*>(from) + i);
                to[4 * i] = four.x, to[4 * i + 1] = four.y, to[4 * i + 2] = four.z, to[4 * i + 3] = four.w;
            }
            return;
        }
    }
    if constexpr (W % 2 == 0) {
        if (there >= W && alignment >= 8) {
#pragma unroll
            for (u32 i = 0; i < W / 2; i++) {
                uint2 two = __ldcs(reinterpret_cast<const uint2*>(from) + i);
                to[2 * i] = two.x, to[2 * i + 1] = two.y;
            }
            return;
        }
    }
#pragma unroll
    for (u32 i = 0; i < W; i++) to[i] = i < there ? __ldcs(from + i) : 0;
}

__device__ inline u32 row_alignment(const Matrix& w) {
    u64 bits = reinterpret_cast<u64>(w.codes) | w.code_bytes;
    return bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : 1;
}

// An encoding says how many columns a lane unpacks at a time (UNIT, from WORDS registers), loads them, and gives each as
// an unsigned code plus BIAS or, where it has no scales, as the value itself.

template <u32 BITS_>
struct Int {
    static constexpr u32 BITS = BITS_, UNIT = 32, WORDS = BITS;
    static constexpr bool SCALED = true, TERNARY = false;

    __device__ static void load(u32 (&to)[WORDS], const Matrix& w, u64 row, u32 unit, u32 alignment) {
        u32 all = u32(w.code_bytes / 4), first = unit * WORDS;
        const u32* words = reinterpret_cast<const u32*>(w.codes + row * w.code_bytes);
        load_words<WORDS>(to, words + first, first < all ? all - first : 0, alignment);
    }
    // `state` belongs to encodings whose codes come one after the other.
    __device__ static float code(const u32 (&words)[WORDS], u32 column, u32&) {
        constexpr u32 MASK = (1u << BITS) - 1;
        u32 bit = column * BITS, word = bit / 32, shift = bit % 32;
        u32 value = words[word] >> shift;
        if (shift + BITS > 32) value = __funnelshift_r(words[word], words[word + 1], shift);
        return biased(value & MASK);
    }
    // The code that stands for a weight of zero, plus BIAS.
    __device__ static float zero(const Matrix& w, u64 row, u32 group) {
        return biased(w.zeros ? stream_code<BITS>(w.zeros + row * w.zero_bytes, group) : 1u << (BITS - 1));
    }
    __device__ static float weight(const Matrix& w, u64 row, u64 col) {
        u32 group = u32(col / w.group);
        float level = biased(stream_code<BITS>(w.codes + row * w.code_bytes, col)) - zero(w, row, group);
        return level * scale_of(w, row, group);
    }
};

struct Binary : Int<1> {
    // A weight is (2c - 1) s.
    __device__ static float code(const u32 (&words)[WORDS], u32 column, u32&) {
        return biased((column == 0 ? words[0] << 1 : words[0] >> (column - 1)) & 2);
    }
    __device__ static float zero(const Matrix&, u64, u32) { return BIAS + 1; }
    __device__ static float weight(const Matrix& w, u64 row, u64 col) {
        float scale = scale_of(w, row, u32(col / w.group));
        return stream_code<1>(w.codes + row * w.code_bytes, col) ? scale : -scale;
    }
};

struct Ternary {
    static constexpr u32 UNIT = 40, WORDS = 2;  // eight bytes of five codes
    static constexpr bool SCALED = true, TERNARY = true;

    __device__ static u32 word(const u8* bytes, u32 there) {
        u64 address = reinterpret_cast<u64>(bytes);
        const u32* words = reinterpret_cast<const u32*>(address & ~u64(3));
        u32 past = u32(address & 3);
        if (there == 0) return 0;
        u32 low = __ldcs(words);
        u32 high = past + min(there, 4u) > 4 ? __ldcs(words + 1) : 0;
        return __funnelshift_r(low, high, 8 * past);
    }
    __device__ static void load(u32 (&to)[WORDS], const Matrix& w, u64 row, u32 unit, u32) {
        u32 first = unit * 8, all = u32(w.code_bytes);
        const u8* bytes = w.codes + row * w.code_bytes + first;
        to[0] = first < all ? word(bytes, all - first) : 0;
        to[1] = first + 4 < all ? word(bytes + 4, all - first - 4) : 0;
    }
    // Columns must come in order: `state` holds the digits of a byte that are still to come.
    __device__ static float code(const u32 (&words)[WORDS], u32 column, u32& state) {
        if (column % 5 == 0) state = words[column / 20] >> (column / 5 % 4 * 8) & 0xff;
        u32 rest = state * 171 >> 9;  // state / 3, for every byte
        float digit = biased(state - 3 * rest);
        state = rest;
        return digit;
    }
    __device__ static float zero(const Matrix&, u64, u32) { return BIAS + 1; }
    __device__ static float weight(const Matrix& w, u64 row, u64 col) {
        u32 rest = w.codes[row * w.code_bytes + col / 5];
        for (u32 digit = u32(col % 5); digit > 0; digit--) rest = rest * 171 >> 9;
        float level = float(int(rest - rest * 171 / 512 * 3) - 1);
        return level * scale_of(w, row, u32(col / w.group));
    }
};

struct F32 {
    static constexpr u32 UNIT = 8, WORDS = 8;
    static constexpr bool SCALED = false, TERNARY = false;

    __device__ static void load(u32 (&to)[WORDS], const Matrix& w, u64 row, u32 unit, u32 alignment) {
        u32 all = u32(w.cols), first = unit * WORDS;
        const u32* words = reinterpret_cast<const u32*>(w.codes + row * w.code_bytes);
        load_words<WORDS>(to, words + first, first < all ? all - first : 0, alignment);
    }
    __device__ static float code(const u32 (&words)[WORDS], u32 column, u32&) { return __uint_as_float(words[column]); }
    __device__ static float weight(const Matrix& w, u64 row, u64 col) {
        return reinterpret_cast<const float*>(w.codes + row * w.code_bytes)[col];
    }
};

// F16 and BF16: two values a word.
struct Halves {
    static constexpr u32 UNIT = 16, WORDS = 8;
    static constexpr bool SCALED = false, TERNARY = false;

    __device__ static void load(u32 (&to)[WORDS], const Matrix& w, u64 row, u32 unit, u32 alignment) {
        u32 first = unit * UNIT, all = u32(w.cols);
        const u16* values = reinterpret_cast<const u16*>(w.codes + row * w.code_bytes) + first;
        if (first + UNIT <= all && alignment >= 4) {
            load_words<WORDS>(to, reinterpret_cast<const u32*>(values), WORDS, alignment);
        } else {
            // Past the row's end may lie a NaN, which zero activations would not silence.
#pragma unroll
            for (u32 i = 0; i < WORDS; i++) {
                u32 low = first + 2 * i < all ? values[2 * i] : 0;
                u32 high = first + 2 * i + 1 < all ? values[2 * i + 1] : 0;
                to[i] = low | high << 16;
            }
        }
    }
};

struct F16 : Halves {
    __device__ static float code(const u32 (&words)[WORDS], u32 column, u32&) {
        return f16_value(u16(words[column / 2] >> (column % 2 * 16)));
    }
    __device__ static float weight(const Matrix& w, u64 row, u64 col) {
        return f16_value(reinterpret_cast<const u16*>(w.codes + row * w.code_bytes)[col]);
    }
};

struct BF16 : Halves {
    __device__ static float code(const u32 (&words)[WORDS], u32 column, u32&) {
        return __uint_as_float(column % 2 ? words[column / 2] & 0xffff0000u : words[column / 2] << 16);
    }
    __device__ static float weight(const Matrix& w, u64 row, u64 col) {
        return bf16_value(reinterpret_cast<const u16*>(w.codes + row * w.code_bytes)[col]);
    }
};
