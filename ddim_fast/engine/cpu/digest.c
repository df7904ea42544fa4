/* Digests of memory, by which edited weights are known: 64 bits for every piece of it.

   Each of 64 lanes takes every 64th word x of 32 bits by h = (h ^ x) * ODD; h ^= h >> 15. Both steps can be undone, so
   one changed word always changes its lane, and the order of the words counts. `digest.py` has the Python side. */

#include "kernels.h"

#define WORDS 64
#define WORD_BYTES (WORDS * 4)
#define REGISTERS (WORDS / WIDTH)

struct piece {
    const unsigned char *from;
    int64_t bytes;
};

struct digest {
    const struct piece *pieces;
    uint64_t *digests;
    int64_t count;
};

#ifndef VARIANT

const int64_t ddim_fast_digest_size = sizeof(struct digest);

void ddim_fast_digest(const struct digest *digest, const struct team *team) {
    share(team, ddim_fast_variant()->digest, digest, digest->count);
}

#else

typedef uint32_t words __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t loose_words __attribute__((vector_size(4 * WIDTH), aligned(1), may_alias));

INLINE void mix(words *lanes, const unsigned char *from) {
    for (int64_t r = 0; r < REGISTERS; r++) {
        const words mixed = (lanes[r] ^ *(const loose_words *)(from + r * 4 * WIDTH)) * 0x9E3779B1u;
        lanes[r] = mixed ^ (mixed >> 15);
    }
}

static void digest(const void *arguments, int64_t part, int64_t worker) {
    const struct digest *d = arguments;
    const struct piece piece = d->pieces[part];
    unsigned char rest[WORD_BYTES] = {0};
    uint32_t ends[WORDS];
    words lanes[REGISTERS];
    int64_t done = 0;
    uint64_t all = 0;
    (void)worker;
    for (int64_t w = 0; w < WORDS; w++) ends[w] = (uint32_t)(w + 1) * 0x85EBCA77u;
    memcpy(lanes, ends, sizeof(lanes));
    for (; done + WORD_BYTES <= piece.bytes; done += WORD_BYTES) mix(lanes, piece.from + done);
    memcpy(rest, piece.from + done, (size_t)(piece.bytes - done));
    mix(lanes, rest);
    memcpy(ends, lanes, sizeof(ends));
    for (int64_t w = 0; w < WORDS; w++) {
        all = (all ^ ends[w]) * 0x9E3779B97F4A7C15u;
        all ^= all >> 32;
    }
    d->digests[part] = all;
}

#endif
