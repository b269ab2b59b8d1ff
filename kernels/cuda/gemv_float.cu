// GEMV of plain matrices. Arguments and limits: gemv.cuh.
#include "gemv.cuh"

GEMV_ALL(f32, F32)
GEMV_ALL(f16, F16)
GEMV_ALL(bf16, BF16)
