#include <immintrin.h>

#include "x86_vectors.h"

namespace dsconv::avx2 {

using namespace x86_256;

static constexpr bool kPairs = true;
static constexpr int kVectors = 2;

static inline __m256i dot(__m256i s, __m256i w, __m256i x) {
  // Widened first, because two products of bytes would saturate: even bytes in one vector, odd ones in the other.
  const __m256i even = _mm256_and_si256(w, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(w, 8);
  const __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), x_odd = _mm256_srai_epi16(x, 8);
  return _mm256_add_epi32(s, _mm256_add_epi32(_mm256_madd_epi16(even, x_even), _mm256_madd_epi16(odd, x_odd)));
}

#include "x86_256.inc"

template <int P>
constexpr int kHeight = 3;
#include "sum_by_height.inc"

extern const Kernels kernels;
const Kernels kernels{"avx2",    kWidth,         3,   96,   nullptr, quantize_pixels, quantize_channels, sum, store, store_block,
                      depthwise, depthwise_line, map, pool, average};

}  // namespace dsconv::avx2
