// Functions that instruction sets of x86 share, by the bits of their vectors: x86_256.cpp for AVX2 and AVX-VNNI, x86_512.cpp for
// AVX-512 VNNI and AMX.
#pragma once

#include "kernels.h"

namespace dsconv::x86_256 {
inline constexpr int kWidth = 8;
#include "vector_functions.inc"
}  // namespace dsconv::x86_256

namespace dsconv::x86_512 {
inline constexpr int kWidth = 16;
#include "vector_functions.inc"
}  // namespace dsconv::x86_512
