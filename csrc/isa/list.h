// The list of instruction sets. Dispatch, tests and benchmarks use it.
#pragma once

#include "../kernels/kernels.h"

namespace dsconv {

namespace scalar { extern const Kernels kernels; }
#if defined(__x86_64__)
namespace avx2 { extern const Kernels kernels; }
namespace avxvnni { extern const Kernels kernels; }
namespace avx512vnni { extern const Kernels kernels; }
namespace amx { extern const Kernels kernels; }
inline constexpr const Kernels* kBuiltKernels[] = {&scalar::kernels, &avx2::kernels, &avxvnni::kernels, &avx512vnni::kernels,
                                                   &amx::kernels};
#elif defined(__aarch64__)
namespace neondotprod { extern const Kernels kernels; }
inline constexpr const Kernels* kBuiltKernels[] = {&scalar::kernels, &neondotprod::kernels};
#else
inline constexpr const Kernels* kBuiltKernels[] = {&scalar::kernels};
#endif

// Operators that x86 instruction sets share, by vector width in bits.
namespace x86_256 { extern const VectorKernels kernels; }
namespace x86_512 { extern const VectorKernels kernels; }

}  // namespace dsconv
