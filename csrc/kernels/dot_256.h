// Tiles of dot products on 256 bits: vectors of eight outputs.
#pragma once

#include <immintrin.h>

#include "dot.h"

namespace dsconv {

inline constexpr int kTileVectors = 2;  // side by side in a tile

[[gnu::always_inline]] inline __m256i load_32_bytes(const std::uint8_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

// Broadcasts four bytes straight from memory.
[[gnu::always_inline]] inline __m256i broadcast_four(const std::int8_t* from) {
  std::int32_t four;
  __builtin_memcpy(&four, from, 4);
  return _mm256_set1_epi32(four);
}

// Adds the products of some octets to accumulators, by DotProduct::add.
template <class DotProduct, int M, bool Wide>
inline void add_octets(const std::uint8_t* w, const std::int8_t* const (&x)[M], int octets, __m256i (&acc)[M][kTileVectors]) {
  const __m256i low = _mm256_set1_epi8(15);
  for (int o = 0; o < octets; ++o, w += Wide ? 128 : 64)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half)
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v) {
        __m256i weight = load_32_bytes(w + 32 * v + (Wide ? 64 * half : 0));
        if constexpr (!Wide) weight = _mm256_and_si256(half ? _mm256_srli_epi16(weight, 4) : weight, low);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          acc[m][v] = DotProduct::add(acc[m][v], weight, broadcast_four(x[m] + 8 * o + 4 * half));
        }
      }
}

// The same in pairs: two products of a nibble and a mantissa stay within 2 * 15 * max_mantissa, so that 16 bits hold the sum of
// many such pairs before they have to be widened.
template <class DotProduct, int M>
inline void add_octets_in_pairs(const std::uint8_t* w, const std::int8_t* const (&x)[M], int octets, int max_mantissa,
                                __m256i (&acc)[M][kTileVectors]) {
  const __m256i low = _mm256_set1_epi8(15);
  const int together = 32767 / (4 * 15 * max_mantissa);
  for (int o = 0; o < octets;) {
    const int end = octets - o < together ? octets : o + together;
    __m256i pairs[M][kTileVectors];
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < kTileVectors; ++v) pairs[m][v] = _mm256_setzero_si256();
    for (; o < end; ++o, w += 64)
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v) {
        const __m256i both = load_32_bytes(w + 32 * v);
        const __m256i first = _mm256_and_si256(both, low), second = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const __m256i a = _mm256_maddubs_epi16(first, broadcast_four(x[m] + 8 * o));
          const __m256i c = _mm256_maddubs_epi16(second, broadcast_four(x[m] + 8 * o + 4));
          pairs[m][v] = _mm256_add_epi16(_mm256_add_epi16(pairs[m][v], a), c);
        }
      }
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < kTileVectors; ++v)
        acc[m][v] = _mm256_add_epi32(acc[m][v], _mm256_madd_epi16(pairs[m][v], _mm256_set1_epi16(1)));
  }
}

// A tile of M x (8 * kTileVectors) outputs.
template <class DotProduct, int M, bool Wide, bool Shift>
void tile_256(const DotArgs& a, const std::int64_t* row, const std::uint8_t* w, const float* kds, const float* shift, float* sums) {
  const QuantizedRows& rows = a.rows;
  __m256 y[M][kTileVectors];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < kTileVectors; ++v) y[m][v] = _mm256_setzero_ps();
  for (int k = 0; k < a.taps; ++k) {
    const std::int8_t* x[M];
    std::int64_t block[M];
    for (int m = 0; m < M; ++m) {
      const std::int64_t at = row[m] + a.tap_row[k];
      x[m] = rows.mantissa + at * rows.row_bytes;
      block[m] = at * rows.blocks;
    }
    for (int b = 0; b < rows.blocks; ++b) {
      __m256i acc[M][kTileVectors];
      for (int m = 0; m < M; ++m)
        for (int v = 0; v < kTileVectors; ++v) acc[m][v] = _mm256_set1_epi32(rows.scale[block[m] + b].acc_init);
      const int octets = b + 1 < rows.blocks ? a.octets : a.last_octets;
      if constexpr (Wide || !DotProduct::kNibblePairs) add_octets<DotProduct, M, Wide>(w, x, octets, acc);
      else add_octets_in_pairs<DotProduct, M>(w, x, octets, a.max_mantissa, acc);
      w += octets * (Wide ? 128 : 64);
      for (int m = 0; m < M; ++m) {
        x[m] += 8 * octets;
        const __m256 scale = _mm256_set1_ps(rows.scale[block[m] + b].scale);
        for (int v = 0; v < kTileVectors; ++v) {
          const __m256 term = Wide && rows.int_acc ? _mm256_mul_ps(_mm256_cvtepi32_ps(acc[m][v]), scale)
                                                   : _mm256_sub_ps(_mm256_castsi256_ps(acc[m][v]), scale);
          y[m][v] = _mm256_fmadd_ps(_mm256_loadu_ps(kds + 8 * v), term, y[m][v]);
          if constexpr (Shift) {
            const __m256 shift_term = _mm256_set1_ps(rows.shift_term[block[m] + b]);
            y[m][v] = _mm256_fmadd_ps(_mm256_loadu_ps(shift + 8 * v), shift_term, y[m][v]);
          }
        }
      }
      kds += kNR;
      if constexpr (Shift) shift += kNR;
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < kTileVectors; ++v) _mm256_storeu_ps(sums + m * kNR + 8 * v, y[m][v]);
}

// DotProduct, a type of an unnamed namespace, has
//   static constexpr bool kNibblePairs   whether products of nibbles are summed in pairs of 16 bits
//   static __m256i add(__m256i acc, __m256i w, __m256i x)
//                                        adds four products of an unsigned byte of w and a signed one of x to each of eight sums
template <class DotProduct>
struct Tile256 {
  template <int Panels>
  static constexpr int kMR = 3;

  template <int M, int Panels, bool Wide, bool Shift>
  static void run(const DotArgs& a, const std::int64_t* row, float* sums) {
    for (int n = 0; n < Panels * kPanel; n += 8 * kTileVectors)
      tile_256<DotProduct, M, Wide, Shift>(a, row, a.weight + (n / kPanel) * a.panel_bytes + 4 * (n % kPanel), a.kds + n,
                                           Shift ? a.kds_shift + n : nullptr, sums + n);
  }
};

}  // namespace dsconv
