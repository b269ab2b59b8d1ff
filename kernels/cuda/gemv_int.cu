// GEMV of matrices of 2 to 8 bits, symmetric or asymmetric. Arguments and limits: gemv.cuh.
#include "gemv.cuh"

GEMV_ALL(int2, Int<2>)
GEMV_ALL(int3, Int<3>)
GEMV_ALL(int4, Int<4>)
GEMV_ALL(int5, Int<5>)
GEMV_ALL(int6, Int<6>)
GEMV_ALL(int7, Int<7>)
GEMV_ALL(int8, Int<8>)
