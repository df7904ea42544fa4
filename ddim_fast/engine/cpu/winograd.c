/* Winograd F(4x4, 3x3) convolution over NHWC float32, plain and behind a nearest 2x upsampling (`winograd.py` has the
   mathematics, and the same in PyTorch; `native.py` the Python side, with shapes and checks).

   A block of tiles is transformed into taps that stay in the last-level cache, or where there are many, a group of
   tiles into a thread's own cache. Then each part of the work takes a panel of 32 output channels for a group: it
   transforms the 9 numbers of a filter into 36, some input channels at a time, into the second-level cache,
   multiplies, and transforms the products back with bias and residual. So a filter is read from memory as 9 numbers,
   not as 36: at small batches reading weights is what takes the time. */

#include "kernels.h"

/* Input channels of a panel's filters that are transformed together: for few tiles few, so that what is read once or
   twice comes from the first-level cache; for many, so that the products' sums are loaded and stored seldom. */
#define MOST_DEPTH 64
#define DEPTH(tiles) ((tiles) <= 4 ? 8 : (tiles) <= 32 ? 32 : MOST_DEPTH)
/* Floats between what would otherwise lie a power of two apart, and share one set of the first-level cache. */
#define APART 16

struct conv {
    const float *x, *filters, *bias, *residual; /* filters: (panels, in_channels, 9, 32) */
    float *out, *taps, *scratch;
    int64_t x_stride, out_stride, residual_stride, bias_stride; /* floats per image */
    int64_t images, height, width, in_channels, out_channels;   /* of the pixels read */
    int64_t block, group; /* tiles whose taps are kept; tiles that are multiplied together */
    int64_t per_thread;   /* whether a thread takes groups through all steps, and keeps their taps to itself */
    float divisor;
    int32_t upsample;
};

/* A block of a conv: `count` tiles from the tile `first` on, in the order of image, row, column. Its input channels
   are transformed in `spans`. */
struct block {
    const struct conv *conv;
    float *data;
    int64_t first, count, rows, columns, groups, panels, spans, taps, tap_stride;
};

/* A thread's own memory: a panel's filters and the products of a group. */
static int64_t scratch_floats(int64_t taps, int64_t group) {
    return taps * (MOST_DEPTH * PANEL + APART) + taps * (group * PANEL + APART);
}

static int64_t taps_floats(const struct conv *conv, int64_t taps, int64_t tiles) {
    return taps * (tiles * (conv->in_channels + APART) + APART);
}

/* Floats of a thread's `scratch`. */
static int64_t worker_floats(const struct conv *conv, int64_t taps) {
    return scratch_floats(taps, conv->group) + (conv->per_thread ? taps_floats(conv, taps, conv->group) : 0);
}

static void place(struct block *block, float *data, int64_t index, int64_t blocks) {
    const struct conv *conv = block->conv;
    const int64_t tiles = conv->images * block->rows * block->columns;
    block->data = data;
    block->first = index * tiles / blocks;
    block->count = (index + 1) * tiles / blocks - block->first;
    block->groups = PARTS(block->count, conv->group);
    block->tap_stride = block->count * (conv->in_channels + APART) + APART;
}

#ifndef VARIANT

/* By this `native.py` knows a library that was built from another version. */
const int64_t ddim_fast_conv_size = sizeof(struct conv);

/* Floats of `taps` and of `scratch` for blocks of `block` tiles, groups of `group` tiles and so many threads. */
void ddim_fast_winograd_room(const struct conv *conv, int64_t threads, int64_t *room) {
    const int64_t taps = conv->upsample ? 25 : 36;
    room[0] = conv->per_thread ? 0 : taps_floats(conv, taps, conv->block);
    room[1] = threads * worker_floats(conv, taps);
}

/* (conv(x) + bias + residual) / divisor. */
void ddim_fast_winograd(const struct conv *conv, const struct team *team) {
    const int64_t step = conv->upsample ? 2 : 4;
    const int64_t rows = PARTS(conv->height, step), columns = PARTS(conv->width, step);
    const int64_t tiles = conv->images * rows * columns, blocks = PARTS(tiles, conv->block);
    struct block block = {.conv = conv, .rows = rows, .columns = columns, .panels = PARTS(conv->out_channels, PANEL)};
    block.taps = conv->upsample ? 25 : 36;
    block.spans = conv->per_thread ? 1 : LEAST(team->threads, PARTS(conv->in_channels, PANEL));
    if (conv->per_thread) {
        share(team, ddim_fast_variant()->convolve_per_thread, &block, PARTS(tiles, conv->group));
        return;
    }
    for (int64_t index = 0; index < blocks; index++) {
        place(&block, conv->taps, index, blocks);
        share(team, ddim_fast_variant()->transform, &block, block.spans * block.count);
        share(team, ddim_fast_variant()->convolve, &block, block.panels * block.groups);
    }
}

#else

/* B^T along one axis: the 4 pixels of a tile and one on each side. */
INLINE void taps_of(const floats d[6], floats t[6]) {
    floats a = d[4] - 4 * d[2], b = d[3] - 4 * d[1], c = d[4] - d[2], e = 2 * (d[3] - d[1]);
    t[0] = 4 * (d[0] - d[2]) + c;
    t[1] = a + b;
    t[2] = a - b;
    t[3] = c + e;
    t[4] = c - e;
    t[5] = 4 * (d[1] - d[3]) + d[5] - d[3];
}

/* The same behind a nearest 2x upsampling: the 2 small pixels of a tile and one on each side. */
INLINE void upsampled_taps_of(const floats d[4], floats t[5]) {
    floats c = d[2] - d[1];
    t[0] = 4 * (d[0] - d[1]) + c;
    t[1] = d[2] - 4 * d[1];
    t[2] = c;
    t[3] = c;
    t[4] = 4 * (d[1] - d[2]) + d[3] - d[2];
}

/* A^T along one axis. */
INLINE void pixels_of(const floats t[6], floats y[4]) {
    floats a = t[1] + t[2], b = t[1] - t[2], c = t[3] + t[4], e = t[3] - t[4];
    y[0] = t[0] + a + c;
    y[1] = b + 2 * e;
    y[2] = a + 4 * c;
    y[3] = b + 8 * e + t[5];
}

INLINE void upsampled_pixels_of(const floats t[5], floats y[4]) {
    y[0] = t[0] + t[1] + t[2];
    y[1] = t[1] + 2 * t[3];
    y[2] = t[1] + 4 * t[2];
    y[3] = t[1] + 8 * t[3] + t[4];
}

/* G along one axis. */
INLINE void filter_of(const floats g[3], floats t[6]) {
    const floats a = (g[0] + g[2]) * (-1.0f / 6), b = g[1] * (1.0f / 6);
    const floats c = g[0] * (1.0f / 24) + g[2] * (1.0f / 6), e = g[1] * (1.0f / 12);
    t[0] = g[0] * 0.25f;
    t[1] = a - b;
    t[2] = a + b;
    t[3] = c + e;
    t[4] = c - e;
    t[5] = g[2];
}

INLINE void upsampled_filter_of(const floats g[3], floats t[5]) {
    const floats a = g[1] + g[2];
    t[0] = g[0] * 0.25f;
    t[1] = (g[0] + a) * (-1.0f / 3);
    t[2] = g[0] * (1.0f / 12) + a * (1.0f / 3);
    t[3] = (g[0] + g[1]) * (1.0f / 6) + g[2] * (2.0f / 3);
    t[4] = g[2];
}

/* B^T d B of a span of one tile's channels, the height's tap before the width's; `side` taps a side is constant after
   inlining. */
INLINE void transform_tile(const struct block *b, int64_t part, const int side) {
    const struct conv *conv = b->conv;
    const int64_t index = part % b->count, vectors = PARTS(conv->in_channels, LANES), span = part / b->count;
    const int64_t begin = span * vectors / b->spans * LANES, end = (span + 1) * vectors / b->spans * LANES;
    const int64_t tile = b->first + index, channels = conv->in_channels, size = side == 6 ? 6 : 4;
    const float *x = conv->x + tile / (b->rows * b->columns) * conv->x_stride;
    const int64_t top = tile / b->columns % b->rows * (size - 2) - 1, left = tile % b->columns * (size - 2) - 1;
    float *out = b->data + index * (channels + APART);
    for (int64_t c = begin; c < end; c += LANES) {
        floats rows[6][6], d[6], t[6];
        /* What the next tile reads anew comes from memory meanwhile: no processor foresees such steps. */
        for (int i = 0; i < size; i++) {
            const int64_t h = LEAST(MOST(top + i, 0), conv->height - 1), w = left + size;
            for (int j = 0; j < size - 2; j++) __builtin_prefetch(x + (h * conv->width + w + j) * channels + c, 0, 3);
        }
        for (int j = 0; j < size; j++) {
            for (int i = 0; i < size; i++) {
                const int64_t h = top + i, w = left + j;
                const int inside = h >= 0 && h < conv->height && w >= 0 && w < conv->width;
                d[i] = inside ? load(x + (h * conv->width + w) * channels + c, channels - c) : (floats){0};
            }
            if (side == 6)
                taps_of(d, t);
            else
                upsampled_taps_of(d, t);
            for (int i = 0; i < side; i++) rows[i][j] = t[i];
        }
        for (int i = 0; i < side; i++) {
            if (side == 6)
                taps_of(rows[i], t);
            else
                upsampled_taps_of(rows[i], t);
            for (int j = 0; j < side; j++) store(out + (i * side + j) * b->tap_stride + c, t[j], channels - c);
        }
    }
}

static void transform(const void *arguments, int64_t index, int64_t worker) {
    const struct block *block = arguments;
    (void)worker;
    if (block->taps == 36)
        transform_tile(block, index, 6);
    else
        transform_tile(block, index, 5);
}

/* G g G^T of `depth` input channels of a panel: (taps, depth, 32), taps `apart` floats from one another. */
INLINE void transform_filters(const float *filters, float *out, int64_t depth, int64_t apart, const int side) {
    for (int64_t k = 0; k < depth; k++, filters += 9 * PANEL, out += PANEL) {
        for (int64_t c = 0; c < PANEL; c += LANES) {
            floats columns[6][3], t[6];
            for (int j = 0; j < 3; j++) {
                floats g[3];
                for (int i = 0; i < 3; i++) g[i] = *(const loose *)(filters + (3 * i + j) * PANEL + c);
                if (side == 6)
                    filter_of(g, t);
                else
                    upsampled_filter_of(g, t);
                for (int i = 0; i < side; i++) columns[i][j] = t[i];
            }
            for (int i = 0; i < side; i++) {
                if (side == 6)
                    filter_of(columns[i], t);
                else
                    upsampled_filter_of(columns[i], t);
                for (int j = 0; j < side; j++) *(loose *)(out + (i * side + j) * apart + c) = t[j];
            }
        }
    }
}

/* A^T m A of `count` channels, at most LANES, with what is folded into it; the first `high` rows and `wide` columns of
   a tile. */
INLINE void finish_channels(const float *products, int64_t apart, floats add, const float *residual, float *out,
                            float divisor, int64_t channels, int64_t width, int64_t high, int64_t wide, int64_t count,
                            const int side) {
    floats rows[4][6], t[6], y[4];
    for (int j = 0; j < side; j++) {
        for (int i = 0; i < side; i++) t[i] = *(const loose *)(products + (i * side + j) * apart);
        if (side == 6)
            pixels_of(t, y);
        else
            upsampled_pixels_of(t, y);
        for (int i = 0; i < 4; i++) rows[i][j] = y[i];
    }
    for (int i = 0; i < high; i++) {
        if (side == 6)
            pixels_of(rows[i], y);
        else
            upsampled_pixels_of(rows[i], y);
        for (int j = 0; j < wide; j++) {
            const int64_t place = (i * width + j) * channels;
            floats value = y[j] + add;
            if (residual) value += load(residual + place, count);
            if (divisor != 1) value /= divisor;
            store(out + place, value, count);
        }
    }
}

/* One tile of a panel. */
INLINE void finish_tile(const struct block *b, int64_t tile, int64_t panel, const float *products, int64_t apart,
                        const int side) {
    const struct conv *conv = b->conv;
    const int64_t image = tile / (b->rows * b->columns), grow = side == 6 ? 1 : 2, channels = conv->out_channels;
    const int64_t top = tile / b->columns % b->rows * 4, left = tile % b->columns * 4, width = grow * conv->width;
    const int64_t high = LEAST(4, grow * conv->height - top), wide = LEAST(4, width - left);
    const int64_t first = (top * width + left) * channels;
    const float *bias = conv->bias ? conv->bias + image * conv->bias_stride : NULL;
    const float *residual = conv->residual ? conv->residual + image * conv->residual_stride + first : NULL;
    float *out = conv->out + image * conv->out_stride + first;
    for (int64_t c = panel * PANEL; c < LEAST(channels, (panel + 1) * PANEL); c += LANES, products += LANES) {
        /* The next tile's place comes from memory meanwhile, to be written. */
        for (int i = 0; i < 4; i++)
            for (int j = 4; j < 8; j++) __builtin_prefetch(out + (i * width + j) * channels + c, 1, 3);
        const floats add = bias ? load(bias + c, channels - c) : (floats){0};
        const float *before = residual ? residual + c : NULL;
        if (high == 4 && wide == 4 && c + LANES <= channels)
            finish_channels(products, apart, add, before, out + c, conv->divisor, channels, width, 4, 4, LANES, side);
        else
            finish_channels(products, apart, add, before, out + c, conv->divisor, channels, width, high, wide,
                            channels - c, side);
    }
}

INLINE void convolve_part(const struct block *b, int64_t part, int64_t worker, const int side) {
    const struct conv *conv = b->conv;
    const int64_t panel = part / b->groups, group = part % b->groups, taps = side * side, channels = conv->in_channels;
    const int64_t start = group * b->count / b->groups, count = (group + 1) * b->count / b->groups - start;
    const int64_t step = DEPTH(count), filters_apart = step * PANEL + APART, products_apart = count * PANEL + APART;
    float *filters = conv->scratch + worker * worker_floats(conv, taps), *products = filters + taps * filters_apart;
    for (int64_t k = 0; k < channels; k += step) {
        const int64_t depth = LEAST(step, channels - k), size = 9 * PANEL;
        const float *from = conv->filters + (panel * channels + k) * size, *ahead = from + depth * size;
        transform_filters(from, filters, depth, filters_apart, side);
        for (int64_t tap = 0; tap < taps; tap++) {
            /* The filters of the next step come from memory while this one multiplies. */
            for (int64_t line = tap; line < depth * size / 16; line += taps)
                __builtin_prefetch(ahead + line * 16, 0, 2);
            multiply(b->data + tap * b->tap_stride + start * (channels + APART) + k, channels + APART,
                     filters + tap * filters_apart, products + tap * products_apart, depth, k > 0, count);
        }
    }
    for (int64_t tile = 0; tile < count; tile++)
        finish_tile(b, b->first + start + tile, panel, products + tile * PANEL, products_apart, side);
}

static void convolve(const void *arguments, int64_t part, int64_t worker) {
    const struct block *block = arguments;
    if (block->taps == 36)
        convolve_part(block, part, worker, 6);
    else
        convolve_part(block, part, worker, 5);
}

/* A group through all steps. */
static void convolve_per_thread(const void *arguments, int64_t index, int64_t worker) {
    struct block block = *(const struct block *)arguments;
    const struct conv *conv = block.conv;
    const int64_t tiles = conv->images * block.rows * block.columns;
    float *scratch = conv->scratch + worker * worker_floats(conv, block.taps);
    place(&block, scratch + scratch_floats(block.taps, conv->group), index, PARTS(tiles, conv->group));
    for (int64_t tile = 0; tile < block.count; tile++) transform(&block, tile, worker);
    for (int64_t panel = 0; panel < block.panels; panel++) convolve(&block, panel, worker);
}

#endif
