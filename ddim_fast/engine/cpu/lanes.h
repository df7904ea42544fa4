/* A register of channels, from and to memory, or what is left of them. As wide as a variant's registers: of wider vectors
   GCC makes scalars where it compares. No include guard: `variants.h` needs it once a variant. */

typedef float NAME(floats) __attribute__((vector_size(4 * WIDTH)));
typedef int32_t NAME(ints) __attribute__((vector_size(4 * WIDTH)));
typedef float NAME(loose) __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

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
