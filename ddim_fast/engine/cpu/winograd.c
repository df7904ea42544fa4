/* Winograd convolution over NHWC, float32 or bfloat16, in three forms (`winograd.py` has the mathematics, and the
   first two in PyTorch; `calls.py` the Python side, with shapes and checks). By taps per side: 6: F(4x4, 3x3); 5:
   F(4x4, 3x3) behind a nearest 2x upsampling; 4: F(2x2, 3x3) of bfloat16 images, with taps rounded to bfloat16 and
   products summed in float32.

   A block of tiles is transformed into taps that stay in the last-level cache, or where there are many, a group of
   tiles into a thread's own cache. Then each part of the work takes a panel of 32 output channels for a group: it
   transforms the 9 numbers of a filter into its taps, some input channels at a time, into the second-level cache,
   multiplies, and transforms the products back with bias and residual. So a filter is read from memory as 9 numbers,
   not as 36: at small batches reading weights is what takes the time. */

#include "kernels.h"

/* Input channels of a panel's filters that are transformed together: for few tiles few, so that what is read once or
   twice comes from the first-level cache; for many, so that the products' sums are loaded and stored seldom. */
#define MOST_DEPTH 64
#define DEPTH(tiles) ((tiles) <= 4 ? 8 : (tiles) <= 32 ? 32 : MOST_DEPTH)
/* Numbers between what would otherwise lie a power of two apart, and share one set of the first-level cache. */
#define APART 16
/* Pixels per side that a tile reads, what it writes, and how often its input is repeated. */
#define WINDOW(side) ((side) == 6 ? 6 : 4)
#define OUTPUTS(side) ((side) == 4 ? 2 : 4)
#define GROW(side) ((side) == 5 ? 2 : 1)

struct conv {
    const void *x, *filters, *residual; /* filters: (panels, in_channels, 9, 32) */
    const float *bias;
    void *out;
    float *taps, *scratch;
    int64_t x_stride, out_stride, residual_stride, bias_stride; /* numbers per image */
    int64_t images, height, width, in_channels, out_channels;   /* of the pixels read */
    int64_t block, group; /* tiles whose taps are kept; tiles that are multiplied together */
    int64_t per_thread;   /* whether a thread takes groups through all steps, and keeps their taps to itself */
    float divisor;
    int32_t side, kind; /* taps per side; of x, filters, residual and out */
};

/* A block of a conv: `count` tiles from the tile `first` on, in the order of image, row, column. Its input channels
   are transformed in `spans`. */
struct block {
    const struct conv *conv;
    float *data;
    int64_t first, count, rows, columns, groups, panels, spans, tap_stride;
};

/* A thread's own memory: a panel's filters and the products of a group. */
UNUSED static int64_t scratch_floats(const struct conv *conv) {
    const int64_t taps = conv->side * conv->side;
    return taps * (MOST_DEPTH * PANEL + APART) + taps * (conv->group * PANEL + APART);
}

/* Of taps, which take half a float in bfloat16. */
UNUSED static int64_t taps_floats(const struct conv *conv, int64_t tiles) {
    const int64_t numbers = conv->side * conv->side * (tiles * (conv->in_channels + APART) + APART);
    return conv->side == 4 ? PARTS(numbers, 2) : numbers;
}

/* Floats of a thread's `scratch`. */
UNUSED static int64_t worker_floats(const struct conv *conv) {
    return scratch_floats(conv) + (conv->per_thread ? taps_floats(conv, conv->group) : 0);
}

UNUSED static void place(struct block *block, float *data, int64_t index, int64_t blocks) {
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
    room[0] = conv->per_thread ? 0 : taps_floats(conv, conv->block);
    room[1] = threads * worker_floats(conv);
}

/* (conv(x) + bias + residual) / divisor. */
void ddim_fast_winograd(const struct conv *conv, const struct team *team) {
    const int64_t step = WINDOW(conv->side) - 2;
    const int64_t rows = PARTS(conv->height, step), columns = PARTS(conv->width, step);
    const int64_t tiles = conv->images * rows * columns, blocks = PARTS(tiles, conv->block);
    struct block block = {.conv = conv, .rows = rows, .columns = columns, .panels = PARTS(conv->out_channels, PANEL)};
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

/* B^T of F(2x2, 3x3). */
INLINE void small_taps_of(const floats d[4], floats t[4]) {
    t[0] = d[0] - d[2];
    t[1] = d[1] + d[2];
    t[2] = d[2] - d[1];
    t[3] = d[1] - d[3];
}

INLINE void any_taps_of(const floats *d, floats *t, const int side) {
    if (side == 6)
        taps_of(d, t);
    else if (side == 5)
        upsampled_taps_of(d, t);
    else
        small_taps_of(d, t);
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

INLINE void small_pixels_of(const floats t[4], floats y[2]) {
    y[0] = t[0] + t[1] + t[2];
    y[1] = t[1] - t[2] - t[3];
}

INLINE void any_pixels_of(const floats *t, floats *y, const int side) {
    if (side == 6)
        pixels_of(t, y);
    else if (side == 5)
        upsampled_pixels_of(t, y);
    else
        small_pixels_of(t, y);
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

INLINE void small_filter_of(const floats g[3], floats t[4]) {
    const floats a = (g[0] + g[2]) * 0.5f, b = g[1] * 0.5f;
    t[0] = g[0];
    t[1] = a + b;
    t[2] = a - b;
    t[3] = g[2];
}

INLINE void any_filter_of(const floats *g, floats *t, const int side) {
    if (side == 6)
        filter_of(g, t);
    else if (side == 5)
        upsampled_filter_of(g, t);
    else
        small_filter_of(g, t);
}

/* `call(side, kind)` with the numbers of a conv as constants. */
#define BY_FORM(call)                                                                                                 \
    if (conv->side == 4)                                                                                              \
        call(4, BFLOAT16);                                                                                            \
    else if (conv->side == 5 && conv->kind == FLOAT32)                                                                \
        call(5, FLOAT32);                                                                                             \
    else if (conv->side == 5)                                                                                         \
        call(5, BFLOAT16);                                                                                            \
    else if (conv->kind == FLOAT32)                                                                                   \
        call(6, FLOAT32);                                                                                             \
    else                                                                                                              \
        call(6, BFLOAT16);

/* B^T d B of a span of one tile's channels, the height's tap before the width's; `side` taps a side is constant after
   inlining. */
INLINE void transform_tile(const struct block *b, int64_t part, const int side, const int kind) {
    const struct conv *conv = b->conv;
    const int64_t index = part % b->count, vectors = PARTS(conv->in_channels, LANES), span = part / b->count;
    const int64_t begin = span * vectors / b->spans * LANES, end = (span + 1) * vectors / b->spans * LANES;
    const int64_t tile = b->first + index, channels = conv->in_channels, size = WINDOW(side);
    const int64_t image = tile / (b->rows * b->columns) * conv->x_stride;
    const int64_t top = tile / b->columns % b->rows * (size - 2) - 1, left = tile % b->columns * (size - 2) - 1;
    const int64_t out = index * (channels + APART);
    for (int64_t c = begin; c < end; c += LANES) {
        floats rows[6][6], d[6], t[6];
        /* What the next tile reads anew comes from memory meanwhile: no processor foresees such steps. */
        for (int i = 0; i < size; i++) {
            const int64_t h = LEAST(MOST(top + i, 0), conv->height - 1), w = left + size;
            for (int j = 0; j < size - 2; j++)
                __builtin_prefetch(place_of(conv->x, image + (h * conv->width + w + j) * channels + c, kind), 0, 3);
        }
        for (int j = 0; j < size; j++) {
            for (int i = 0; i < size; i++) {
                const int64_t h = top + i, w = left + j;
                const int inside = h >= 0 && h < conv->height && w >= 0 && w < conv->width;
                d[i] = inside ? load_image(conv->x, image + (h * conv->width + w) * channels + c, channels - c, kind)
                              : (floats){0};
            }
            any_taps_of(d, t, side);
            for (int i = 0; i < side; i++) rows[i][j] = t[i];
        }
        for (int i = 0; i < side; i++) {
            any_taps_of(rows[i], t, side);
            for (int j = 0; j < side; j++)
                store_image(b->data, out + (i * side + j) * b->tap_stride + c, t[j], channels - c,
                            side == 4 ? BFLOAT16 : FLOAT32);
        }
    }
}

static void transform(const void *arguments, int64_t index, int64_t worker) {
    const struct block *block = arguments;
    const struct conv *conv = block->conv;
    (void)worker;
#define TRANSFORM(side, kind) transform_tile(block, index, side, kind)
    BY_FORM(TRANSFORM)
}

/* G g G^T of one register of a filter's numbers, which lie 32 apart from the number `at` on. */
INLINE void transform_filter(const void *filters, int64_t at, floats taps[36], const int side, const int kind) {
    floats columns[6][3], t[6];
    for (int j = 0; j < 3; j++) {
        floats g[3];
        for (int i = 0; i < 3; i++) g[i] = load_image(filters, at + (3 * i + j) * PANEL, LANES, kind);
        any_filter_of(g, t, side);
        for (int i = 0; i < side; i++) columns[i][j] = t[i];
    }
    for (int i = 0; i < side; i++) any_filter_of(columns[i], taps + i * side, side);
}

/* Of `depth` input channels of a panel: (taps, depth, 32), or pairs of bfloat16 (taps, pairs, 32), taps `apart` floats
   from one another. */
INLINE void transform_filters(const void *filters, int64_t at, float *out, int64_t depth, int64_t apart,
                              const int side, const int kind) {
    for (int64_t k = 0; k < depth; k += side == 4 ? 2 : 1, at += (side == 4 ? 18 : 9) * PANEL, out += PANEL) {
        for (int64_t c = 0; c < PANEL; c += LANES) {
            floats taps[36], second[36] = {{0}};
            transform_filter(filters, at + c, taps, side, kind);
            if (side == 4) {
                if (k + 1 < depth) transform_filter(filters, at + 9 * PANEL + c, second, side, kind);
                for (int i = 0; i < side * side; i++) {
                    const words low = rounded(taps[i]) >> 16, high = rounded(second[i]) & 0xffff0000;
                    *(loose_ints *)(out + i * apart + c) = (ints)(low | high);
                }
            } else {
                for (int i = 0; i < side * side; i++) *(loose *)(out + i * apart + c) = taps[i];
            }
        }
    }
}

/* A^T m A of `count` channels, at most LANES, with what is folded into it; the first `high` rows and `wide` columns of
   a tile. */
INLINE void finish_channels(const struct conv *conv, const float *products, int64_t apart, floats add,
                            int64_t residual, int64_t out, int64_t high, int64_t wide, int64_t count, const int side,
                            const int kind) {
    const int64_t channels = conv->out_channels, width = GROW(side) * conv->width;
    floats rows[4][6], t[6], y[4];
    for (int j = 0; j < side; j++) {
        for (int i = 0; i < side; i++) t[i] = *(const loose *)(products + (i * side + j) * apart);
        any_pixels_of(t, y, side);
        for (int i = 0; i < OUTPUTS(side); i++) rows[i][j] = y[i];
    }
    for (int i = 0; i < high; i++) {
        any_pixels_of(rows[i], y, side);
        for (int j = 0; j < wide; j++) {
            const int64_t place = (i * width + j) * channels;
            floats value = y[j] + add;
            if (conv->residual) value += load_image(conv->residual, residual + place, count, kind);
            if (conv->divisor != 1) value /= conv->divisor;
            store_image(conv->out, out + place, value, count, kind);
        }
    }
}

/* One tile of a panel. */
INLINE void finish_tile(const struct block *b, int64_t tile, int64_t panel, const float *products, int64_t apart,
                        const int side, const int kind) {
    const struct conv *conv = b->conv;
    const int64_t image = tile / (b->rows * b->columns), channels = conv->out_channels, size = OUTPUTS(side);
    const int64_t top = tile / b->columns % b->rows * size, left = tile % b->columns * size;
    const int64_t width = GROW(side) * conv->width;
    const int64_t high = LEAST(size, GROW(side) * conv->height - top), wide = LEAST(size, width - left);
    const int64_t first = (top * width + left) * channels;
    const float *bias = conv->bias ? conv->bias + image * conv->bias_stride : NULL;
    const int64_t residual = image * conv->residual_stride + first, out = image * conv->out_stride + first;
    for (int64_t c = panel * PANEL; c < LEAST(channels, (panel + 1) * PANEL); c += LANES, products += LANES) {
        /* The next tile's place comes from memory meanwhile, to be written. */
        for (int i = 0; i < size; i++)
            for (int j = size; j < 2 * size; j++)
                __builtin_prefetch(place_of(conv->out, out + (i * width + j) * channels + c, kind), 1, 3);
        const floats add = bias ? load(bias + c, channels - c) : (floats){0};
        if (high == size && wide == size && c + LANES <= channels)
            finish_channels(conv, products, apart, add, residual + c, out + c, OUTPUTS(side), OUTPUTS(side), LANES,
                            side, kind);
        else
            finish_channels(conv, products, apart, add, residual + c, out + c, high, wide, channels - c, side, kind);
    }
}

INLINE void convolve_part(const struct block *b, int64_t part, int64_t worker, const int side, const int kind) {
    const struct conv *conv = b->conv;
    const int64_t panel = part / b->groups, group = part % b->groups, taps = side * side, channels = conv->in_channels;
    const int64_t start = group * b->count / b->groups, count = (group + 1) * b->count / b->groups - start;
    const int64_t step = DEPTH(count), filters_apart = step * PANEL + APART, products_apart = count * PANEL + APART;
    float *filters = conv->scratch + worker * worker_floats(conv), *products = filters + taps * filters_apart;
    for (int64_t k = 0; k < channels; k += step) {
        const int64_t depth = LEAST(step, channels - k), size = 9 * PANEL, from = (panel * channels + k) * size;
        const int64_t line = 64 / (kind == FLOAT32 ? sizeof(float) : sizeof(uint16_t)), lines = depth * size / line;
        transform_filters(conv->filters, from, filters, depth, filters_apart, side, kind);
        for (int64_t tap = 0; tap < taps; tap++) {
            /* The filters of the next step come from memory while this one multiplies. */
            for (int64_t l = tap; l < lines; l += taps)
                __builtin_prefetch(place_of(conv->filters, from + depth * size + l * line, kind), 0, 2);
            const int64_t at = tap * b->tap_stride + start * (channels + APART) + k;
            float *const factors = filters + tap * filters_apart, *const sums = products + tap * products_apart;
            if (side == 4)
                multiply_pairs((const uint16_t *)b->data + at, channels + APART, (const int32_t *)factors, sums, depth,
                               k > 0, count);
            else
                multiply(b->data + at, channels + APART, factors, sums, depth, k > 0, count);
        }
    }
    for (int64_t tile = 0; tile < count; tile++)
        finish_tile(b, b->first + start + tile, panel, products + tile * PANEL, products_apart, side, kind);
}

static void convolve(const void *arguments, int64_t part, int64_t worker) {
    const struct block *block = arguments;
    const struct conv *conv = block->conv;
#define CONVOLVE(side, kind) convolve_part(block, part, worker, side, kind)
    BY_FORM(CONVOLVE)
}

/* A group through all steps. */
static void convolve_per_thread(const void *arguments, int64_t index, int64_t worker) {
    struct block block = *(const struct block *)arguments;
    const struct conv *conv = block.conv;
    const int64_t tiles = conv->images * block.rows * block.columns;
    float *scratch = conv->scratch + worker * worker_floats(conv);
    place(&block, scratch + scratch_floats(conv), index, PARTS(tiles, conv->group));
    for (int64_t tile = 0; tile < block.count; tile++) transform(&block, tile, worker);
    for (int64_t panel = 0; panel < block.panels; panel++) convolve(&block, panel, worker);
}

#endif
