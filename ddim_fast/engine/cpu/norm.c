/* GroupNorm + SiLU over NHWC, float32 or bfloat16: two reads of the input and one write of the output, where PyTorch's
   operators need a pass an operation. `native.py` has the Python side, with shapes and checks; `norm.py` the same in
   PyTorch. */

#include "kernels.h"

/* Pixels that stay in the first-level cache between the two passes of their variance. */
#define STRIP 16
/* Sums, and outputs, that are computed beside one another: a chain of dependent operations leaves a processor idle. */
#define CHAINS 4

struct norm {
    const void *x, *x2;
    const float *weight, *bias, *add, *scale, *shift;
    void *out;
    float *work;
    int64_t x_stride, x2_stride, add_stride, scale_stride, shift_stride;
    int64_t images, pixels, channels, channels2, groups;
    int64_t part, parts; /* pixels whose statistics are taken together, and how many times that an image has */
    int64_t spans;       /* ranges of groups that an image is shared out by; 0: by pixels */
    float eps;
    int32_t silu, kind; /* kind: of x, x2 and out */
};

#ifndef VARIANT

/* By this `native.py` knows a library that was built from another version. */
const int64_t ddim_fast_norm_size = sizeof(struct norm);

/* GroupNorm of concat([x, x2]) + add, then scale and shift, then SiLU. `work` holds (images, parts, 2, channels):
   means and sums of squared deviations of the parts, then what the last pass multiplies with and adds; and behind them
   (images, channels): what it takes off. */
void ddim_fast_group_norm(const struct norm *norm, const struct team *team) {
    if (norm->spans) {
        share(team, ddim_fast_variant()->norm_span, norm, norm->spans * norm->images);
        return;
    }
    share(team, ddim_fast_variant()->norm_statistics, norm, norm->images * norm->parts);
    share(team, ddim_fast_variant()->norm_finish, norm, norm->images);
    share(team, ddim_fast_variant()->norm_apply, norm, norm->images * norm->parts);
}

#else

/* y / (1 + e^-y) of `count` vectors beside one another. e^x is within 2 units in the last place: 2^n e^r with
   |r| <= ln 2 / 2, and a polynomial for e^r (Cephes' expf). NaN stays. */
INLINE void apply_silu(floats *y, const int count) {
    floats r[CHAINS], p[CHAINS];
    ints power[CHAINS];
#define EACH _Pragma("GCC unroll 4") for (int i = 0; i < count; i++)
    EACH {
        const floats x = -y[i];
        const ints high = x > 88.0f, low = x < -87.0f;
        const ints kept = (ints)x & ~(high | low);
        r[i] = (floats)(kept | (high & (ints)((floats){0} + 88.0f)) | (low & (ints)((floats){0} - 87.0f)));
    }
    EACH {
        /* Adding 1.5 * 2^23 rounds to an integer, which the low bits then hold. */
        const floats shifted = r[i] * 1.44269504088896341f + 12582912.0f, n = shifted - 12582912.0f;
        r[i] = r[i] - n * 0.693359375f + n * 2.12194440e-4f;
        power[i] = (ints)shifted << 23;
    }
    EACH p[i] = r[i] * 1.9875691500e-4f + 1.3981999507e-3f;
    EACH p[i] = p[i] * r[i] + 8.3334519073e-3f;
    EACH p[i] = p[i] * r[i] + 4.1665795894e-2f;
    EACH p[i] = p[i] * r[i] + 1.6666665459e-1f;
    EACH p[i] = p[i] * r[i] + 5.0000001201e-1f;
    EACH p[i] = p[i] * (r[i] * r[i]) + r[i] + 1.0f;
    EACH y[i] = y[i] / (1.0f + (floats)((ints)p[i] + power[i]));
#undef EACH
}

/* The statistics of `parts` parts from `first` on, of the channels `begin` to `end` of one input, which come behind
   `offset` others: in a strip by its mean and then by the deviations from it, of strips together by Chan et al.'s
   formula. */
INLINE void statistics_of(const void *x, int64_t at, int64_t channels, int64_t offset, const struct norm *n,
                          float *work, int64_t first, int64_t parts, int64_t begin, int64_t end, const int kind) {
    const int64_t all = n->channels + n->channels2;
    for (int64_t part = first; part < first + parts; part++) {
        float *means = work + part * 2 * all + offset, *squares = means + all;
        const int64_t last = LEAST((part + 1) * n->part, n->pixels);
        for (int64_t start = part * n->part; start < last; start += STRIP) {
            const int64_t count = LEAST(STRIP, last - start), before = start - part * n->part;
            const float fresh = (float)count / (float)(before + count);
            for (int64_t c = begin; c < end; c += LANES) {
                const int64_t from = at + start * channels + c;
                floats sums[CHAINS] = {{0}}, squares_of[CHAINS] = {{0}};
                int64_t p = 0;
                for (; p + CHAINS <= count; p += CHAINS) {
#pragma GCC unroll 4
                    for (int i = 0; i < CHAINS; i++)
                        sums[i] += load_image(x, from + (p + i) * channels, end - c, kind);
                }
                for (; p < count; p++) sums[0] += load_image(x, from + p * channels, end - c, kind);
                floats mean = (sums[0] + sums[1] + (sums[2] + sums[3])) / (float)count;
                for (p = 0; p + CHAINS <= count; p += CHAINS) {
#pragma GCC unroll 4
                    for (int i = 0; i < CHAINS; i++) {
                        const floats deviation = load_image(x, from + (p + i) * channels, end - c, kind) - mean;
                        squares_of[i] += deviation * deviation;
                    }
                }
                for (; p < count; p++) {
                    const floats deviation = load_image(x, from + p * channels, end - c, kind) - mean;
                    squares_of[0] += deviation * deviation;
                }
                floats square = squares_of[0] + squares_of[1] + (squares_of[2] + squares_of[3]);
                if (before) {
                    const floats old = load(means + c, end - c), delta = mean - old;
                    square += load(squares + c, end - c) + delta * delta * (before * fresh);
                    mean = old + delta * fresh;
                }
                store(means + c, mean, end - c);
                store(squares + c, square, end - c);
            }
        }
    }
}

/* Of both inputs, the channels `begin` to `end` of all. */
INLINE void statistics(const struct norm *n, int64_t image, int64_t first, int64_t parts, int64_t begin, int64_t end,
                       const int kind) {
    const int64_t own = n->channels, all = own + n->channels2;
    float *work = n->work + image * n->parts * 2 * all;
    statistics_of(n->x, image * n->x_stride, own, 0, n, work, first, parts, LEAST(begin, own), LEAST(end, own), kind);
    if (n->x2)
        statistics_of(n->x2, image * n->x2_stride, n->channels2, own, n, work, first, parts, MOST(begin - own, 0),
                      MOST(end - own, 0), kind);
}

/* From the statistics of all parts to three numbers a channel of some groups, in the place of the first parts: what is
   taken off, what is multiplied with and what is added. Each part has room for two, and the pivot goes behind all
   images' parts. */
INLINE void finish(const struct norm *n, int64_t image, int64_t first, int64_t last) {
    const int64_t all = n->channels + n->channels2, parts = n->parts, wide = all / n->groups;
    float *work = n->work + image * parts * 2 * all, *pivots = n->work + n->images * parts * 2 * all + image * all;
    const float *add = n->add ? n->add + image * n->add_stride : NULL;
    for (int64_t group = first; group < last; group++) {
        double mean = 0, squares = 0;
        for (int64_t c = group * wide; c < (group + 1) * wide; c++) {
            double total = 0;
            for (int64_t part = 0; part < parts; part++)
                total += (double)work[part * 2 * all + c] * LEAST(n->part, n->pixels - part * n->part);
            mean += total / n->pixels + (add ? add[c] : 0);
        }
        mean /= wide;
        for (int64_t c = group * wide; c < (group + 1) * wide; c++) {
            for (int64_t part = 0; part < parts; part++) {
                const double away = work[part * 2 * all + c] + (add ? add[c] : 0.0) - mean;
                squares += work[part * 2 * all + all + c] + away * away * LEAST(n->part, n->pixels - part * n->part);
            }
        }
        const double inverse = 1 / sqrt(squares / ((double)wide * n->pixels) + n->eps);
        for (int64_t c = group * wide; c < (group + 1) * wide; c++) {
            const float scale = n->scale ? 1 + n->scale[image * n->scale_stride + c] : 1;
            pivots[c] = (float)(mean - (add ? add[c] : 0));
            work[c] = (float)(inverse * n->weight[c]) * scale;
            work[all + c] = n->bias[c] * scale + (n->shift ? n->shift[image * n->shift_stride + c] : 0);
        }
    }
}

/* `count` vectors of at most LANES channels, `x_step` and `out_step` floats apart, with their channels' numbers `step`
   apart. */
INLINE void apply_beside(const void *x, int64_t at, int64_t x_step, const float *pivots, const float *factors,
                         const float *terms, int64_t step, int32_t silu, void *out, int64_t out_at, int64_t out_step,
                         int64_t lanes, const int kind, const int count) {
    floats y[CHAINS];
#pragma GCC unroll 4
    for (int i = 0; i < count; i++) {
        y[i] = load_image(x, at + i * x_step, lanes, kind) - load(pivots + i * step, lanes);
        y[i] = y[i] * load(factors + i * step, lanes) + load(terms + i * step, lanes);
    }
    if (silu) apply_silu(y, count);
#pragma GCC unroll 4
    for (int i = 0; i < count; i++) store_image(out, out_at + i * out_step, y[i], lanes, kind);
}

INLINE void apply_to(const void *x, int64_t at, int64_t channels, int64_t offset, const struct norm *n, int64_t image,
                     int64_t first, int64_t last, int64_t begin, int64_t end, const int kind) {
    const int64_t all = n->channels + n->channels2;
    const float *factors = n->work + image * n->parts * 2 * all + offset, *terms = factors + all;
    const float *pivots = n->work + n->images * n->parts * 2 * all + image * all + offset;
    const int64_t out_at = image * n->pixels * all + offset;
#define APPLY(p, c, x_step, step, out_step, lanes, count)                                                             \
    apply_beside(x, at + (p) * channels + (c), x_step, pivots + (c), factors + (c), terms + (c), step, n->silu,       \
                 n->out, out_at + (p) * all + (c), out_step, lanes, kind, count)
    for (int64_t p = first; p < last; p += CHAINS) {
        const int64_t pixels = LEAST(CHAINS, last - p);
        int64_t c = begin;
        /* Neighbouring channels in the order of memory, and of what is left the same channels of neighbouring pixels.
         */
        for (int64_t q = p; q < p + pixels; q++)
            for (c = begin; c + CHAINS * LANES <= end; c += CHAINS * LANES)
                APPLY(q, c, LANES, LANES, LANES, LANES, CHAINS);
        for (; c < end; c += LANES) {
            if (pixels == CHAINS && c + LANES <= end)
                APPLY(p, c, channels, 0, all, LANES, CHAINS);
            else
                for (int64_t q = p; q < p + pixels; q++) APPLY(q, c, 0, 0, 0, end - c, 1);
        }
    }
#undef APPLY
}

/* The pixels `first` to `last` of an image, the channels `begin` to `end` of all. */
INLINE void apply(const struct norm *n, int64_t image, int64_t first, int64_t last, int64_t begin, int64_t end,
                  const int kind) {
    const int64_t own = n->channels;
    apply_to(n->x, image * n->x_stride, own, 0, n, image, first, last, LEAST(begin, own), LEAST(end, own), kind);
    if (n->x2)
        apply_to(n->x2, image * n->x2_stride, n->channels2, own, n, image, first, last, MOST(begin - own, 0),
                 MOST(end - own, 0), kind);
}

INLINE void span_of(const struct norm *n, int64_t part, const int kind) {
    const int64_t image = part % n->images, span = part / n->images, wide = (n->channels + n->channels2) / n->groups;
    const int64_t first = span * n->groups / n->spans, last = (span + 1) * n->groups / n->spans;
    statistics(n, image, 0, n->parts, first * wide, last * wide, kind);
    finish(n, image, first, last);
    apply(n, image, 0, n->pixels, first * wide, last * wide, kind);
}

static void norm_span(const void *arguments, int64_t part, int64_t worker) {
    const struct norm *n = arguments;
    (void)worker;
    if (n->kind == FLOAT32)
        span_of(n, part, FLOAT32);
    else
        span_of(n, part, BFLOAT16);
}

static void norm_statistics(const void *arguments, int64_t index, int64_t worker) {
    const struct norm *n = arguments;
    const int64_t image = index / n->parts, part = index % n->parts, all = n->channels + n->channels2;
    (void)worker;
    if (n->kind == FLOAT32)
        statistics(n, image, part, 1, 0, all, FLOAT32);
    else
        statistics(n, image, part, 1, 0, all, BFLOAT16);
}

static void norm_finish(const void *arguments, int64_t image, int64_t worker) {
    const struct norm *n = arguments;
    (void)worker;
    finish(n, image, 0, n->groups);
}

static void norm_apply(const void *arguments, int64_t index, int64_t worker) {
    const struct norm *n = arguments;
    const int64_t image = index / n->parts, first = index % n->parts * n->part, all = n->channels + n->channels2;
    const int64_t last = LEAST(first + n->part, n->pixels);
    (void)worker;
    if (n->kind == FLOAT32)
        apply(n, image, first, last, 0, all, FLOAT32);
    else
        apply(n, image, first, last, 0, all, BFLOAT16);
}

#endif
