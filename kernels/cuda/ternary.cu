// Embedding, GEMV and GEMM of ternary matrices, each as its header says.
#include "encoding.cuh"

ENCODING(ternary, Ternary, 1)
