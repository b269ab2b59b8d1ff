// The diagonal of (H - zI)^-1 with H = tridiag(1, v_i - 2, 1), full and causal, in time linear in the positions.
//
// The ratios l_i = 1 / (v_i - 2 - z - l_{i-1}) are Moebius maps of each other, l -> (A l + B) / (C l + D) with the matrix
// [[0, 1], [-1, v_i - 2 - z]]: maps compose as their matrices multiply, so the recursion is a scan. A product grows like
// the determinants of H, so it is divided by its largest entry, which leaves the map as it is. All in f64; where z has an
// imaginary part, denominators are at least that.
//
// Tiles of 2048 positions: resolvent_tiles finds each tile's map, resolvent_carry the ratio before each tile, and a third
// kernel scans within tiles. Backwards (`backward` 1, resolvent_right) positions are taken from the last one on.
#include "device.cuh"

constexpr u32 THREADS = 256, LENGTH = 8, TILE = THREADS * LENGTH;

struct Complex {
    double re, im;
};

__device__ inline Complex operator*(Complex x, Complex y) {
    return {x.re * y.re - x.im * y.im, x.re * y.im + x.im * y.re};
}
__device__ inline Complex operator+(Complex x, Complex y) { return {x.re + y.re, x.im + y.im}; }
__device__ inline Complex operator-(Complex x, Complex y) { return {x.re - y.re, x.im - y.im}; }
__device__ inline Complex reciprocal(Complex x) {
    double factor = 1.0 / (x.re * x.re + x.im * x.im);
    return {x.re * factor, -x.im * factor};
}
// The larger part: within a factor of the modulus, which is all that keeping in range needs.
__device__ inline double size(Complex x) { return fmax(fabs(x.re), fabs(x.im)); }

struct Map {
    Complex a, b, c, d;
};

__device__ inline Map identity() { return {{1, 0}, {0, 0}, {0, 0}, {1, 0}}; }

__device__ inline Map in_range(Map m) {
    double factor = 1.0 / fmax(fmax(size(m.a), size(m.b)), fmax(size(m.c), size(m.d)));
    Complex scale = {factor, 0};
    return {m.a * scale, m.b * scale, m.c * scale, m.d * scale};
}

// First `first`, then `second`.
__device__ inline Map then(Map first, Map second) {
    return in_range({second.a * first.a + second.b * first.c, second.a * first.b + second.b * first.d,
                     second.c * first.a + second.d * first.c, second.c * first.b + second.d * first.d});
}

__device__ inline Complex apply(Map m, Complex x) { return (m.a * x + m.b) * reciprocal(m.c * x + m.d); }

// v - 2 - z of place i, counted in the direction of the scan.
__device__ inline Complex diagonal(const float* v, u64 n, u64 i, u32 backward, float zr, float zi) {
    double value = v[backward ? n - 1 - i : i];
    return {value - 2.0 - double(zr), -double(zi)};
}

__device__ inline Map shift_up(Map m, u32 by) {
    double parts[8] = {m.a.re, m.a.im, m.b.re, m.b.im, m.c.re, m.c.im, m.d.re, m.d.im};
#pragma unroll
    for (u32 i = 0; i < 8; i++) parts[i] = __shfl_up_sync(ALL_LANES, parts[i], by);
    return {{parts[0], parts[1]}, {parts[2], parts[3]}, {parts[4], parts[5]}, {parts[6], parts[7]}};
}

// The map of this thread's places, and with `before` that of all places of the tile before them.
__device__ inline Map own_map(const float* v, u64 n, u64 first, u32 backward, float zr, float zi) {
    Map map = identity();
    for (u64 i = first; i < first + LENGTH && i < n; i++) {
        Complex diag = diagonal(v, n, i, backward, zr, zi);
        // [[0, 1], [-1, diag]] times the map so far.
        map = in_range({map.c, map.d, diag * map.c - map.a, diag * map.d - map.b});
    }
    return map;
}

// The maps of all threads before this one, composed; in `all`, of the whole tile.
__device__ inline Map maps_before(Map own, Map* warps, Map& all) {
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    Map upto = own;
    for (u32 by = 1; by < WARP; by *= 2) {
        Map earlier = shift_up(upto, by);
        if (lane >= by) upto = then(earlier, upto);
    }
    Map before = shift_up(upto, 1);
    if (lane == 0) before = identity();
    __syncthreads();
    if (lane == WARP - 1) warps[warp] = upto;
    __syncthreads();
    Map prefix = identity(), total = identity();
    for (u32 i = 0; i < THREADS / WARP; i++) {
        if (i == warp) prefix = total;
        total = then(total, warps[i]);
    }
    all = total;
    return then(prefix, before);
}

// tiles [tiles, 8]: a, b, c, d of each tile's map, real and imaginary parts.
KERNEL(THREADS) resolvent_tiles(const float* v, u64 n, float zr, float zi, u32 backward, double* tiles) {
    __shared__ Map warps[THREADS / WARP];
    const u64 first = u64(blockIdx.x) * TILE + threadIdx.x * LENGTH;
    Map all;
    maps_before(own_map(v, n, first, backward, zr, zi), warps, all);
    if (threadIdx.x == 0) reinterpret_cast<Map*>(tiles)[blockIdx.x] = all;
}

// starts [count, 2]: the ratio before each tile; `start` is that before the first, zero if null.
KERNEL(32) resolvent_carry(const double* tiles, u32 count, const double* start, double* starts) {
    if (threadIdx.x != 0) return;
    Complex ratio = start ? Complex{start[0], start[1]} : Complex{0, 0};
    for (u32 tile = 0; tile < count; tile++) {
        starts[2 * u64(tile)] = ratio.re, starts[2 * u64(tile) + 1] = ratio.im;
        if (tile + 1 < count) ratio = apply(reinterpret_cast<const Map*>(tiles)[tile], ratio);
    }
}

// The ratio before this thread's first place.
__device__ inline Complex ratio_before(const float* v, u64 n, u64 first, u32 backward, float zr, float zi,
                                       const double* starts, Map* warps) {
    Map all, before = maps_before(own_map(v, n, first, backward, zr, zi), warps, all);
    return apply(before, {starts[2 * u64(blockIdx.x)], starts[2 * u64(blockIdx.x) + 1]});
}

// out [n, 2] in f32; last [2] becomes the ratio of the last position.
KERNEL(THREADS)
resolvent_causal(const float* v, u64 n, float zr, float zi, const double* starts, float* out, double* last) {
    __shared__ Map warps[THREADS / WARP];
    const u64 first = u64(blockIdx.x) * TILE + threadIdx.x * LENGTH;
    Complex ratio = ratio_before(v, n, first, 0, zr, zi, starts, warps);
    for (u64 i = first; i < first + LENGTH && i < n; i++) {
        ratio = reciprocal(diagonal(v, n, i, 0, zr, zi) - ratio);
        out[2 * i] = float(ratio.re), out[2 * i + 1] = float(ratio.im);
        if (i + 1 == n) last[0] = ratio.re, last[1] = ratio.im;
    }
}

// right [n, 2]: for each position the ratio, from the end, of the position that follows.
KERNEL(THREADS)
resolvent_right(const float* v, u64 n, float zr, float zi, const double* starts, double* right) {
    __shared__ Map warps[THREADS / WARP];
    const u64 first = u64(blockIdx.x) * TILE + threadIdx.x * LENGTH;
    Complex ratio = ratio_before(v, n, first, 1, zr, zi, starts, warps);
    for (u64 i = first; i < first + LENGTH && i < n; i++) {
        u64 position = n - 1 - i;
        right[2 * position] = ratio.re, right[2 * position + 1] = ratio.im;
        ratio = reciprocal(diagonal(v, n, i, 1, zr, zi) - ratio);
    }
}

KERNEL(THREADS)
resolvent_full(const float* v, u64 n, float zr, float zi, const double* starts, const double* right, float* out) {
    __shared__ Map warps[THREADS / WARP];
    const u64 first = u64(blockIdx.x) * TILE + threadIdx.x * LENGTH;
    Complex ratio = ratio_before(v, n, first, 0, zr, zi, starts, warps);
    for (u64 i = first; i < first + LENGTH && i < n; i++) {
        Complex rest = diagonal(v, n, i, 0, zr, zi) - ratio;
        Complex value = reciprocal(rest - Complex{right[2 * i], right[2 * i + 1]});
        out[2 * i] = float(value.re), out[2 * i + 1] = float(value.im);
        ratio = reciprocal(rest);
    }
}
