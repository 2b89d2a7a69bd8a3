#include <bit>

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
};

using Tile = DotTile<Dot256<DotProduct>>;

// Dot products of signed weights and flipped mantissas, the sums of whose products fit 16 bits for every eight channels.
// `weight` and the workspace are those of unpack().
struct UnsignedDot {
  using Vector = simd::X86_256;
  static constexpr int kMR = 3;

  template <bool>
  static Vector::Int acc_init(const DotArgs& a, const BlockScale& scale, std::int64_t at) {
    const auto flips = Vector::load(reinterpret_cast<const std::int32_t*>(a.workspace) + at);
    return flips + (a.rows.int_acc ? 0 : std::bit_cast<std::int32_t>(scale.scale));
  }
  template <bool, int M>
  static void add_octets(const DotArgs&, const std::uint8_t* w, const std::int8_t* const (&x)[M], int octets,
                         Vector::Int (&acc)[M][kTileVectors]) {
    for (int o = 0; o < octets; ++o, w += 128)
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v) {
        const __m256i first = load_32_bytes(w + 32 * v), second = load_32_bytes(w + 32 * v + 64);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(broadcast_four(x[m] + 8 * o), first),
                                                 _mm256_maddubs_epi16(broadcast_four(x[m] + 8 * o + 4), second));
          acc[m][v] += reinterpret_cast<Vector::Int>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        }
      }
  }
};

using UnsignedTile = DotTile<UnsignedDot>;

std::int64_t flips_bytes(const DotArgs& a) { return std::int64_t{a.taps} * a.rows.blocks * kNR * 4; }

std::int64_t workspace_bytes(const DotArgs& a) { return a.rows.flipped ? flips_bytes(a) + a.panels * a.panel_bytes : 0; }

// Makes weights signed, and finds what their sums add to those of flipped mantissas: [taps * blocks][kNR], with the sign
// that takes it away.
void unpack(const DotArgs& a, std::int32_t* flips, std::uint8_t* to) {
  const __m256i flip = _mm256_set1_epi8(-128);
  for (int p = 0; p < a.panels; ++p) {
    const std::uint8_t* w = a.weight + p * a.panel_bytes;
    for (std::int64_t b = 0; b < std::int64_t{a.taps} * a.rows.blocks; ++b) {
      simd::X86_256::Int sums[kTileVectors] = {};
      const int octets = (b + 1) % a.rows.blocks ? a.octets : a.last_octets;
      for (int i = 0; i < 4 * octets; ++i, w += 32, to += 32) {
        if (i % 2 == 0) __builtin_prefetch(w + 2 * a.panel_bytes, 0, 2);
        const __m256i q = _mm256_xor_si256(load_32_bytes(w), flip);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), q);
        sums[i % 2] = simd::X86_256::add_bytes(sums[i % 2], reinterpret_cast<simd::X86_256::Int>(q));
      }
      for (int v = 0; v < kTileVectors; ++v) {
        const auto added = sums[v] * -128;
        __builtin_memcpy(flips + b * kNR + p * kPanel + 8 * v, &added, sizeof added);
      }
    }
  }
}

void dot_of_any(const DotArgs& a) {
  if (!a.rows.flipped) return dot<Tile>(a);
  DotArgs signed_weights = a;
  std::uint8_t* const to = a.workspace + flips_bytes(a);
  unpack(a, reinterpret_cast<std::int32_t*>(a.workspace), to);
  signed_weights.weight = to;
  dot<UnsignedTile>(signed_weights);
}

}  // namespace

constinit const Kernels kernels{.isa = "avx2",
                                .mr = Tile::kMR<2>,
                                .task_pixels = 96,
                                .workspace_bytes = workspace_bytes,
                                .dot = dot_of_any,
                                .flip_winograd = true,
                                .vector = x86_256::kernels};

}  // namespace dsconv::avx2
