/* What every processor has. */

#define VARIANT ddim_fast_plain
#define LEVEL 0
#define WIDTH 4
#define ROWS 6
#include "variant.h"
