// 256 bits: AVX2 and FMA.
#pragma once

#include <immintrin.h>

#include "lanes.h"

namespace dsconv::simd {
namespace {

struct X86_256 : Lanes<8, X86_256> {
  static constexpr int kDoubles = 4;

  static bool any(Word v) { return !_mm256_testz_si256(bits(v), bits(v)); }

  static Float load_some(const float* from, int count) { return _mm256_maskload_ps(from, first_lanes(count)); }
  static void store_some(float* to, Float v, int count) { _mm256_maskstore_ps(to, first_lanes(count), v); }

  static Int low_bytes(Int a, Int b, Int c, Int d) {
    return as_int(_mm256_blend_epi16(bits((a & 255) | b << 8), bits((c & 255) << 16 | d << 24), 0xaa));
  }
  static Int add_bytes(Int sum, Int four) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bits(four));
    return sum + as_int(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static Int add_product(Int sum, Int a, Int b) { return sum + as_int(_mm256_madd_epi16(bits(a), bits(b))); }

  static Int saturate_to_bytes(Int a, Int b, Int c, Int d) {
    const auto words = [](Int a, Int b) { return _mm256_packs_epi32(bits(a), bits(b)); };
    // Every 128 bits hold four lanes of a, b, c and d.
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return as_int(_mm256_permutevar8x32_epi32(_mm256_packs_epi16(words(a, b), words(c, d)), order));
  }
  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }

 private:
  static __m256i bits(auto v) { return reinterpret_cast<__m256i>(v); }
  static __m256i first_lanes(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
};

}  // namespace
}  // namespace dsconv::simd
