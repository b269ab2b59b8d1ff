// Embedding, GEMV and GEMM of 6-bit matrices, symmetric and asymmetric, each as its header says.
#include "encoding.cuh"

CODES(int6, Int<6>)
