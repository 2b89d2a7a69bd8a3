#include "balanced.h"

namespace dsconv::balanced_avx512 {
#define DSCONV_LANES 8
#include "balanced.inc"
}  // namespace dsconv::balanced_avx512
