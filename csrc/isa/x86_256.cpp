#include "../simd/x86_256.h"

#include "../kernels/vector_kernels.h"
#include "list.h"

namespace dsconv { constinit const VectorKernels x86_256::kernels = vector_kernels<simd::X86_256>(); }
