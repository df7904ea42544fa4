/* 16 channels from and to memory, or what is left of them. No include guard: `cpu_variants.h` needs it once a variant. */

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
