#include <immintrin.h>

#include "x86_vectors.h"

namespace dsconv::x86_512 {

#define DSCONV_LANES 16
#define DSCONV_OWN_BYTES
#define DSCONV_OWN_SOME
#define DSCONV_OWN_ANY
#include "lanes.inc"

static inline bool any(Word v) {
  const __m512i n = reinterpret_cast<__m512i>(v);
  return _mm512_test_epi32_mask(n, n) != 0;
}

static inline Float load_some(const float* from, int count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
}
static inline void store_some(float* to, Float v, int count) {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), v);
}

static inline Int low_bytes(Int a, Int b, Int c, Int d) {
  const auto of = [](Int v, int shift) { return reinterpret_cast<__m512i>(v << shift); };
  // 0xca: a bit of the second where the mask's is set, else of the third.
  const __m512i ab = _mm512_ternarylogic_epi32(_mm512_set1_epi32(0xff), of(a, 0), of(b, 8), 0xca);
  const __m512i cd = _mm512_ternarylogic_epi32(_mm512_set1_epi32(0xff0000), of(c, 16), of(d, 24), 0xca);
  return reinterpret_cast<Int>(_mm512_ternarylogic_epi32(_mm512_set1_epi32(0xffff), ab, cd, 0xca));
}
static inline Int with_bytes(Int sum, Int four) {
  return reinterpret_cast<Int>(
      _mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), _mm512_set1_epi8(1), reinterpret_cast<__m512i>(four)));
}

static inline Int with_product(Int sum, Int a, Int b) {
  return reinterpret_cast<Int>(
      _mm512_dpwssd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}

static inline Int narrowed(Int a, Int b, Int c, Int d) {
  const auto words = [](Int a, Int b) { return _mm512_packs_epi32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)); };
  // In every 128 bits four lanes of a, b, c and d.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return reinterpret_cast<Int>(_mm512_permutexvar_epi32(order, _mm512_packs_epi16(words(a, b), words(c, d))));
}
static inline Float fused(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }

#include "vector.inc"

}  // namespace dsconv::x86_512
