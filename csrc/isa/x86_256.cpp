#include "../simd/x86_256.h"

#include "../kernels/vector_kernels.h"
#include "list.h"

namespace dsconv::x86_256 {
constinit const VectorKernels kernels = vector_kernels<simd::X86_256>();
}
