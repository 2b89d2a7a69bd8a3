#include "balanced.h"

namespace dsconv::balanced_avx2 {
#define DSCONV_LANES 4
#include "balanced.inc"
}  // namespace dsconv::balanced_avx2
