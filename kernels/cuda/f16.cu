// Embedding, GEMV and GEMM of F16 matrices, each as its header says.
#include "encoding.cuh"

FLOATS(f16, F16, 2)
