// Embedding, GEMV and GEMM of 5-bit matrices, symmetric and asymmetric, each as its header says.
#include "encoding.cuh"

CODES(int5, Int<5>)
