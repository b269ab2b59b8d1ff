// Embedding, GEMV and GEMM of 7-bit matrices, symmetric and asymmetric, each as its header says.
#include "encoding.cuh"

CODES(int7, Int<7>)
