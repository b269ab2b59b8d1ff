// Embedding, GEMV and GEMM of 8-bit matrices, symmetric and asymmetric, each as its header says.
#include "encoding.cuh"

CODES(int8, Int<8>)
