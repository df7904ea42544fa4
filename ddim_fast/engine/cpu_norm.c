/* GroupNorm + SiLU over NHWC float32: two reads of the input and one write of the output, where PyTorch's operators need a
   pass an operation. `native.py` has the Python side, with shapes and checks; `cpu_norm.py` the same in PyTorch. */

#ifndef NAME
#include "cpu_kernels.h"

/* Pixels that stay in the first-level cache between the two passes of their variance. */
#define STRIP 16

struct norm {
    const float *x, *x2, *weight, *bias, *add, *scale, *shift;
    float *out, *work;
    int64_t x_stride, x2_stride, add_stride, scale_stride, shift_stride;
    int64_t images, pixels, channels, channels2, groups;
    int64_t part, parts; /* pixels whose statistics are taken together, and how many times that an image has */
    int64_t spans;       /* ranges of groups that an image is shared out by; 0: by pixels */
    float eps;
    int32_t silu;
};

#define BODY "cpu_norm.c"
#include "cpu_variants.h"

int ddim_fast_widest = 2;

/* The instruction set that is used. */
int ddim_fast_level(void) {
    return LEVEL();
}

/* By these `native.py` knows a library that was built from another version. */
const int64_t ddim_fast_revision = 1;
const int64_t ddim_fast_norm_size = sizeof(struct norm);

/* GroupNorm of concat([x, x2]) + add, then scale and shift, then SiLU. `work` holds (images, parts, 2, channels): means
   and sums of squared deviations of the parts, then what the last pass multiplies with. */
void ddim_fast_group_norm(const struct norm *norm, const struct team *team) {
    if (norm->spans) {
        share(team, PICK(norm_span), norm, norm->spans * norm->images);
        return;
    }
    share(team, PICK(norm_statistics), norm, norm->images * norm->parts);
    share(team, PICK(norm_finish), norm, norm->images);
    share(team, PICK(norm_apply), norm, norm->images * norm->parts);
}

#else

/* e^x within 2 units in the last place: 2^n e^r with |r| <= ln 2 / 2, and a polynomial for e^r (Cephes' expf). NaN stays. */
INLINE floats NAME(exponential)(floats x) {
    const ints high = x > 88.0f, low = x < -87.0f;
    ints kept = (ints)x & ~(high | low);
    x = (floats)(kept | (high & (ints)((floats){0} + 88.0f)) | (low & (ints)((floats){0} - 87.0f)));
    /* Adding 1.5 * 2^23 rounds to an integer, which the low bits then hold. */
    const floats shifted = x * 1.44269504088896341f + 12582912.0f, n = shifted - 12582912.0f;
    const floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return (floats)((ints)p + ((ints)shifted << 23));
}

/* The statistics of `parts` parts from `first` on, of the channels `begin` to `end` of one input, which come behind `offset`
   others: in a strip by its mean and then by the deviations from it, of strips together by Chan et al.'s formula. */
INLINE void NAME(statistics_of)(const float *x, int64_t channels, int64_t offset, const struct norm *n, float *work,
                                int64_t first, int64_t parts, int64_t begin, int64_t end) {
    const int64_t all = n->channels + n->channels2;
    for (int64_t part = first; part < first + parts; part++) {
        float *means = work + part * 2 * all + offset, *squares = means + all;
        const int64_t last = LEAST((part + 1) * n->part, n->pixels);
        for (int64_t start = part * n->part; start < last; start += STRIP) {
            const int64_t count = LEAST(STRIP, last - start), before = start - part * n->part;
            const float fresh = (float)count / (float)(before + count);
            for (int64_t c = begin; c < end; c += LANES) {
                const float *from = x + start * channels + c;
                floats sum = {0}, square = {0};
                for (int64_t p = 0; p < count; p++) sum += NAME(load)(from + p * channels, end - c);
                floats mean = sum / (float)count;
                for (int64_t p = 0; p < count; p++) {
                    const floats deviation = NAME(load)(from + p * channels, end - c) - mean;
                    square += deviation * deviation;
                }
                if (before) {
                    const floats old = NAME(load)(means + c, end - c), delta = mean - old;
                    square += NAME(load)(squares + c, end - c) + delta * delta * (before * fresh);
                    mean = old + delta * fresh;
                }
                NAME(store)(means + c, mean, end - c);
                NAME(store)(squares + c, square, end - c);
            }
        }
    }
}

/* Of both inputs, the channels `begin` to `end` of all. */
INLINE void NAME(statistics)(const struct norm *n, int64_t image, int64_t first, int64_t parts, int64_t begin,
                             int64_t end) {
    const int64_t own = n->channels, all = own + n->channels2;
    float *work = n->work + image * n->parts * 2 * all;
    NAME(statistics_of)
    (n->x + image * n->x_stride, own, 0, n, work, first, parts, LEAST(begin, own), LEAST(end, own));
    if (n->x2)
        NAME(statistics_of)
    (n->x2 + image * n->x2_stride, n->channels2, own, n, work, first, parts, MOST(begin - own, 0), MOST(end - own, 0));
}

/* From the statistics of all parts to three numbers a channel of some groups, in the place of the first parts: what is taken off, what is
   multiplied with and what is added. Each part has room for two, and the pivot goes behind all images' parts. */
INLINE void NAME(finish)(const struct norm *n, int64_t image, int64_t first, int64_t last) {
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

INLINE void NAME(apply_to)(const float *x, int64_t channels, int64_t offset, const struct norm *n, int64_t image,
                           int64_t first, int64_t last, int64_t begin, int64_t end) {
    const int64_t all = n->channels + n->channels2;
    const float *factors = n->work + image * n->parts * 2 * all + offset, *terms = factors + all;
    const float *pivots = n->work + n->images * n->parts * 2 * all + image * all + offset;
    float *out = n->out + image * n->pixels * all + offset;
    for (int64_t p = first; p < last; p++) {
        for (int64_t c = begin; c < end; c += LANES) {
            const int64_t left = end - c;
            floats y = NAME(load)(x + p * channels + c, left) - NAME(load)(pivots + c, left);
            y = y * NAME(load)(factors + c, left) + NAME(load)(terms + c, left);
            if (n->silu) y = y / (1.0f + NAME(exponential)(-y));
            NAME(store)(out + p * all + c, y, left);
        }
    }
}

/* The pixels `first` to `last` of an image, the channels `begin` to `end` of all. */
INLINE void NAME(apply)(const struct norm *n, int64_t image, int64_t first, int64_t last, int64_t begin, int64_t end) {
    const int64_t own = n->channels;
    NAME(apply_to)
    (n->x + image * n->x_stride, own, 0, n, image, first, last, LEAST(begin, own), LEAST(end, own));
    if (n->x2)
        NAME(apply_to)
    (n->x2 + image * n->x2_stride, n->channels2, own, n, image, first, last, MOST(begin - own, 0), MOST(end - own, 0));
}

static void NAME(norm_span)(const void *arguments, int64_t part, int64_t worker) {
    const struct norm *n = arguments;
    const int64_t image = part % n->images, span = part / n->images, wide = (n->channels + n->channels2) / n->groups;
    const int64_t first = span * n->groups / n->spans, last = (span + 1) * n->groups / n->spans;
    (void)worker;
    NAME(statistics)(n, image, 0, n->parts, first * wide, last * wide);
    NAME(finish)(n, image, first, last);
    NAME(apply)(n, image, 0, n->pixels, first * wide, last * wide);
}

static void NAME(norm_statistics)(const void *arguments, int64_t index, int64_t worker) {
    const struct norm *n = arguments;
    (void)worker;
    NAME(statistics)(n, index / n->parts, index % n->parts, 1, 0, n->channels + n->channels2);
}

static void NAME(norm_finish)(const void *arguments, int64_t image, int64_t worker) {
    const struct norm *n = arguments;
    (void)worker;
    NAME(finish)(n, image, 0, n->groups);
}

static void NAME(norm_apply)(const void *arguments, int64_t index, int64_t worker) {
    const struct norm *n = arguments;
    const int64_t part = index % n->parts, first = part * n->part;
    (void)worker;
    NAME(apply)(n, index / n->parts, first, LEAST(first + n->part, n->pixels), 0, n->channels + n->channels2);
}

#endif
