// Embedding, GEMV and GEMM of 4-bit matrices, symmetric and asymmetric, each as its header says.
#include "encoding.cuh"

CODES(int4, Int<4>)
