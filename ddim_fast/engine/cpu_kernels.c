/* The CPU engine's element-wise passes over NHWC float32: Winograd's transforms, and GroupNorm + SiLU.

   Each reads its input once and writes its output once, where PyTorch's operators need a pass an operation. Plain C and
   vector extensions, no library: PyTorch's own OpenMP team runs the parts of a call, through the `GOMP_parallel` that the
   caller passes. The file includes itself once an instruction set, and the best one is chosen at the first call.
   `native.py` has the Python side, with shapes and checks; `winograd.py` and `cpu_norm.py` the same in PyTorch. */

#ifndef BODY
#define BODY

#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef float loose __attribute__((vector_size(64), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))
/* Pixels that stay in the first-level cache between the two passes of their variance. */
#define STRIP 16
#define LEAST(a, b) ((a) < (b) ? (a) : (b))

typedef void (*task_fn)(void *);
typedef void (*parallel_fn)(task_fn, void *, unsigned, unsigned);

struct transform {
    const float *x, *bias, *residual;
    float *out;
    int64_t x_stride, out_stride, residual_stride, bias_stride; /* floats an image */
    int64_t first_row, rows, columns;                           /* tile rows of an image in this block, tiles a row */
    int64_t height, width, channels;                            /* of the pixels read or written */
    float divisor;
    int32_t upsample;
};

struct norm {
    const float *x, *x2, *weight, *bias, *add, *scale, *shift;
    float *out, *work;
    int64_t x_stride, x2_stride, add_stride, scale_stride, shift_stride;
    int64_t images, pixels, channels, channels2, groups;
    int64_t part, parts; /* pixels whose statistics are taken together, and how many times that an image has */
    float eps;
    int32_t silu;
};

struct job {
    int64_t next, count;
    void (*run)(const void *, int64_t);
    const void *arguments;
};

static void work_on(void *pointer) {
    struct job *job = pointer;
    for (;;) {
        int64_t index = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
        if (index >= job->count) return;
        job->run(job->arguments, index);
    }
}

static void share(parallel_fn parallel, unsigned threads, void (*run)(const void *, int64_t), const void *arguments,
                  int64_t count) {
    struct job job = {0, count, run, arguments};
    if (parallel == NULL || threads < 2 || count < 2)
        work_on(&job);
    else
        parallel(work_on, &job, threads, 0);
}

#if defined(__x86_64__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma")
#define NAME(function) function##_avx512
#include "cpu_kernels.c"
#undef NAME
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define NAME(function) function##_avx2
#include "cpu_kernels.c"
#undef NAME
#pragma GCC pop_options
#endif
#define NAME(function) function##_plain
#include "cpu_kernels.c"
#undef NAME

/* By these `native.py` knows a library that was built from another version of this file. */
const int64_t ddim_fast_sizes[2] = {sizeof(struct transform), sizeof(struct norm)};

/* The widest instruction set to use: 2 AVX-512, 1 AVX2, 0 what every processor has. Tests lower it. */
int ddim_fast_widest = 2;

#if defined(__x86_64__) && !defined(__clang__)
static int level(void) {
    if (ddim_fast_widest > 1 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return 2;
    return ddim_fast_widest > 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#define PICK(function) (level() == 2 ? function##_avx512 : level() == 1 ? function##_avx2 : function##_plain)
#else
#define PICK(function) function##_plain
#endif

/* Pixels of `images` images to taps, (images * rows, columns, a, a, channels), the width's tap before the height's. */
void ddim_fast_to_taps(const struct transform *block, int64_t images, parallel_fn parallel, unsigned threads) {
    share(parallel, threads, PICK(to_taps), block, images * block->rows);
}

/* Products in the order of the taps to (pixels + bias + residual) / divisor. */
void ddim_fast_from_taps(const struct transform *block, int64_t images, parallel_fn parallel, unsigned threads) {
    share(parallel, threads, PICK(from_taps), block, images * block->rows);
}

/* GroupNorm of concat([x, x2]) + add, then scale and shift, then SiLU. `work` holds (images, parts, 2, channels): means
   and sums of squared deviations of the parts, then what the last pass multiplies with. */
void ddim_fast_group_norm(const struct norm *norm, parallel_fn parallel, unsigned threads) {
    /* Whole images stay in a core's cache between the passes. */
    if (norm->images >= 2 * (int64_t)threads || norm->images % threads == 0) {
        share(parallel, threads, PICK(norm_image), norm, norm->images);
        return;
    }
    share(parallel, threads, PICK(norm_statistics), norm, norm->images * norm->parts);
    share(parallel, threads, PICK(norm_finish), norm, norm->images);
    share(parallel, threads, PICK(norm_apply), norm, norm->images * norm->parts);
}

#else

INLINE floats NAME(load)(const float *from, int64_t count) {
    if (count >= LANES) return *(const loose *)from;
    floats value = {0};
    memcpy(&value, from, count * sizeof(float));
    return value;
}

INLINE void NAME(store)(float *to, floats value, int64_t count) {
    if (count >= LANES)
        *(loose *)to = value;
    else
        memcpy(to, &value, count * sizeof(float));
}

/* B^T along one axis: the 4 pixels of a tile and one on each side. */
INLINE void NAME(taps_of)(const floats d[6], floats t[6]) {
    floats a = d[4] - 4 * d[2], b = d[3] - 4 * d[1], c = d[4] - d[2], e = 2 * (d[3] - d[1]);
    t[0] = 4 * (d[0] - d[2]) + c;
    t[1] = a + b;
    t[2] = a - b;
    t[3] = c + e;
    t[4] = c - e;
    t[5] = 4 * (d[1] - d[3]) + d[5] - d[3];
}

/* The same behind a nearest 2x upsampling: the 2 small pixels of a tile and one on each side. */
INLINE void NAME(upsampled_taps_of)(const floats d[4], floats t[5]) {
    floats c = d[2] - d[1];
    t[0] = 4 * (d[0] - d[1]) + c;
    t[1] = d[2] - 4 * d[1];
    t[2] = c;
    t[3] = c;
    t[4] = 4 * (d[1] - d[2]) + d[3] - d[2];
}

/* A^T along one axis. */
INLINE void NAME(pixels_of)(const floats t[6], floats y[4]) {
    floats a = t[1] + t[2], b = t[1] - t[2], c = t[3] + t[4], e = t[3] - t[4];
    y[0] = t[0] + a + c;
    y[1] = b + 2 * e;
    y[2] = a + 4 * c;
    y[3] = b + 8 * e + t[5];
}

INLINE void NAME(upsampled_pixels_of)(const floats t[5], floats y[4]) {
    y[0] = t[0] + t[1] + t[2];
    y[1] = t[1] + 2 * t[3];
    y[2] = t[1] + 4 * t[2];
    y[3] = t[1] + 8 * t[3] + t[4];
}

/* `count` taps a side of tiles of `step` pixels; constant after inlining. */
INLINE void NAME(to_taps_of_row)(const struct transform *b, int64_t index, const int step, const int count) {
    const int64_t image = index / b->rows, tile_row = b->first_row + index % b->rows, channels = b->channels;
    const float *x = b->x + image * b->x_stride;
    float *out = b->out + index * b->columns * count * count * channels;
    for (int64_t column = 0; column < b->columns; column++, out += count * count * channels) {
        const int64_t top = tile_row * step - 1, left = column * step - 1;
        for (int64_t c = 0; c < channels; c += LANES) {
            floats rows[6][6], d[6], t[6];
            for (int j = 0; j < step + 2; j++) {
                for (int i = 0; i < step + 2; i++) {
                    const int64_t h = top + i, w = left + j;
                    const int inside = h >= 0 && h < b->height && w >= 0 && w < b->width;
                    d[i] = inside ? NAME(load)(x + (h * b->width + w) * channels + c, channels - c) : (floats){0};
                }
                if (step == 4)
                    NAME(taps_of)(d, t);
                else
                    NAME(upsampled_taps_of)(d, t);
                for (int i = 0; i < count; i++) rows[i][j] = t[i];
            }
            for (int i = 0; i < count; i++) {
                if (step == 4)
                    NAME(taps_of)(rows[i], t);
                else
                    NAME(upsampled_taps_of)(rows[i], t);
                for (int j = 0; j < count; j++) NAME(store)(out + (j * count + i) * channels + c, t[j], channels - c);
            }
        }
    }
}

static void NAME(to_taps)(const void *arguments, int64_t index) {
    const struct transform *block = arguments;
    if (block->upsample)
        NAME(to_taps_of_row)(block, index, 2, 5);
    else
        NAME(to_taps_of_row)(block, index, 4, 6);
}

INLINE void NAME(from_taps_of_row)(const struct transform *b, int64_t index, const int count) {
    const int64_t image = index / b->rows, top = (b->first_row + index % b->rows) * 4, channels = b->channels;
    const float *x = b->x + index * b->columns * count * count * channels;
    const float *residual = b->residual ? b->residual + image * b->residual_stride : NULL;
    const float *bias = b->bias ? b->bias + image * b->bias_stride : NULL;
    float *out = b->out + image * b->out_stride;
    for (int64_t column = 0; column < b->columns; column++, x += count * count * channels) {
        const int64_t left = column * 4, high = LEAST(4, b->height - top), wide = LEAST(4, b->width - left);
        for (int64_t c = 0; c < channels; c += LANES) {
            floats columns[4][6], t[6], y[4];
            for (int i = 0; i < count; i++) {
                for (int j = 0; j < count; j++) t[j] = NAME(load)(x + (j * count + i) * channels + c, channels - c);
                if (count == 6)
                    NAME(pixels_of)(t, y);
                else
                    NAME(upsampled_pixels_of)(t, y);
                for (int j = 0; j < 4; j++) columns[j][i] = y[j];
            }
            const floats add = bias ? NAME(load)(bias + c, channels - c) : (floats){0};
            for (int j = 0; j < wide; j++) {
                if (count == 6)
                    NAME(pixels_of)(columns[j], y);
                else
                    NAME(upsampled_pixels_of)(columns[j], y);
                for (int i = 0; i < high; i++) {
                    const int64_t place = ((top + i) * b->width + left + j) * channels + c;
                    floats value = y[i] + add;
                    if (residual) value += NAME(load)(residual + place, channels - c);
                    if (b->divisor != 1) value /= b->divisor;
                    NAME(store)(out + place, value, channels - c);
                }
            }
        }
    }
}

static void NAME(from_taps)(const void *arguments, int64_t index) {
    const struct transform *block = arguments;
    if (block->upsample)
        NAME(from_taps_of_row)(block, index, 5);
    else
        NAME(from_taps_of_row)(block, index, 6);
}

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

/* The statistics of `parts` parts from `first` on of one input, whose channels begin at `offset` of all channels:
   in a strip by its mean and then by the deviations from it, of strips together by Chan et al.'s formula. */
INLINE void NAME(statistics_of)(const float *x, int64_t channels, int64_t offset, const struct norm *n, float *work,
                                int64_t first, int64_t parts) {
    const int64_t all = n->channels + n->channels2;
    for (int64_t part = first; part < first + parts; part++) {
        float *means = work + part * 2 * all + offset, *squares = means + all;
        const int64_t end = LEAST((part + 1) * n->part, n->pixels);
        for (int64_t start = part * n->part; start < end; start += STRIP) {
            const int64_t count = LEAST(STRIP, end - start), before = start - part * n->part;
            const float fresh = (float)count / (float)(before + count);
            for (int64_t c = 0; c < channels; c += LANES) {
                const float *from = x + start * channels + c;
                floats sum = {0}, square = {0};
                for (int64_t p = 0; p < count; p++) sum += NAME(load)(from + p * channels, channels - c);
                floats mean = sum / (float)count;
                for (int64_t p = 0; p < count; p++) {
                    const floats deviation = NAME(load)(from + p * channels, channels - c) - mean;
                    square += deviation * deviation;
                }
                if (before) {
                    const floats old = NAME(load)(means + c, channels - c), delta = mean - old;
                    square += NAME(load)(squares + c, channels - c) + delta * delta * (before * fresh);
                    mean = old + delta * fresh;
                }
                NAME(store)(means + c, mean, channels - c);
                NAME(store)(squares + c, square, channels - c);
            }
        }
    }
}

INLINE void NAME(statistics)(const struct norm *n, int64_t image, int64_t first, int64_t parts) {
    const int64_t all = n->channels + n->channels2;
    float *work = n->work + image * n->parts * 2 * all;
    NAME(statistics_of)(n->x + image * n->x_stride, n->channels, 0, n, work, first, parts);
    if (n->x2) NAME(statistics_of)(n->x2 + image * n->x2_stride, n->channels2, n->channels, n, work, first, parts);
}

/* From the statistics of all parts to three numbers a channel, in the place of the first parts: what is taken off, what is
   multiplied with and what is added. Each part has room for two, and the pivot goes behind all images' parts. */
INLINE void NAME(finish)(const struct norm *n, int64_t image) {
    const int64_t all = n->channels + n->channels2, parts = n->parts, wide = all / n->groups;
    float *work = n->work + image * parts * 2 * all, *pivots = n->work + n->images * parts * 2 * all + image * all;
    const float *add = n->add ? n->add + image * n->add_stride : NULL;
    for (int64_t group = 0; group < n->groups; group++) {
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
                           int64_t first, int64_t last) {
    const int64_t all = n->channels + n->channels2;
    const float *factors = n->work + image * n->parts * 2 * all + offset, *terms = factors + all;
    const float *pivots = n->work + n->images * n->parts * 2 * all + image * all + offset;
    float *out = n->out + image * n->pixels * all + offset;
    for (int64_t p = first; p < last; p++) {
        for (int64_t c = 0; c < channels; c += LANES) {
            const int64_t left = channels - c;
            floats y = NAME(load)(x + p * channels + c, left) - NAME(load)(pivots + c, left);
            y = y * NAME(load)(factors + c, left) + NAME(load)(terms + c, left);
            if (n->silu) y = y / (1.0f + NAME(exponential)(-y));
            NAME(store)(out + p * all + c, y, left);
        }
    }
}

INLINE void NAME(apply)(const struct norm *n, int64_t image, int64_t first, int64_t last) {
    NAME(apply_to)(n->x + image * n->x_stride, n->channels, 0, n, image, first, last);
    if (n->x2) NAME(apply_to)(n->x2 + image * n->x2_stride, n->channels2, n->channels, n, image, first, last);
}

static void NAME(norm_image)(const void *arguments, int64_t image) {
    const struct norm *n = arguments;
    NAME(statistics)(n, image, 0, n->parts);
    NAME(finish)(n, image);
    NAME(apply)(n, image, 0, n->pixels);
}

static void NAME(norm_statistics)(const void *arguments, int64_t index) {
    const struct norm *n = arguments;
    NAME(statistics)(n, index / n->parts, index % n->parts, 1);
}

static void NAME(norm_finish)(const void *arguments, int64_t image) { NAME(finish)(arguments, image); }

static void NAME(norm_apply)(const void *arguments, int64_t index) {
    const struct norm *n = arguments;
    const int64_t part = index % n->parts;
    NAME(apply)(n, index / n->parts, part * n->part, LEAST((part + 1) * n->part, n->pixels));
}

#endif
