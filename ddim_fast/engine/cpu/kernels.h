/* What the C kernels of the CPU engine share: PyTorch's own OpenMP team runs the parts of a call, for which the
   instruction set is chosen at run time. Vector extensions of GCC and Clang, no library.

   An operator's file holds its arguments, its entry and its inner functions. Compiled by itself it gives the entry;
   each `variant_*.c` includes it for the inner functions, compiled for one instruction set. */

#ifndef DDIM_FAST_CPU_KERNELS_H
#define DDIM_FAST_CPU_KERNELS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if !defined(PANEL) || !defined(FEW) || !defined(REVISION) || !defined(FLOAT32) || !defined(BFLOAT16)
#error "setup.py defines these, from constants.py"
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNUSED __attribute__((unused))
#define LEAST(a, b) ((a) < (b) ? (a) : (b))
#define MOST(a, b) ((a) > (b) ? (a) : (b))
#define PARTS(count, size) (((count) + (size) - 1) / (size))

typedef void (*task_fn)(void *);
/* PyTorch's OpenMP team: `GOMP_parallel` and `omp_get_thread_num`, or NULL, and how many threads of it to use. */
struct team {
    void (*parallel)(task_fn, void *, unsigned, unsigned);
    int (*number)(void);
    int64_t threads;
};
/* One part of a call; `worker` is the thread's number in the team. */
typedef void (*part_fn)(const void *arguments, int64_t part, int64_t worker);

#define MOST_THREADS 128
/* What a thread has left of its own parts, in a cache line of its own. */
struct left {
    int64_t next, end;
    char apart[48];
};
struct job {
    const struct team *team;
    int64_t workers;
    part_fn run;
    const void *arguments;
    struct left left[MOST_THREADS] __attribute__((aligned(64)));
};

UNUSED static void work_on(void *pointer) {
    struct job *job = pointer;
    const int64_t worker = job->team->number();
    if (worker >= job->workers) return;
    for (int64_t turn = 0; turn < job->workers; turn++) {
        struct left *left = job->left + (worker + turn) % job->workers;
        for (;;) {
            const int64_t part = __atomic_fetch_add(&left->next, 1, __ATOMIC_RELAXED);
            if (part >= left->end) break;
            job->run(job->arguments, part, worker);
        }
    }
}

/* Run `count` parts. A thread takes an even share of neighbouring parts first, so that over a chain of calls it finds
   in its own cache what it wrote, and then what others have left. */
UNUSED static void share(const struct team *team, part_fn run, const void *arguments, int64_t count) {
    const int64_t workers = LEAST(LEAST(team->threads, MOST_THREADS), count);
    if (team->parallel == NULL || workers < 2) {
        for (int64_t part = 0; part < count; part++) run(arguments, part, 0);
        return;
    }
    struct job job = {.team = team, .workers = workers, .run = run, .arguments = arguments};
    for (int64_t worker = 0; worker < workers; worker++) {
        job.left[worker].next = worker * count / workers;
        job.left[worker].end = (worker + 1) * count / workers;
    }
    /* Always all of them: OpenMP ends threads that one team does without, and starts them anew for the next. */
    team->parallel(work_on, &job, (unsigned)team->threads, 0);
}

/* The inner functions of one instruction set; `variant.h` fills it in. */
struct variant {
    part_fn digest, direct_few, direct_row, norm_span, norm_statistics, norm_finish, norm_apply, product;
    part_fn transform, convolve, convolve_per_thread;
};
extern const struct variant ddim_fast_plain;
/* GCC compiles parts of a library for an instruction set of their own; of a compiler that does not there is one. */
#if defined(__x86_64__) && !defined(__clang__)
#define INSTRUCTION_SETS
extern const struct variant ddim_fast_avx2, ddim_fast_avx512;
#if __GNUC__ > 10
#define BFLOAT16_INSTRUCTIONS
extern const struct variant ddim_fast_avx512_bf16;
#endif
#endif

/* The one for this processor. */
const struct variant *ddim_fast_variant(void);

#endif
