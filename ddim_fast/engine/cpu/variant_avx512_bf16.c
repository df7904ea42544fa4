/* AVX-512 with products of bfloat16. */

#include "kernels.h"

#ifdef BFLOAT16_INSTRUCTIONS
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,fma")
#define VARIANT ddim_fast_avx512_bf16
#define LEVEL 3
#define WIDTH 16
#define ROWS 8
#include "variant.h"
#endif
