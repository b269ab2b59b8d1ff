// GEMM of matrices of 2 to 8 bits on tensor cores. Arguments and limits: gemm.cuh.
#include "gemm.cuh"

GEMM(int2, Int<2>, 1)
GEMM(int3, Int<3>, 1)
GEMM(int4, Int<4>, 1)
GEMM(int5, Int<5>, 1)
GEMM(int6, Int<6>, 1)
GEMM(int7, Int<7>, 1)
GEMM(int8, Int<8>, 1)
