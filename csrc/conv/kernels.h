// The list of instruction sets. Dispatch, tests and benchmarks are all made from it.
#pragma once

#include "tile.h"

#if defined(__x86_64__)
#define DSCONV_KERNELS(KERNEL) KERNEL(scalar) KERNEL(avx2) KERNEL(avxvnni) KERNEL(avx512vnni) KERNEL(amx)
#elif defined(__aarch64__)
#define DSCONV_KERNELS(KERNEL) KERNEL(scalar) KERNEL(neondotprod)
#else
#define DSCONV_KERNELS(KERNEL) KERNEL(scalar)
#endif

#define DSCONV_DECLARE(isa)     \
  namespace isa {               \
  extern const Kernels kernels; \
  }
namespace dsconv {
DSCONV_KERNELS(DSCONV_DECLARE)
}
#undef DSCONV_DECLARE
