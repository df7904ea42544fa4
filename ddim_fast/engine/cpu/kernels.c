/* What the library tells of itself, and the choice of an instruction set. */

#include "kernels.h"

/* The widest instruction set to use: 2 AVX-512, 1 AVX2, 0 what every processor has. Tests lower it. */
int ddim_fast_widest = 2;

/* By this `native.py` knows a library that was built from another version. */
const int64_t ddim_fast_revision = REVISION;

/* The instruction set that is used, as a number of `ddim_fast_widest`. */
int ddim_fast_level(void) {
#ifdef INSTRUCTION_SETS
    if (ddim_fast_widest > 1 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return 2;
    if (ddim_fast_widest > 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

const struct variant *ddim_fast_variant(void) {
#ifdef INSTRUCTION_SETS
    const struct variant *const variants[] = {&ddim_fast_plain, &ddim_fast_avx2, &ddim_fast_avx512};
    return variants[ddim_fast_level()];
#else
    return &ddim_fast_plain;
#endif
}
