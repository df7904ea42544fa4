/* The product of a few rows by a panel of 32 columns, in float32, or of bfloat16 numbers with float32 sums. */

/* On to the next rows in a way that the compiler cannot see through: it would keep a pointer per row, more than there
   are registers, and load them again and again between the products. */
#define STEP(pointer, by) __asm__("" : "=r"(pointer) : "0"((pointer) + (by)))

/* c (rows, 32) += or = a (rows, depth) b (depth, 32), two registers of columns at a time. */
INLINE void multiply_rows(const float *a, int64_t a_stride, const float *b, float *c, int64_t depth, int add,
                          const int rows) {
    for (int64_t column = 0; column < PANEL; column += 2 * WIDTH) {
        floats sums[ROWS][2];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            for (int v = 0; v < 2; v++) {
                sums[r][v] = (floats){0};
                if (add) sums[r][v] += *(const loose *)(c + r * PANEL + column + v * WIDTH);
            }
        }
        for (int64_t k = 0; k < depth; k++) {
            const floats left = *(const loose *)(b + k * PANEL + column);
            const floats right = *(const loose *)(b + k * PANEL + column + WIDTH);
            const float *row = a + k;
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                if (r % 3 == 0) STEP(row, r ? 3 * a_stride : 0);
                const float factor = row[r % 3 * a_stride];
                sums[r][0] += factor * left;
                sums[r][1] += factor * right;
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            for (int v = 0; v < 2; v++) *(loose *)(c + r * PANEL + column + v * WIDTH) = sums[r][v];
        }
    }
}

/* The bfloat16 numbers of `count` pairs, 2 a lane, multiplied and added to float32 sums. */
INLINE floats dot(floats sums, ints a, ints b) {
#if LEVEL > 2
    return (floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#else
    sums += (floats)(a << 16) * (floats)(b << 16);
    return sums + (floats)(a & (int32_t)0xffff0000) * (floats)(b & (int32_t)0xffff0000);
#endif
}

/* sums += the pairs at `a`, or with `single` the single numbers there, by two registers of pairs at `b`. */
INLINE void multiply_pair(floats sums[ROWS][2], const uint16_t *a, int64_t a_stride, const int32_t *b,
                          const int single, const int rows) {
    const ints left = *(const loose_ints *)b, right = *(const loose_ints *)(b + WIDTH);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        int32_t pair = 0;
        if (r % 3 == 0) STEP(a, r ? 3 * a_stride : 0);
        memcpy(&pair, a + r % 3 * a_stride, single ? sizeof(uint16_t) : sizeof(pair));
        const ints factor = pair - (ints){0};
        sums[r][0] = dot(sums[r][0], factor, left);
        sums[r][1] = dot(sums[r][1], factor, right);
    }
}

/* The same of bfloat16: b (pairs, 32) holds two rows beside one another, the last one filled up with zeros. */
INLINE void multiply_pair_rows(const uint16_t *a, int64_t a_stride, const int32_t *b, float *c, int64_t depth, int add,
                               const int rows) {
    for (int64_t column = 0; column < PANEL; column += 2 * WIDTH) {
        floats sums[ROWS][2];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            for (int v = 0; v < 2; v++) {
                sums[r][v] = (floats){0};
                if (add) sums[r][v] += *(const loose *)(c + r * PANEL + column + v * WIDTH);
            }
        }
        for (int64_t pair = 0; pair < depth / 2; pair++)
            multiply_pair(sums, a + 2 * pair, a_stride, b + pair * PANEL + column, 0, rows);
        if (depth % 2) multiply_pair(sums, a + depth - 1, a_stride, b + depth / 2 * PANEL + column, 1, rows);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            for (int v = 0; v < 2; v++) *(loose *)(c + r * PANEL + column + v * WIDTH) = sums[r][v];
        }
    }
}

/* Either for any number of rows: `multiply` and `multiply_pairs`. */
#define ANY_ROWS(name, part, number, filter)                                                                          \
    INLINE void name(const number *a, int64_t a_stride, const filter *b, float *c, int64_t depth, int add,            \
                     int64_t rows) {                                                                                  \
        for (; rows >= ROWS; rows -= ROWS, a += ROWS * a_stride, c += ROWS * PANEL)                                   \
            part(a, a_stride, b, c, depth, add, ROWS);                                                                \
        switch (rows) {                                                                                               \
        case 7: part(a, a_stride, b, c, depth, add, LEAST(7, ROWS)); break;                                           \
        case 6: part(a, a_stride, b, c, depth, add, LEAST(6, ROWS)); break;                                           \
        case 5: part(a, a_stride, b, c, depth, add, 5); break;                                                        \
        case 4: part(a, a_stride, b, c, depth, add, 4); break;                                                        \
        case 3: part(a, a_stride, b, c, depth, add, 3); break;                                                        \
        case 2: part(a, a_stride, b, c, depth, add, 2); break;                                                        \
        case 1: part(a, a_stride, b, c, depth, add, 1); break;                                                        \
        }                                                                                                             \
    }
ANY_ROWS(multiply, multiply_rows, float, float)
ANY_ROWS(multiply_pairs, multiply_pair_rows, uint16_t, int32_t)
#undef ANY_ROWS

/* Input channels of an image's pixels that are widened together for a product in float32. */
#define WIDENED 256

/* c (rows, 32) += or = the pixels of an image, `stride` numbers apart from the number `at` on, by a panel of filters:
   in float32 (depth, 32), or in bfloat16 and with `pairs` as `multiply_pairs` wants them. */
INLINE void multiply_image(const void *image, int64_t at, int64_t stride, const float *filters, float *c,
                           int64_t depth, int add, int64_t rows, const int kind, const int pairs) {
    if (kind == FLOAT32) {
        multiply((const float *)image + at, stride, filters, c, depth, add, rows);
    } else if (pairs) {
        multiply_pairs((const uint16_t *)image + at, stride, (const int32_t *)filters, c, depth, add, rows);
    } else {
        float wide[ROWS * WIDENED];
        for (int64_t row = 0; row < rows; row += ROWS) {
            const int64_t count = LEAST(ROWS, rows - row);
            for (int64_t k = 0; k < depth; k += WIDENED) {
                const int64_t deep = LEAST(WIDENED, depth - k);
                for (int64_t r = 0; r < count; r++)
                    for (int64_t j = 0; j < deep; j += LANES)
                        store(wide + r * WIDENED + j,
                              load_image(image, at + (row + r) * stride + k + j, deep - j, kind), deep - j);
                multiply(wide, WIDENED, filters + k * PANEL, c + row * PANEL, deep, add || k > 0, count);
            }
        }
    }
}

/* Floats of a panel's filters over `depth` input channels. */
INLINE int64_t panel_floats(int64_t depth, const int pairs) {
    return (pairs ? PARTS(depth, 2) : depth) * PANEL;
}
