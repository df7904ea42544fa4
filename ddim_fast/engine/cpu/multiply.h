/* The product of a few rows by a panel of 32 columns. */

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
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                const float factor = a[r * a_stride + k];
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

/* The same for any number of rows. */
INLINE void multiply(const float *a, int64_t a_stride, const float *b, float *c, int64_t depth, int add,
                     int64_t rows) {
    for (; rows >= ROWS; rows -= ROWS, a += ROWS * a_stride, c += ROWS * PANEL)
        multiply_rows(a, a_stride, b, c, depth, add, ROWS);
    switch (rows) {
#if ROWS > 7
    case 7: multiply_rows(a, a_stride, b, c, depth, add, 7); break;
    case 6: multiply_rows(a, a_stride, b, c, depth, add, 6); break;
#endif
    case 5: multiply_rows(a, a_stride, b, c, depth, add, 5); break;
    case 4: multiply_rows(a, a_stride, b, c, depth, add, 4); break;
    case 3: multiply_rows(a, a_stride, b, c, depth, add, 3); break;
    case 2: multiply_rows(a, a_stride, b, c, depth, add, 2); break;
    case 1: multiply_rows(a, a_stride, b, c, depth, add, 1); break;
    }
}
