// CUDA C++ for a CPU: what the kernels use of the language, for the emulator alone. A thread of a block is a fiber; a
// barrier and every operation of a warp give way to the others. See fibers.cpp.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>

#ifdef BKPACK_LIST
#define KERNEL(...) KERNEL_ENTRY (__VA_ARGS__) void
#else
#define KERNEL(...) static void
#endif
#define __global__
#define __device__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// Blocks run one after the other.
#define __shared__ static
#define DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(emulator::dynamic_shared())
#define INFINITY_F __builtin_inff()
#define NAN_F __builtin_nanf("")

using std::max;
using std::min;

struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct Dimensions { unsigned x, y, z; };

namespace emulator {
extern Dimensions thread_index, block_index, block_size, grid_size;
void* dynamic_shared();
void block_barrier();
void warp_barrier();
// Every lane gives `bytes` bytes and sees those of all 32, `bytes` apart; valid until the warp's next operation but one.
const void* exchange(const void* own, unsigned bytes, int operation);
void fail(const char* why);
void copy_async(void* to, const void* from, bool there);
void copy_commit();
void copy_wait(int pending);
}  // namespace emulator

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define blockDim emulator::block_size
#define gridDim emulator::grid_size

inline void __syncthreads() { emulator::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
    if (mask != 0xffffffffu) emulator::fail("__syncwarp of some lanes is not emulated");
    emulator::warp_barrier();
}

namespace emulator {
template <class T>
inline T shuffle(unsigned mask, T value, unsigned from, int operation) {
    if (mask != 0xffffffffu) fail("a shuffle of some lanes is not emulated");
    return static_cast<const T*>(exchange(&value, sizeof(T), operation))[from];
}
inline unsigned lane() { return thread_index.x % 32; }
}  // namespace emulator

template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, unsigned bits) {
    return emulator::shuffle(mask, value, emulator::lane() ^ (bits & 31), 1);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned by) {
    return emulator::shuffle(mask, value, emulator::lane() >= by ? emulator::lane() - by : emulator::lane(), 2);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned by) {
    return emulator::shuffle(mask, value, emulator::lane() + by < 32 ? emulator::lane() + by : emulator::lane(), 3);
}
template <class T>
inline T __shfl_sync(unsigned mask, T value, unsigned from) {
    return emulator::shuffle(mask, value, from % 32, 4);
}

template <class T>
inline T __ldcs(const T* from) {
    // A vector load faults on a card where its address is not a multiple of its size.
    if (reinterpret_cast<uintptr_t>(from) % sizeof(T)) emulator::fail("a load is not aligned");
    return *from;
}

inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    return bits;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return unsigned((uint64_t(high) << 32 | low) >> (shift & 31));
}
inline float __fdiv_rn(float x, float y) { return x / y; }

inline float f16_value(unsigned short bits) {
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float value = exponent == 31 ? (fraction ? __builtin_nanf("") : __builtin_inff())
                  : exponent     ? ldexpf(float(1024 + fraction), exponent - 25)
                                 : ldexpf(float(fraction), -24);
    return bits >> 15 ? -value : value;
}
inline unsigned bf16_bits(float value) {
    if (value != value) return 0x7fff;
    unsigned bits = __float_as_uint(value);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline unsigned bf16_pair(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }

inline void copy_async(void* shared, const void* global, bool there) { emulator::copy_async(shared, global, there); }
inline void copy_commit() { emulator::copy_commit(); }
template <int PENDING>
inline void copy_wait() {
    emulator::copy_wait(PENDING);
}

inline void load_matrices(unsigned (&to)[4], const void* shared) {
    if (reinterpret_cast<uintptr_t>(shared) % 16) emulator::fail("a row of ldmatrix is not aligned");
    const void* const* rows = static_cast<const void* const*>(emulator::exchange(&shared, sizeof shared, 5));
    unsigned lane = emulator::lane();
    for (unsigned matrix = 0; matrix < 4; matrix++) {
        memcpy(&to[matrix], static_cast<const char*>(rows[matrix * 8 + lane / 4]) + lane % 4 * 4, 4);
    }
}

// The fragments' layout is that of the PTX manual for mma.m16n8k16 with 16-bit elements.
inline void multiply_add(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    struct Fragments { unsigned a[4], b[2]; } own = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    const Fragments* lanes = static_cast<const Fragments*>(emulator::exchange(&own, sizeof own, 6));
    auto half = [](unsigned pair, unsigned index) { return __uint_as_float(index ? pair & 0xffff0000u : pair << 16); };
    unsigned lane = emulator::lane();
    for (unsigned i = 0; i < 4; i++) {
        unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float total = 0;
        for (unsigned k = 0; k < 16; k++) {
            const Fragments& from_a = lanes[row % 8 * 4 + k % 8 / 2];
            const Fragments& from_b = lanes[column * 4 + k % 8 / 2];
            total += half(from_a.a[row / 8 + k / 8 * 2], k % 2) * half(from_b.b[k / 8], k % 2);
        }
        sum[i] += total;
    }
}
