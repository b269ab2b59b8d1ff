// What every kernel shares: types, warp and block sums, and the few instructions that CUDA C++ has no name for.
//
// All inline PTX of the project is in this file, so that the emulator can replace it.
#pragma once

#ifdef BKPACK_EMULATE
#include "emulate/shim.h"
#else
// The most threads of a block, and at will the blocks that should fit on a multiprocessor.
#define KERNEL(...) extern "C" __global__ void __launch_bounds__(__VA_ARGS__)
// Shared memory whose size the launch gives.
#define DYNAMIC_SHARED(type, name)                              \
    extern __shared__ __align__(16) unsigned char name##_raw[]; \
    type* name = reinterpret_cast<type*>(name##_raw)
#define INFINITY_F __int_as_float(0x7f800000)
#define NAN_F __int_as_float(0x7fffffff)
#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr u32 WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;

__device__ inline u64 global_index() { return u64(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ inline u64 grid_threads() { return u64(gridDim.x) * blockDim.x; }

__device__ inline float bf16_value(u32 bits) { return __uint_as_float(bits << 16); }

#ifndef BKPACK_EMULATE
// The value of an F16.
__device__ inline float f16_value(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// Two values rounded to BF16, the first in the low half.
__device__ inline u32 bf16_pair(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// Copies 16 bytes to shared memory without passing through registers; zeros where there is nothing to copy.
__device__ inline void copy_async(void* shared, const void* global, bool there) {
    u32 to = u32(__cvta_generic_to_shared(shared));
    int bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `PENDING` groups of copies are still under way.
template <int PENDING>
__device__ inline void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ inline void load_matrices(u32 (&to)[4], const void* shared) {
    u32 from = u32(__cvta_generic_to_shared(shared));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
}

// sum += a * b with a [16, 16] and b [16, 8] in BF16 and sum [16, 8] in f32, spread over a warp.
__device__ inline void multiply_add(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

__device__ inline float warp_sum(float value) {
    for (u32 step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(ALL_LANES, value, step);
    return value;
}

__device__ inline float warp_max(float value) {
    for (u32 step = WARP / 2; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, step));
    return value;
}

// The sum over a block, in every thread. `scratch` has a place for each of up to 32 warps.
__device__ inline float block_sum(float value, float* scratch) {
    value = warp_sum(value);
    __syncthreads();
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = value;
    __syncthreads();
    float sum = 0;
    for (u32 warp = 0; warp < blockDim.x / WARP; warp++) sum += scratch[warp];
    return sum;
}
