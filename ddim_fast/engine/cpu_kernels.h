/* What the C kernels of the CPU engine share: 16 floats at a time, and PyTorch's own OpenMP team to run the parts of a
   call, through the `GOMP_parallel` that the caller passes. Vector extensions of GCC and Clang, no library. */

#ifndef DDIM_FAST_CPU_KERNELS_H
#define DDIM_FAST_CPU_KERNELS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
/* Columns that are multiplied together. */
#define PANEL 32
typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef float loose __attribute__((vector_size(64), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define LEAST(a, b) ((a) < (b) ? (a) : (b))
#define PARTS(count, size) (((count) + (size) - 1) / (size))

typedef void (*task_fn)(void *);
typedef void (*parallel_fn)(task_fn, void *, unsigned, unsigned);
/* One part of a call; `worker` counts the threads that take parts of it from 0. */
typedef void (*part_fn)(const void *arguments, int64_t part, int64_t worker);

struct job {
    int64_t next, count, workers;
    part_fn run;
    const void *arguments;
};

static void work_on(void *pointer) {
    struct job *job = pointer;
    const int64_t worker = __atomic_fetch_add(&job->workers, 1, __ATOMIC_RELAXED);
    for (;;) {
        const int64_t part = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
        if (part >= job->count) return;
        job->run(job->arguments, part, worker);
    }
}

static void share(parallel_fn parallel, unsigned threads, part_fn run, const void *arguments, int64_t count) {
    struct job job = {0, count, 0, run, arguments};
    if (parallel == NULL || threads < 2 || count < 2)
        work_on(&job);
    else
        parallel(work_on, &job, threads, 0);
}

/* The widest instruction set to use: 2 AVX-512, 1 AVX2, 0 what every processor has. Tests lower it. */
extern int ddim_fast_widest;

#if defined(__x86_64__) && !defined(__clang__)
#define INSTRUCTION_SETS
static int level(void) {
    if (ddim_fast_widest > 1 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return 2;
    return ddim_fast_widest > 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#define PICK(function) (level() == 2 ? function##_avx512 : level() == 1 ? function##_avx2 : function##_plain)
#else
#define PICK(function) function##_plain
#endif

#endif
