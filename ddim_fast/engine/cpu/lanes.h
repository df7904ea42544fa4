/* A register of channels, from and to memory, or what is left of them. As wide as a variant's registers: of wider
   vectors GCC makes scalars where it compares. */

typedef float floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ints __attribute__((vector_size(4 * WIDTH)));
typedef float loose __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

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
