// Embedding, GEMV and GEMM of 2-bit matrices, symmetric and asymmetric, each as its header says.
#include "encoding.cuh"

ENCODING(int2, Int<2>, 1)
