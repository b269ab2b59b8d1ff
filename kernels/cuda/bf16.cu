// Embedding, GEMV and GEMM of BF16 matrices, each as its header says.
#include "encoding.cuh"

FLOATS(bf16, BF16, 1)
