// Embedding, GEMV and GEMM of 4-bit matrices, symmetric and asymmetric, each as its header says.
#include "encoding.cuh"

ENCODING(int4, Int<4>, 1)
