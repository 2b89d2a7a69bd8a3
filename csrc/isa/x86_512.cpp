#include "../simd/x86_512.h"

#include "../kernels/vector_kernels.h"
#include "list.h"

namespace dsconv { constinit const VectorKernels x86_512::kernels = vector_kernels<simd::X86_512>(); }
