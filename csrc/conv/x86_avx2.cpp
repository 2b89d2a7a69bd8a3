#include <immintrin.h>

#include "kernels.h"

namespace dsconv::avx2 {

#include "quantize.inc"

// Eight outputs at a time. Narrow weights: products of a nibble and a mantissa, two summed, stay within 15 * 128 * 2 =
// 3840, so that eight such pairs fit 16 bits before they have to be widened. Wide weights are widened first, because
// two products of a byte would saturate.
template <int M, bool Wide, bool Shift>
static void eight(const Tile& t, const std::uint8_t* w, const float* kds, const float* shift, float* output) {
  const __m256i low = _mm256_set1_epi8(15), one = _mm256_set1_epi16(1);
  __m256 y[M];
  for (int m = 0; m < M; ++m) y[m] = _mm256_setzero_ps();
  for (int k = 0; k < t.taps; ++k) {
    const std::int8_t* x[M];
    std::int64_t block[M];
    for (int m = 0; m < M; ++m) {
      const std::int64_t at = t.pixel[m] + t.tap[k];
      x[m] = t.mantissa + at * t.row_bytes;
      block[m] = at * t.blocks;
    }
    for (int b = 0; b < t.blocks; ++b) {
      __m256i s[M];
      for (int m = 0; m < M; ++m) s[m] = _mm256_set1_epi32(-t.zero * t.sum[block[m] + b]);
      const int octets = b + 1 < t.blocks ? t.octets : t.last_octets;
      for (int o = 0; o < octets;) {
        if constexpr (Wide) {
          const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
          const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 64));
          w += 128;
          for (int m = 0; m < M; ++m) {
            std::int32_t q[2];
            __builtin_memcpy(q, x[m] + 8 * o, 8);
            for (int half = 0; half < 2; ++half) {
              const __m256i v = half ? second : first;
              // Each output's four bytes as two pairs of 16 bits: even bytes in one vector, odd ones in the other.
              const __m256i even = _mm256_and_si256(v, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(v, 8);
              const __m256i xs = _mm256_set1_epi32(q[half]);
              const __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16(xs, 8), 8), x_odd = _mm256_srai_epi16(xs, 8);
              s[m] = _mm256_add_epi32(s[m], _mm256_madd_epi16(even, x_even));
              s[m] = _mm256_add_epi32(s[m], _mm256_madd_epi16(odd, x_odd));
            }
          }
          ++o;
        } else {
          const int together = octets - o < 4 ? octets - o : 4;
          __m256i pairs[M];
          for (int m = 0; m < M; ++m) pairs[m] = _mm256_setzero_si256();
          for (int i = 0; i < together; ++i, w += 64) {
            const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
            const __m256i first = _mm256_and_si256(v, low), second = _mm256_and_si256(_mm256_srli_epi16(v, 4), low);
            for (int m = 0; m < M; ++m) {
              std::int32_t q[2];
              __builtin_memcpy(q, x[m] + 8 * (o + i), 8);
              pairs[m] = _mm256_add_epi16(pairs[m], _mm256_maddubs_epi16(first, _mm256_set1_epi32(q[0])));
              pairs[m] = _mm256_add_epi16(pairs[m], _mm256_maddubs_epi16(second, _mm256_set1_epi32(q[1])));
            }
          }
          for (int m = 0; m < M; ++m) s[m] = _mm256_add_epi32(s[m], _mm256_madd_epi16(pairs[m], one));
          o += together;
        }
      }
      const __m256 scale_of_outputs = _mm256_loadu_ps(kds);
      for (int m = 0; m < M; ++m) {
        x[m] += 8 * octets;
        const float e = t.scale[block[m] + b];
        const __m256 term = _mm256_mul_ps(_mm256_cvtepi32_ps(s[m]), _mm256_set1_ps(e));
        y[m] = _mm256_fmadd_ps(scale_of_outputs, term, y[m]);
        if constexpr (Shift) {
          const float sum = static_cast<float>(t.sum[block[m] + b]) * e;
          y[m] = _mm256_fmadd_ps(_mm256_loadu_ps(shift), _mm256_set1_ps(sum), y[m]);
        }
      }
      kds += t.kds_stride;
      if constexpr (Shift) shift += t.kds_stride;
    }
  }
  for (int m = 0; m < M; ++m) _mm256_storeu_ps(output + m * 2 * kPanel, y[m]);
}

template <int M, bool Wide, bool Shift>
static void rows(const Tile& t) {
  for (int n = 0; n < 2 * kPanel; n += 8)
    eight<M, Wide, Shift>(t, t.weight + (n / kPanel) * t.panel_bytes + 4 * (n % kPanel), t.kds + n,
                          Shift ? t.kds_shift + n : nullptr, t.output + n);
}

#include "tile_by_height.inc"

extern const Kernels kernels;
const Kernels kernels{"avx2", tile, quantize};

}  // namespace dsconv::avx2
