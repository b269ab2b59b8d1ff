// GEMV of ternary and binary matrices. Arguments and limits: gemv.cuh.
#include "gemv.cuh"

GEMV_ALL(ternary, Ternary)
GEMV_ALL(binary, Binary)
