/* Direct 3x3 convolution over NHWC float32 of any stride: for each of the 9 taps a product of a row's pixels by a
   panel of 32 output channels, or for few output channels dot products over the input channels. `conv.py` chooses;
   `native.py` has the Python side, with shapes and checks. */

#include "kernels.h"

/* Output pixels of a row whose sums stay in the first-level cache over the 9 taps. */
#define PIXELS 32
/* Pixels whose dot products are summed together. */
#define DOTS 8

struct direct {
    const void *x, *residual;
    /* filters: (panels, 9, in_channels, 32), or with `pairs` bfloat16 (panels, 9, pairs, 32, 2), or of few channels
       (9, out_channels, in_channels) */
    const float *filters, *bias;
    void *out;
    int64_t x_stride, out_stride, residual_stride, bias_stride; /* numbers per image */
    int64_t images, height, width, in_channels;                 /* of the pixels read */
    int64_t out_height, out_width, out_channels;
    int64_t stride, padding; /* above and to the left; below and to the right what the output reaches */
    float divisor;
    int32_t kind, pairs; /* of x, residual and out; whether the filters are pairs of bfloat16 */
};

#ifndef VARIANT

/* By this `native.py` knows a library that was built from another version. */
const int64_t ddim_fast_direct_size = sizeof(struct direct);

/* (conv(x) + bias + residual) / divisor. `residual` may be `out`. */
void ddim_fast_direct(const struct direct *direct, const struct team *team) {
    if (direct->out_channels <= FEW)
        share(team, ddim_fast_variant()->direct_few, direct, direct->images * direct->out_height);
    else
        share(team, ddim_fast_variant()->direct_row, direct,
              PARTS(direct->out_channels, PANEL) * direct->images * direct->out_height);
}

#else

/* What follows the products. */
INLINE floats finished(const struct direct *d, floats value, int64_t image, int64_t place, int64_t c, int64_t count,
                       const int kind) {
    if (d->bias) value += load(d->bias + image * d->bias_stride + c, count);
    if (d->residual) value += load_image(d->residual, image * d->residual_stride + place, count, kind);
    if (d->divisor != 1) value /= d->divisor;
    return value;
}

/* The pixels of a strip of `count` from `left` on that a tap finds inside the image. */
INLINE void inside(const struct direct *d, int64_t offset, int64_t left, int64_t count, int64_t *first,
                   int64_t *last) {
    *first = MOST(left, offset < 0 ? PARTS(-offset, d->stride) : 0);
    *last = LEAST(left + count, PARTS(MOST(d->width - offset, 0), d->stride));
}

/* One row of one image of all of few output channels. */
INLINE void few_channels(const struct direct *d, int64_t part, const int kind) {
    const int64_t image = part / d->out_height, row = part % d->out_height, stride = d->stride, depth = d->in_channels;
    const int64_t end = d->out_channels;
    for (int64_t left = 0; left < d->out_width; left += DOTS) {
        const int64_t count = LEAST(DOTS, d->out_width - left);
        float values[DOTS][FEW + LANES] = {{0}};
        for (int64_t channel = 0; channel < end; channel++) {
            floats sums[DOTS] = {{0}};
            for (int64_t tap = 0; tap < 9; tap++) {
                const int64_t h = row * stride + tap / 3 - d->padding, offset = tap % 3 - d->padding;
                const float *filter = d->filters + (tap * end + channel) * depth;
                const int64_t from = image * d->x_stride + (h * d->width + left * stride + offset) * depth;
                int64_t first, last;
                inside(d, offset, left, count, &first, &last);
                if (h < 0 || h >= d->height) continue;
                for (int64_t c = 0; c < depth; c += LANES) {
                    const floats factor = load(filter + c, depth - c);
                    if (last - first == DOTS) {
#pragma GCC unroll 8
                        for (int64_t p = 0; p < DOTS; p++)
                            sums[p] += load_image(d->x, from + p * stride * depth + c, depth - c, kind) * factor;
                    } else {
                        for (int64_t p = first - left; p < last - left; p++)
                            sums[p] += load_image(d->x, from + p * stride * depth + c, depth - c, kind) * factor;
                    }
                }
            }
            for (int64_t p = 0; p < count; p++) {
                float sum = 0;
                for (int64_t lane = 0; lane < LANES; lane++) sum += sums[p][lane];
                values[p][channel] = sum;
            }
        }
        for (int64_t p = 0; p < count; p++) {
            const int64_t place = (row * d->out_width + left + p) * end;
            for (int64_t c = 0; c < end; c += LANES) {
                const floats value = finished(d, *(const loose *)(values[p] + c), image, place + c, c, end - c, kind);
                store_image(d->out, image * d->out_stride + place + c, value, end - c, kind);
            }
        }
    }
}

/* One row of one image of a panel. */
INLINE void row_of_panel(const struct direct *d, int64_t part, const int kind, const int pairs) {
    const int64_t rows = d->images * d->out_height, panel = part / rows, image = part % rows / d->out_height;
    const int64_t row = part % d->out_height, stride = d->stride, depth = d->in_channels, end = d->out_channels;
    const int64_t size = panel_floats(depth, pairs);
    const float *filters = d->filters + panel * 9 * size;
    float sums[PIXELS * PANEL];
    for (int64_t left = 0; left < d->out_width; left += PIXELS) {
        const int64_t count = LEAST(PIXELS, d->out_width - left);
        memset(sums, 0, sizeof(float) * count * PANEL);
        for (int64_t tap = 0; tap < 9; tap++) {
            const int64_t h = row * stride + tap / 3 - d->padding, offset = tap % 3 - d->padding;
            int64_t first, last;
            inside(d, offset, left, count, &first, &last);
            if (h < 0 || h >= d->height || first >= last) continue;
            multiply_image(d->x, image * d->x_stride + (h * d->width + first * stride + offset) * depth,
                           stride * depth, filters + tap * size, sums + (first - left) * PANEL, depth, 1, last - first,
                           kind, pairs);
        }
        for (int64_t p = 0; p < count; p++) {
            for (int64_t c = panel * PANEL; c < LEAST(end, (panel + 1) * PANEL); c += LANES) {
                const int64_t place = (row * d->out_width + left + p) * end + c;
                const floats sum = *(const loose *)(sums + p * PANEL + c - panel * PANEL);
                const floats value = finished(d, sum, image, place, c, end - c, kind);
                store_image(d->out, image * d->out_stride + place, value, end - c, kind);
            }
        }
    }
}

static void direct_few(const void *arguments, int64_t part, int64_t worker) {
    const struct direct *d = arguments;
    (void)worker;
    if (d->kind == FLOAT32)
        few_channels(d, part, FLOAT32);
    else
        few_channels(d, part, BFLOAT16);
}

static void direct_row(const void *arguments, int64_t part, int64_t worker) {
    const struct direct *d = arguments;
    (void)worker;
    if (d->kind == FLOAT32)
        row_of_panel(d, part, FLOAT32, 0);
    else if (d->pairs)
        row_of_panel(d, part, BFLOAT16, 1);
    else
        row_of_panel(d, part, BFLOAT16, 0);
}

#endif
