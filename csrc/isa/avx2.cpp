#include "../kernels/dot_256.h"
#include "list.h"

namespace dsconv::avx2 {
namespace {

struct DotProduct {
  static constexpr bool kNibblePairs = true;

  static __m256i add(__m256i acc, __m256i w, __m256i x) {
    // Bytes are widened first, because two of their products would saturate: even bytes in one vector, odd ones in the
    // other.
    const __m256i even = _mm256_and_si256(w, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(w, 8);
    const __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), x_odd = _mm256_srai_epi16(x, 8);
    return _mm256_add_epi32(acc, _mm256_add_epi32(_mm256_madd_epi16(even, x_even), _mm256_madd_epi16(odd, x_odd)));
  }

  static __m256i add_octet(__m256i acc, __m256i w0, __m256i w1, __m256i x0, __m256i x1) {
    // 16 bits hold the products of eight channels.
    const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(x0, w0), _mm256_maddubs_epi16(x1, w1));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};

using Tile = DotTile<Dot256<DotProduct>>;

}  // namespace

constinit const Kernels kernels{
    .isa = "avx2", .mr = Tile::kMR<2>, .task_pixels = 96, .dot = dot<Tile>, .flip_winograd = true, .vector = x86_256::kernels};

}  // namespace dsconv::avx2
