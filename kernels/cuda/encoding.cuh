// Everything that reads matrices of one encoding: a module of its own, so that the driver compiles only what a model uses.
#pragma once
#include "embed.cuh"
#include "gemm.cuh"
#include "gemv.cuh"
#include "plain.cuh"

// EXACT_W_TERMS: BF16 terms that hold a weight of this encoding, up to the precision of activations in two terms.
#define ENCODING(NAME, TYPE, EXACT_W_TERMS) \
    EMBED(NAME, TYPE)                       \
    GEMV(NAME, TYPE, 1)                     \
    GEMV(NAME, TYPE, 4)                     \
    GEMV(NAME, TYPE, 8)                     \
    GEMM(NAME, TYPE, EXACT_W_TERMS)         \
    PLAIN(NAME, TYPE)
