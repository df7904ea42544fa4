/* What the library tells of itself, and the choice of an instruction set. */

#include "kernels.h"

/* The widest instruction set to use: 3 AVX-512 with bfloat16 products, 2 AVX-512, 1 AVX2, 0 what every processor
   has. Tests lower it. */
int ddim_fast_widest = 3;

/* By this `native.py` knows a library that was built from another version. */
const int64_t ddim_fast_revision = REVISION;

/* The instruction set that is used, as a number of `ddim_fast_widest`. */
int ddim_fast_level(void) {
#ifdef INSTRUCTION_SETS
    const int avx512 =
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#ifdef BFLOAT16_INSTRUCTIONS
    if (ddim_fast_widest > 2 && avx512 && __builtin_cpu_supports("avx512bf16")) return 3;
#endif
    if (ddim_fast_widest > 1 && avx512) return 2;
    if (ddim_fast_widest > 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

const struct variant *ddim_fast_variant(void) {
#ifdef INSTRUCTION_SETS
    switch (ddim_fast_level()) {
#ifdef BFLOAT16_INSTRUCTIONS
    case 3: return &ddim_fast_avx512_bf16;
#endif
    case 2: return &ddim_fast_avx512;
    case 1: return &ddim_fast_avx2;
    }
#endif
    return &ddim_fast_plain;
}
