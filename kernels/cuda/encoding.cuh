// Everything that reads matrices of one encoding: a module of its own, so that the driver compiles only what a model uses.
#pragma once
#include "embed.cuh"
#include "gemm.cuh"
#include "gemv.cuh"
#include "plain.cuh"

// Floats. W_TERMS: BF16 terms that hold a weight, up to the precision of activations in two terms.
#define FLOATS(NAME, TYPE, W_TERMS) \
    EMBED(NAME, TYPE)               \
    GEMV(NAME, TYPE, 1)             \
    GEMV(NAME, TYPE, 4)             \
    GEMV(NAME, TYPE, 8)             \
    GEMV_CHOSEN(NAME, TYPE)         \
    GEMM_EXACT(NAME, TYPE, W_TERMS)

// Codes, with groups of any size.
#define CODES(NAME, TYPE)     \
    EMBED(NAME, TYPE)         \
    GEMV(NAME, TYPE, 1)       \
    GEMV(NAME, TYPE, 4)       \
    GEMV(NAME, TYPE, 8)       \
    GEMV_CHOSEN(NAME, TYPE)   \
    GEMM_EXACT(NAME, TYPE, 1) \
    GEMM_BF16(NAME, TYPE)     \
    PLAIN(NAME, TYPE)
