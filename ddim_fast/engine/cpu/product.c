/* Matrix product x W^T + bias + residual, with a panel of 32 columns of W^T for a group of rows as a part of the work.
   `linear.py` has the Python side, with shapes and checks. */

#include "kernels.h"

struct product {
    const void *x, *residual;
    const float *filters,
        *bias; /* filters: (panels, in_channels, 32), or with `pairs` bfloat16 (panels, pairs, 32, 2) */
    void *out;
    int64_t rows, in_channels, out_channels, group; /* rows of one part of the work */
    int32_t kind, out_kind;                         /* of x; of residual and out */
    int32_t pairs;
};

#ifndef VARIANT

/* By this `native.py` knows a library that was built from another version. */
const int64_t ddim_fast_product_size = sizeof(struct product);

/* `residual` may be `out`. */
void ddim_fast_product(const struct product *product, const struct team *team) {
    share(team, ddim_fast_variant()->product, product,
          PARTS(product->rows, product->group) * PARTS(product->out_channels, PANEL));
}

#else

INLINE void product_of(const struct product *p, int64_t part, const int kind, const int out_kind, const int pairs) {
    const int64_t groups = PARTS(p->rows, p->group), panel = part / groups, depth = p->in_channels;
    const int64_t first = part % groups * p->group, last = LEAST(first + p->group, p->rows), end = p->out_channels;
    const float *filters = p->filters + panel * panel_floats(depth, pairs);
    for (int64_t row = first; row < last; row += ROWS) {
        float sums[ROWS * PANEL];
        const int64_t rows = LEAST(ROWS, last - row);
        multiply_image(p->x, row * depth, depth, filters, sums, depth, 0, rows, kind, pairs);
        for (int64_t r = 0; r < rows; r++) {
            for (int64_t c = panel * PANEL; c < LEAST(end, (panel + 1) * PANEL); c += LANES) {
                const int64_t place = (row + r) * end + c;
                floats value = *(const loose *)(sums + r * PANEL + c - panel * PANEL);
                if (p->bias) value += load(p->bias + c, end - c);
                if (p->residual) value += load_image(p->residual, place, end - c, out_kind);
                store_image(p->out, place, value, end - c, out_kind);
            }
        }
    }
}

static void product(const void *arguments, int64_t part, int64_t worker) {
    const struct product *p = arguments;
    (void)worker;
    if (p->kind == FLOAT32 && p->out_kind == FLOAT32)
        product_of(p, part, FLOAT32, FLOAT32, 0);
    else if (p->kind == FLOAT32)
        product_of(p, part, FLOAT32, BFLOAT16, 0);
    else if (p->pairs)
        product_of(p, part, BFLOAT16, p->out_kind, 1);
    else
        product_of(p, part, BFLOAT16, p->out_kind, 0);
}

#endif
