/* All inner functions for one instruction set. A `variant_*.c` says which: its name VARIANT, its number LEVEL, WIDTH
   floats that fill a register, and ROWS rows that a product multiplies by two registers with some left free. */

#include "kernels.h"

#define LANES WIDTH
#include "lanes.h"
#include "multiply.h"

#include "digest.c"
#include "direct.c"
#include "norm.c"
#include "product.c"
#include "winograd.c"

const struct variant VARIANT = {
    .digest = digest,
    .direct_few = direct_few,
    .direct_row = direct_row,
    .norm_span = norm_span,
    .norm_statistics = norm_statistics,
    .norm_finish = norm_finish,
    .norm_apply = norm_apply,
    .product = product,
    .transform = transform,
    .convolve = convolve,
    .convolve_per_thread = convolve_per_thread,
};
