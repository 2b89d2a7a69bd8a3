#include "../kernels/dot_256.h"
#include "list.h"

namespace dsconv::avx2 {
namespace {

struct DotProduct {
  static constexpr bool kNibblePairs = true;

  static __m256i add(__m256i acc, __m256i w, __m256i x) {
    // Bytes are widened first, because the sum of two of their products would saturate: even bytes in one vector, odd ones
    // in the other.
    const __m256i even = _mm256_and_si256(w, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(w, 8);
    const __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), x_odd = _mm256_srai_epi16(x, 8);
    return _mm256_add_epi32(acc, _mm256_add_epi32(_mm256_madd_epi16(even, x_even), _mm256_madd_epi16(odd, x_odd)));
  }

  static __m256i add_octet(__m256i acc, __m256i w0, __m256i w1, __m256i x0, __m256i x1) {
    // 16 bits hold the sum of the products of eight channels.
    const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(x0, w0), _mm256_maddubs_epi16(x1, w1));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};

using Tile = DotTile<Dot256<DotProduct>>;

// Dot products of bytes with mantissas that are already widened to 16 bits: 0 and 2 of four, then 1 and 3.
struct Words {
  using Vector = simd::X86_256;
  static constexpr int kMR = 3, kMantissaBytes = 2;
  template <Weights W>
  static constexpr int kOctetBytes = 128;

  template <Weights W>
  static Vector::Int acc_init(const DotArgs&, const BlockScale& scale, std::int64_t) {
    return Vector::broadcast(scale.acc_init);
  }
  template <Weights W, int M>
  static void add_octets(const DotArgs&, const std::uint8_t* w, const std::int8_t* const (&x)[M], int octets,
                         Vector::Int (&acc)[M][kTileVectors]) {
    const __m256i low = _mm256_set1_epi16(255);
    for (int fours = 0; fours < 2 * octets; ++fours, w += 64)
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; ++odd) {
        __m256i weight[kTileVectors];
        for (int v = 0; v < kTileVectors; ++v) {
          const __m256i both = load_32_bytes(w + 32 * v);
          weight[v] = odd ? _mm256_srli_epi16(both, 8) : _mm256_and_si256(both, low);
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const __m256i two = broadcast_four(x[m] + 8 * fours + 4 * odd);
          for (int v = 0; v < kTileVectors; ++v) {
            acc[m][v] += Vector::as_int(_mm256_madd_epi16(weight[v], two));
            asm("" : "+x"(acc[m][v]));  // in a register: otherwise GCC multiplies all first and spills the sums to memory
          }
        }
      }
  }
};

bool takes_words(const DotArgs& a) { return a.weights() == Weights::bytes && a.taps == 1; }

std::int64_t workspace_bytes(const DotArgs& a) {
  return takes_words(a) ? a.pixels * (2 * a.rows.row_bytes + a.rows.blocks * (8 + 4) + 8) : 0;
}

// The tile of dot_one_block.h for them.
struct OneBlockWords {
  using Vector = simd::X86_256;
  static constexpr int kMR = 4, kVectors = kTileVectors;

  template <int M, Weights W>
  [[gnu::always_inline]] static void sum(const DotArgs& a, const std::uint8_t* w, const OneBlockPixel* pixels,
                                         Vector::Int (&acc)[M][kVectors]) {
    const std::int8_t* x[M];
    for (int m = 0; m < M; ++m) {
      x[m] = pixels[m].x;
      for (int v = 0; v < kVectors; ++v) acc[m][v] = Vector::broadcast(pixels[m].scale.acc_init);
    }
    Words::add_octets<W, M>(a, w, x, a.last_octets, acc);
  }
};

// Widens the mantissas once for all tiles of outputs.
DotArgs with_words(const DotArgs& a) {
  static constexpr std::int64_t kNoTap = 0;
  DotArgs words = a;
  std::uint8_t* to = a.workspace;
  words.rows.mantissa = reinterpret_cast<std::int8_t*>(to), words.rows.row_bytes = 2 * a.rows.row_bytes;
  auto* const row = reinterpret_cast<std::int64_t*>(to + a.pixels * words.rows.row_bytes);
  words.rows.scale = reinterpret_cast<BlockScale*>(row + a.pixels);
  words.rows.shift_term = reinterpret_cast<float*>(words.rows.scale + a.pixels * a.rows.blocks);
  words.row = row, words.tap_row = &kNoTap;
  const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
  for (int p = 0; p < a.pixels; ++p) {
    row[p] = p;
    const std::int64_t from = a.row[p] + a.tap_row[0];
    const std::int8_t* x = a.rows.mantissa + from * a.rows.row_bytes;
    for (std::int64_t i = 0; i < a.rows.row_bytes; i += 8, x += 8, to += 16) {
      const __m128i eight = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x)));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(eight, order));
    }
    for (int b = 0; b < a.rows.blocks; ++b) {
      words.rows.scale[p * a.rows.blocks + b] = a.rows.scale[from * a.rows.blocks + b];
      if (a.kds_shift) words.rows.shift_term[p * a.rows.blocks + b] = a.rows.shift_term[from * a.rows.blocks + b];
    }
  }
  return words;
}

void dot_words(const DotArgs& a) {
  const DotArgs words = with_words(a);
  const auto with_shift = [&]<bool Shift>() {
    using Tile = DotTile<Words>;
    a.panels == 2 ? dot_tiles<Tile, 2, Weights::bytes, Shift>(words) : dot_tiles<Tile, 1, Weights::bytes, Shift>(words);
  };
  a.kds_shift ? with_shift.template operator()<true>() : with_shift.template operator()<false>();
}

void dot(const DotArgs& a) { takes_words(a) ? dot_words(a) : dsconv::dot<Tile>(a); }

void one_block(const DotArgs& a, const EpilogueArgs& to) {
  takes_words(a) ? dot_one_block<OneBlockWords>(with_words(a), to) : dot_one_block<OneBlock256<DotProduct>>(a, to);
}

}  // namespace

constinit const Kernels kernels{.isa = "avx2",
                                .mr = Tile::kMR<2>,
                                .task_pixels = 96,
                                .workspace_bytes = workspace_bytes,
                                .dot = dot,
                                .dot_one_block = one_block,
                                .flip_winograd = true,
                                .vector = x86_256::kernels};

}  // namespace dsconv::avx2
