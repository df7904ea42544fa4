/* What every processor has. */

#define VARIANT ddim_fast_plain
#define WIDTH 4
#define ROWS 6
#include "variant.h"
