// Embedding, GEMV and GEMM of binary matrices, each as its header says.
#include "encoding.cuh"

CODES(binary, Binary)
