/* AVX2 with fused multiply-add. */

#include "kernels.h"

#ifdef INSTRUCTION_SETS
#pragma GCC target("avx2,fma")
#define VARIANT ddim_fast_avx2
#define LEVEL 1
#define WIDTH 8
#define ROWS 6
#include "variant.h"
#endif
