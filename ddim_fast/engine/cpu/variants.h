/* The file BODY once an instruction set, its functions named by NAME; `PICK` of `kernels.h` chooses at run time.
   WIDTH floats fill a register, and a product of ROWS rows by two registers leaves some free. */

#define LANES WIDTH
#define floats NAME(floats)
#define ints NAME(ints)
#define loose NAME(loose)

#ifdef INSTRUCTION_SETS
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma")
#define NAME(name) name##_avx512
#define WIDTH 16
#define ROWS 8
#include "lanes.h"
#include BODY
#undef NAME
#undef WIDTH
#undef ROWS
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define NAME(name) name##_avx2
#define WIDTH 8
#define ROWS 6
#include "lanes.h"
#include BODY
#undef NAME
#undef WIDTH
#undef ROWS
#pragma GCC pop_options
#endif
#define NAME(name) name##_plain
#define WIDTH 4
#define ROWS 6
#include "lanes.h"
#include BODY
#undef NAME
#undef WIDTH
#undef ROWS
