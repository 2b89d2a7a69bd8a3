// Four lanes in portable C++.
#pragma once

#include "lanes.h"

namespace dsconv::simd {
namespace {

struct Scalar : Lanes<4, Scalar> {
  static constexpr int kDoubles = 4;

  // Converts all lanes of a, then those of b, c and d, to bytes, saturated to -128 .. 127.
  static Int saturate_to_bytes(Int a, Int b, Int c, Int d) {
    const Int from[] = {a, b, c, d};
    Bytes to;
    for (int i = 0; i < 16; ++i) to[i] = static_cast<std::int8_t>(max(-128, min(127, from[i / 4][i % 4])));
    return as_int(to);
  }
  // a * b + c, rounded once.
  static Float fma(Float a, Float b, Float c) {
    for (int i = 0; i < kLanes; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
  }
};

}  // namespace
}  // namespace dsconv::simd
