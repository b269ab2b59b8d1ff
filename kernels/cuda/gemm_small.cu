// GEMM of ternary and binary matrices on tensor cores. Arguments and limits: gemm.cuh.
#include "gemm.cuh"

GEMM(ternary, Ternary, 1)
GEMM(binary, Binary, 1)
