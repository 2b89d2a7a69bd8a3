#include <immintrin.h>

#include "x86_vectors.h"

namespace dsconv::x86_256 {

#define DSCONV_LANES 8
#define DSCONV_OWN_BYTES
#define DSCONV_OWN_SOME
#define DSCONV_OWN_ANY
#include "lanes.inc"

static inline bool any(Word v) {
  const __m256i n = reinterpret_cast<__m256i>(v);
  return !_mm256_testz_si256(n, n);
}

static inline __m256i first_lanes(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline Float load_some(const float* from, int count) { return _mm256_maskload_ps(from, first_lanes(count)); }
static inline void store_some(float* to, Float v, int count) { _mm256_maskstore_ps(to, first_lanes(count), v); }

static inline Int low_bytes(Int a, Int b, Int c, Int d) {
  const __m256i ab =
      _mm256_blend_epi16(reinterpret_cast<__m256i>((a & 255) | b << 8), reinterpret_cast<__m256i>((c & 255) << 16 | d << 24), 0xaa);
  return reinterpret_cast<Int>(ab);
}
static inline Int with_bytes(Int sum, Int four) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), reinterpret_cast<__m256i>(four));
  return sum + reinterpret_cast<Int>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

static inline Int with_product(Int sum, Int a, Int b) {
  return sum + reinterpret_cast<Int>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}

static inline Int narrowed(Int a, Int b, Int c, Int d) {
  const auto words = [](Int a, Int b) { return _mm256_packs_epi32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)); };
  // In every 128 bits four lanes of a, b, c and d.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  return reinterpret_cast<Int>(_mm256_permutevar8x32_epi32(_mm256_packs_epi16(words(a, b), words(c, d)), order));
}
static inline Float fused(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }

#include "vector.inc"

}  // namespace dsconv::x86_256
