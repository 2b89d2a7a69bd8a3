// 512 bits: AVX-512 F, BW, VL, DQ and VNNI.
#pragma once

#include <immintrin.h>

#include "lanes.h"

namespace dsconv::simd {
namespace {

struct X86_512 : Lanes<16, X86_512> {
  static constexpr int kDoubles = 8;

  static bool any(Word v) { return _mm512_test_epi32_mask(bits(v), bits(v)) != 0; }

  static Float load_some(const float* from, int count) { return _mm512_maskz_loadu_ps(first_lanes(count), from); }
  static void store_some(float* to, Float v, int count) { _mm512_mask_storeu_ps(to, first_lanes(count), v); }

  static Int low_bytes(Int a, Int b, Int c, Int d) {
    // 0xca selects bits of the second operand where the mask is set, otherwise of the third.
    const __m512i ab = _mm512_ternarylogic_epi32(_mm512_set1_epi32(0xff), bits(a), bits(b << 8), 0xca);
    const __m512i cd = _mm512_ternarylogic_epi32(_mm512_set1_epi32(0xff0000), bits(c << 16), bits(d << 24), 0xca);
    return as_int(_mm512_ternarylogic_epi32(_mm512_set1_epi32(0xffff), ab, cd, 0xca));
  }
  static Int add_bytes(Int sum, Int four) { return as_int(_mm512_dpbusd_epi32(bits(sum), _mm512_set1_epi8(1), bits(four))); }
  static Int add_product(Int sum, Int a, Int b) { return as_int(_mm512_dpwssd_epi32(bits(sum), bits(a), bits(b))); }

  static Int saturate_to_bytes(Int a, Int b, Int c, Int d) {
    const auto words = [](Int a, Int b) { return _mm512_packs_epi32(bits(a), bits(b)); };
    // Every 128 bits hold four lanes of a, b, c and d.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return as_int(_mm512_permutexvar_epi32(order, _mm512_packs_epi16(words(a, b), words(c, d))));
  }
  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }

 private:
  static __m512i bits(auto v) { return reinterpret_cast<__m512i>(v); }
  static __mmask16 first_lanes(int count) { return static_cast<__mmask16>((1u << count) - 1); }
};

}  // namespace
}  // namespace dsconv::simd
