// Dot products with 256-bit vectors.
#pragma once

#include <bit>

#include "../simd/x86_256.h"
#include "dot_one_block.h"
#include "dot_tile.h"

namespace dsconv {

[[gnu::always_inline]] inline __m256i load_32_bytes(const std::uint8_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

// Broadcasts four bytes from memory.
[[gnu::always_inline]] inline __m256i broadcast_four(const std::int8_t* from) {
  std::int32_t four;
  __builtin_memcpy(&four, from, 4);
  return _mm256_set1_epi32(four);
}

// Adds the products of some octets to accumulators, by DotProduct::add.
template <class DotProduct, int M, bool Wide>
[[gnu::always_inline]] inline void add_octets(const std::uint8_t* w, const std::int8_t* const (&x)[M], int octets,
                                              simd::X86_256::Int (&acc)[M][kTileVectors]) {
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
          const __m256i sum =
              DotProduct::add(reinterpret_cast<__m256i>(acc[m][v]), weight, broadcast_four(x[m] + 8 * o + 4 * half));
          acc[m][v] = reinterpret_cast<simd::X86_256::Int>(sum);
        }
      }
}

// The same with pairs: the sum of two products of a nibble and a mantissa is so small that 16 bits hold the sum of many
// pairs before it has to be widened.
template <class DotProduct, int M>
[[gnu::always_inline]] inline void add_octets_in_pairs(const std::uint8_t* w, const std::int8_t* const (&x)[M], int octets,
                                                       int together, simd::X86_256::Int (&acc)[M][kTileVectors]) {
  const __m256i low = _mm256_set1_epi8(15);
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
        acc[m][v] += reinterpret_cast<simd::X86_256::Int>(_mm256_madd_epi16(pairs[m][v], _mm256_set1_epi16(1)));
  }
}

// Adds the products of signed weights and flipped mantissas, by DotProduct::add_octet.
template <class DotProduct, int M>
inline void add_flipped_octets(const std::uint8_t* w, const std::int8_t* const (&x)[M], int octets,
                               simd::X86_256::Int (&acc)[M][kTileVectors]) {
  for (int o = 0; o < octets; ++o, w += 128)
#pragma GCC unroll 2
    for (int v = 0; v < kTileVectors; ++v) {
      const __m256i first = load_32_bytes(w + 32 * v), second = load_32_bytes(w + 32 * v + 64);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
        acc[m][v] = reinterpret_cast<simd::X86_256::Int>(DotProduct::add_octet(
            reinterpret_cast<__m256i>(acc[m][v]), first, second, broadcast_four(x[m] + 8 * o), broadcast_four(x[m] + 8 * o + 4)));
    }
}

// DotProduct, a type of an unnamed namespace, has
//   static constexpr bool kNibblePairs   whether products of nibbles are summed in pairs of 16 bits
//   static __m256i add(__m256i acc, __m256i w, __m256i x)
//                                        adds four products of an unsigned byte of w and a signed one of x to each of eight sums
//   static __m256i add_octet(__m256i acc, __m256i w0, __m256i w1, __m256i x0, __m256i x1)
//                                        the same of signed bytes of w and unsigned ones of x, twice four; w is bounded as
//                                        numerics/winograd.py has it
// The tile of dot_one_block.h.
template <class DotProduct>
struct OneBlock256 {
  using Vector = simd::X86_256;
  static constexpr int kMR = 2, kVectors = kTileVectors;

  template <int M, Weights W>
  [[gnu::always_inline]] static void sum(const DotArgs& a, const std::uint8_t* w, const OneBlockPixel* pixels,
                                         Vector::Int (&acc)[M][kVectors]) {
    const std::int8_t* x[M];
    for (int m = 0; m < M; ++m) {
      x[m] = pixels[m].x;
      for (int v = 0; v < kVectors; ++v) acc[m][v] = Vector::broadcast(pixels[m].scale.acc_init);
    }
    if constexpr (W == Weights::bytes) add_octets<DotProduct, M, true>(w, x, a.last_octets, acc);
    else if constexpr (DotProduct::kNibblePairs) add_octets_in_pairs<DotProduct, M>(w, x, a.last_octets, a.octets_together, acc);
    else add_octets<DotProduct, M, false>(w, x, a.last_octets, acc);
  }
};

template <class DotProduct>
struct Dot256 {
  using Vector = simd::X86_256;
  static constexpr int kMR = 3, kMantissaBytes = 1;
  template <Weights W>
  static constexpr int kOctetBytes = W == Weights::nibbles ? 64 : 128;

  template <Weights W>
  static Vector::Int acc_init(const DotArgs& a, const BlockScale& scale, std::int64_t at) {
    if constexpr (W != Weights::signed_bytes) return Vector::broadcast(scale.acc_init);
    const std::uint32_t start = a.rows.int_acc ? 0 : std::bit_cast<std::uint32_t>(scale.scale);  // the sum with a NaN exceeds it
    return Vector::as_int(Vector::as_word(Vector::load(a.flip_sums + at)) + start);
  }
  template <Weights W, int M>
  static void add_octets(const DotArgs& a, const std::uint8_t* w, const std::int8_t* const (&x)[M], int octets,
                         Vector::Int (&acc)[M][kTileVectors]) {
    if constexpr (W == Weights::signed_bytes) add_flipped_octets<DotProduct, M>(w, x, octets, acc);
    else if constexpr (W == Weights::bytes || !DotProduct::kNibblePairs)
      dsconv::add_octets<DotProduct, M, W == Weights::bytes>(w, x, octets, acc);
    else add_octets_in_pairs<DotProduct, M>(w, x, octets, a.octets_together, acc);
  }
};

}  // namespace dsconv
