// Embedding, GEMV and GEMM of 8-bit matrices, symmetric and asymmetric, each as its header says.
#include "encoding.cuh"

ENCODING(int8, Int<8>, 1)
