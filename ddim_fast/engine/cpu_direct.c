/* Direct 3x3 convolution over NHWC float32 of any stride: for each of the 9 taps a product of a row's pixels by a panel of 32
   output channels. `cpu_conv.py` chooses; `native.py` has the Python side, with shapes and checks. */

#ifndef NAME
#include "cpu_kernels.h"

/* Output pixels of a row whose sums stay in the first-level cache over the 9 taps. */
#define PIXELS 32

struct direct {
    const float *x, *filters, *bias, *residual; /* filters: (panels, 9, in_channels, 32) */
    float *out;
    int64_t x_stride, out_stride, residual_stride, bias_stride; /* floats an image */
    int64_t images, height, width, in_channels;                 /* of the pixels read */
    int64_t out_height, out_width, out_channels;
    int64_t stride, padding; /* above and to the left; below and to the right what the output reaches */
    float divisor;
};

#define BODY "cpu_direct.c"
#include "cpu_variants.h"

/* By this `native.py` knows a library that was built from another version. */
const int64_t ddim_fast_direct_size = sizeof(struct direct);

/* (conv(x) + bias + residual) / divisor. `residual` may be `out`. */
void ddim_fast_direct(const struct direct *direct, const struct team *team) {
    share(team, PICK(direct_row), direct, PARTS(direct->out_channels, PANEL) * direct->images * direct->out_height);
}

#else

#include "cpu_multiply.h"

/* One row of one image of a panel. */
static void NAME(direct_row)(const void *arguments, int64_t part, int64_t worker) {
    const struct direct *d = arguments;
    const int64_t rows = d->images * d->out_height, panel = part / rows, image = part % rows / d->out_height;
    const int64_t row = part % d->out_height, stride = d->stride, depth = d->in_channels, end = d->out_channels;
    const float *x = d->x + image * d->x_stride, *filters = d->filters + panel * 9 * depth * PANEL;
    float sums[PIXELS * PANEL];
    (void)worker;
    for (int64_t left = 0; left < d->out_width; left += PIXELS) {
        const int64_t count = LEAST(PIXELS, d->out_width - left);
        memset(sums, 0, sizeof(float) * count * PANEL);
        for (int64_t tap = 0; tap < 9; tap++) {
            const int64_t h = row * stride + tap / 3 - d->padding, offset = tap % 3 - d->padding;
            /* The pixels of the strip that the tap finds inside the image. */
            const int64_t first = MOST(left, offset < 0 ? PARTS(-offset, stride) : 0);
            const int64_t last = LEAST(left + count, PARTS(MOST(d->width - offset, 0), stride));
            if (h < 0 || h >= d->height || first >= last) continue;
            NAME(multiply)
            (x + (h * d->width + first * stride + offset) * depth, stride * depth, filters + tap * depth * PANEL,
             sums + (first - left) * PANEL, depth, 1, last - first);
        }
        for (int64_t p = 0; p < count; p++) {
            for (int64_t c = panel * PANEL; c < LEAST(end, (panel + 1) * PANEL); c += LANES) {
                const int64_t place = (row * d->out_width + left + p) * end + c;
                floats value = *(const loose *)(sums + p * PANEL + c - panel * PANEL);
                if (d->bias) value += NAME(load)(d->bias + image * d->bias_stride + c, end - c);
                if (d->residual) value += NAME(load)(d->residual + image * d->residual_stride + place, end - c);
                if (d->divisor != 1) value /= d->divisor;
                NAME(store)(d->out + image * d->out_stride + place, value, end - c);
            }
        }
    }
}

#endif
