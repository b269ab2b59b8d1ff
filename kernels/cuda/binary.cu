// Embedding, GEMV and GEMM of binary matrices, each as its header says.
#include "encoding.cuh"

ENCODING(binary, Binary, 1)
