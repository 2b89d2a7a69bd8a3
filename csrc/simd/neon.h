// 128 bits: NEON, on AArch64.
#pragma once

#include <arm_neon.h>

#include "lanes.h"

namespace dsconv::simd {
namespace {

struct Neon : Lanes<4, Neon> {
  static constexpr int kDoubles = 4;

  static Int saturate_to_bytes(Int a, Int b, Int c, Int d) {
    const auto words = [](Int a, Int b) {
      return vcombine_s16(vqmovn_s32(reinterpret_cast<int32x4_t>(a)), vqmovn_s32(reinterpret_cast<int32x4_t>(b)));
    };
    return as_int(vcombine_s8(vqmovn_s16(words(a, b)), vqmovn_s16(words(c, d))));
  }
  static Float fma(Float a, Float b, Float c) {
    return as_float(
        vfmaq_f32(reinterpret_cast<float32x4_t>(c), reinterpret_cast<float32x4_t>(a), reinterpret_cast<float32x4_t>(b)));
  }
};

}  // namespace
}  // namespace dsconv::simd
