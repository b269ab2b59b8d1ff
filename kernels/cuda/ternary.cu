// Embedding, GEMV and GEMM of ternary matrices, each as its header says.
#include "encoding.cuh"

CODES(ternary, Ternary)
