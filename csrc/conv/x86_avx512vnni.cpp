#include <immintrin.h>

#include "kernels.h"

namespace dsconv::avx512vnni {

#include "quantize.inc"

// A template per tile height, so that all sums stay in registers.
template <int M, bool Wide, bool Shift>
static void rows(const Tile& t) {
  __m512 y[M][2];
  for (int m = 0; m < M; ++m) y[m][0] = y[m][1] = _mm512_setzero_ps();
  const std::uint8_t* w = t.weight;
  const float* kds = t.kds;
  const float* shift = t.kds_shift;
  const __m512i low = _mm512_set1_epi8(15);
  for (int k = 0; k < t.taps; ++k) {
    const std::int8_t* x[M];
    std::int64_t block[M];
    for (int m = 0; m < M; ++m) {
      const std::int64_t at = t.pixel[m] + t.tap[k];
      x[m] = t.mantissa + at * t.row_bytes;
      block[m] = at * t.blocks;
    }
    for (int b = 0; b < t.blocks; ++b) {
      __m512i s[M][2];
      for (int m = 0; m < M; ++m) s[m][0] = s[m][1] = _mm512_set1_epi32(-t.zero * t.sum[block[m] + b]);
      const int octets = b + 1 < t.blocks ? t.octets : t.last_octets;
      for (int o = 0; o < octets; ++o) {
        __m512i first[2], second[2];
        for (int p = 0; p < 2; ++p) {
          const std::uint8_t* row = w + p * t.panel_bytes;
          first[p] = _mm512_loadu_si512(row);
          if constexpr (Wide) {
            second[p] = _mm512_loadu_si512(row + 64);
          } else {
            second[p] = _mm512_and_si512(_mm512_srli_epi16(first[p], 4), low);
            first[p] = _mm512_and_si512(first[p], low);
          }
        }
        w += Wide ? 128 : 64;
        for (int m = 0; m < M; ++m) {
          std::int32_t q[2];
          __builtin_memcpy(q, x[m] + 8 * o, 8);
          const __m512i a = _mm512_set1_epi32(q[0]), c = _mm512_set1_epi32(q[1]);
          for (int p = 0; p < 2; ++p) s[m][p] = _mm512_dpbusd_epi32(s[m][p], first[p], a);
          for (int p = 0; p < 2; ++p) s[m][p] = _mm512_dpbusd_epi32(s[m][p], second[p], c);
        }
      }
      for (int m = 0; m < M; ++m) {
        x[m] += 8 * octets;
        const float e = t.scale[block[m] + b];
        for (int p = 0; p < 2; ++p) {
          const __m512 term = _mm512_mul_ps(_mm512_cvtepi32_ps(s[m][p]), _mm512_set1_ps(e));
          y[m][p] = _mm512_fmadd_ps(_mm512_loadu_ps(kds + p * kPanel), term, y[m][p]);
        }
        if constexpr (Shift) {
          const __m512 term = _mm512_set1_ps(static_cast<float>(t.sum[block[m] + b]) * e);
          for (int p = 0; p < 2; ++p) y[m][p] = _mm512_fmadd_ps(_mm512_loadu_ps(shift + p * kPanel), term, y[m][p]);
        }
      }
      kds += t.kds_stride;
      if constexpr (Shift) shift += t.kds_stride;
    }
  }
  for (int m = 0; m < M; ++m)
    for (int p = 0; p < 2; ++p) _mm512_storeu_ps(t.output + (2 * m + p) * kPanel, y[m][p]);
}

#include "tile_by_height.inc"

extern const Kernels kernels;
const Kernels kernels{"avx512vnni", tile, quantize};

}  // namespace dsconv::avx512vnni
