// Embedding, GEMV and GEMM of 2-bit matrices, symmetric and asymmetric, each as its header says.
#include "encoding.cuh"

CODES(int2, Int<2>)
