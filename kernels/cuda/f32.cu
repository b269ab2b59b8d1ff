// Embedding, GEMV and GEMM of F32 matrices, each as its header says.
#include "encoding.cuh"

FLOATS(f32, F32, 2)
