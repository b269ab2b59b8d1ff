// Embedding, GEMV and GEMM of 3-bit matrices, symmetric and asymmetric, each as its header says.
#include "encoding.cuh"

CODES(int3, Int<3>)
