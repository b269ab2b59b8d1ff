// GEMM of plain matrices on tensor cores. Arguments and limits: gemm.cuh.
#include "gemm.cuh"

GEMM(f32, F32, 2)
GEMM(f16, F16, 2)
GEMM(bf16, BF16, 1)
