/* A register of channels, from and to memory, or what is left of them. As wide as a variant's registers: of wider
   vectors GCC makes scalars where it compares. Images are float32 or bfloat16 in memory, by a `kind` that is constant
   after inlining, and float32 in registers. */

#if LEVEL > 0
#include <immintrin.h>
#endif

typedef float floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ints __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t words __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t halves __attribute__((vector_size(2 * WIDTH)));
typedef float loose __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t loose_ints __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef uint16_t loose_halves __attribute__((vector_size(2 * WIDTH), aligned(2), may_alias));

INLINE floats load(const float *from, int64_t count) {
    if (count >= LANES) return *(const loose *)from;
    floats value = {0};
    memcpy(&value, from, count * sizeof(float));
    return value;
}

INLINE void store(float *to, floats value, int64_t count) {
    if (count >= LANES)
        *(loose *)to = value;
    else
        memcpy(to, &value, count * sizeof(float));
}

/* bfloat16 is the upper half of float32. */
INLINE floats widen(halves value) {
#if LEVEL > 1
    const words wide = (words)_mm512_cvtepu16_epi32((__m256i)value);
#elif LEVEL == 1
    const words wide = (words)_mm256_cvtepu16_epi32((__m128i)value);
#else
    const words wide = __builtin_convertvector(value, words);
#endif
    return (floats)(wide << 16);
}

/* The nearest bfloat16, of two equally near ones the even one, in the upper halves; the lower ones hold anything. NaN
   stays NaN. */
INLINE words rounded(floats value) {
    const words bits = (words)value, nan = (words)(value != value);
    return ((bits + 0x7fff + (bits >> 16 & 1)) & ~nan) | ((bits | 0x400000) & nan);
}

INLINE halves narrow(floats value) {
#if LEVEL > 2
    return (halves)_mm512_cvtneps_pbh((__m512)value);
#else
    const words upper = rounded(value) >> 16;
#if LEVEL == 2
    return (halves)_mm512_cvtepi32_epi16((__m512i)upper);
#elif LEVEL == 1
    const __m256i all = (__m256i)upper;
    return (halves)_mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
#else
    return __builtin_convertvector(upper, halves);
#endif
#endif
}

/* Numbers of an image from the number `at` on. */
INLINE floats load_image(const void *image, int64_t at, int64_t count, const int kind) {
    if (kind == FLOAT32) return load((const float *)image + at, count);
    const uint16_t *from = (const uint16_t *)image + at;
    if (count >= LANES) return widen(*(const loose_halves *)from);
    halves value = {0};
    memcpy(&value, from, count * sizeof(uint16_t));
    return widen(value);
}

INLINE void store_image(void *image, int64_t at, floats value, int64_t count, const int kind) {
    if (kind == FLOAT32) {
        store((float *)image + at, value, count);
        return;
    }
    uint16_t *to = (uint16_t *)image + at;
    const halves narrowed = narrow(value);
    if (count >= LANES)
        *(loose_halves *)to = narrowed;
    else
        memcpy(to, &narrowed, count * sizeof(uint16_t));
}

/* The place of a number in an image. */
INLINE const void *place_of(const void *image, int64_t at, const int kind) {
    return (const char *)image + at * (kind == FLOAT32 ? sizeof(float) : sizeof(uint16_t));
}
