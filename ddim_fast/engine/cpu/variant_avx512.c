/* AVX-512 as server processors have it since Skylake. */

#include "kernels.h"

#ifdef INSTRUCTION_SETS
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma")
#define VARIANT ddim_fast_avx512
#define LEVEL 2
#define WIDTH 16
#define ROWS 8
#include "variant.h"
#endif
