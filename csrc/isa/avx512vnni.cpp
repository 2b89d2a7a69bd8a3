#include <immintrin.h>

#include <bit>

#include "../kernels/dot.h"
#include "../kernels/dot_one_block.h"
#include "../simd/x86_512.h"
#include "list.h"

namespace dsconv::avx512vnni {
namespace {

constexpr int kAccumulators = 14;  // per tile; with as many float sums, they fit in the 32 registers
constexpr int kPrefetchBytes = 2048;

// Broadcasts four bytes from memory.
inline __m512i broadcast_four(const std::int8_t* from) {
  std::int32_t four;
  __builtin_memcpy(&four, from, 4);
  return _mm512_set1_epi32(four);
}

// Prefetches weights. Loading them from the last-level cache or from memory takes three times as long as their dot
// products. Each tile of the first pixels prefetches a quarter of the weights of the next outputs; the first tile also
// prefetches its own, earlier than the hardware prefetcher.
template <int Panels, Weights W>
struct WeightPrefetch {
  static constexpr int kLines = W == Weights::nibbles ? 2 : 4;
  std::int64_t turn, next, next_kds;

  WeightPrefetch(const DotArgs& a, std::int64_t turn)
      : turn(turn), next(turn < 4 ? (Panels + turn / 2) * a.panel_bytes + turn % 2 * kLines * 64 : 0),
        next_kds(turn == 0 ? a.taps * std::int64_t{a.rows.blocks} * kNR : 0) {}

  [[gnu::always_inline]] void four_octets(const std::uint8_t* w, std::int64_t panel_bytes) const {
    for (int i = 0; i < kLines; ++i) __builtin_prefetch(w + next + i * 64);
    if (turn == 0)
      for (int p = 0; p < Panels; ++p)
        for (int i = 0; i < 2 * kLines; ++i) __builtin_prefetch(w + p * panel_bytes + kPrefetchBytes + i * 64);
  }
  [[gnu::always_inline]] void scales(const float* kds, const std::int32_t* flip_sums) const {
    for (int i = 0; i < Panels; ++i) {
      __builtin_prefetch(kds + next_kds + i * kPanel);
      if constexpr (W == Weights::signed_bytes) __builtin_prefetch(flip_sums + next_kds + i * kPanel);
    }
  }
};

// Adds the products of an octet to accumulators; those of its second half to the second part, if there are two.
template <Weights W, int M, int P, int Parts>
[[gnu::always_inline]] inline void add_octet(const std::uint8_t* w, std::int64_t panel_bytes, const std::int8_t* const (&x)[M],
                                             std::int64_t at, __m512i (&acc)[M][P][Parts]) {
  const __m512i low = _mm512_set1_epi8(15);
  __m512i weights[P];
  const auto add = [&](int part, int four) {
    for (int m = 0; m < M; ++m) {
      const __m512i a = broadcast_four(x[m] + at + four);
      for (int p = 0; p < P; ++p)
        acc[m][p][part] = W == Weights::signed_bytes ? _mm512_dpbusd_epi32(acc[m][p][part], a, weights[p])
                                                     : _mm512_dpbusd_epi32(acc[m][p][part], weights[p], a);
    }
  };
  for (int p = 0; p < P; ++p) {
    const std::uint8_t* row = w + p * panel_bytes;
    if constexpr (Parts == 2) __builtin_prefetch(row + kPrefetchBytes);  // a small tile waits for nothing else
    weights[p] = _mm512_loadu_si512(row);
    if constexpr (W == Weights::nibbles) weights[p] = _mm512_and_si512(weights[p], low);
  }
  add(0, 0);
  for (int p = 0; p < P; ++p) {
    weights[p] = _mm512_loadu_si512(w + p * panel_bytes + (W == Weights::nibbles ? 0 : 64));
    if constexpr (W == Weights::nibbles) weights[p] = _mm512_and_si512(_mm512_srli_epi16(weights[p], 4), low);
  }
  add(Parts - 1, 4);
}

// Dequantizes a block's accumulators, multiplies by KDS, and adds the results to the float sums.
template <bool IntAcc, bool Shift, int M, int P, int Parts>
[[gnu::always_inline]] inline void add_block(__m512i (&acc)[M][P][Parts], const BlockScale* const (&scales)[M], std::int64_t block,
                                             const float* kds, const float* const (&shift_terms)[M], const float* shift,
                                             __m512 (&y)[M][P]) {
  for (int m = 0; m < M; ++m) {
    const __m512 scale = _mm512_set1_ps(scales[m][block].scale);
    for (int p = 0; p < P; ++p) {
      if constexpr (Parts == 2) acc[m][p][0] = _mm512_add_epi32(acc[m][p][0], acc[m][p][1]);
      const __m512 term =
          IntAcc ? _mm512_mul_ps(_mm512_cvtepi32_ps(acc[m][p][0]), scale) : _mm512_sub_ps(_mm512_castsi512_ps(acc[m][p][0]), scale);
      y[m][p] = _mm512_fmadd_ps(_mm512_loadu_ps(kds + p * kPanel), term, y[m][p]);
    }
    if constexpr (Shift) {
      const __m512 term = _mm512_set1_ps(shift_terms[m][block]);
      for (int p = 0; p < P; ++p) y[m][p] = _mm512_fmadd_ps(_mm512_loadu_ps(shift + p * kPanel), term, y[m][p]);
    }
  }
}

// A template, so that all sums stay in registers. Loops are known to run at least once, and a tap or a block changes
// one offset for all pixels: otherwise the compiler needs more registers than exist. All except small tiles process
// four octets per iteration, since every iteration copies the sums.
template <int M, int P, Weights W, bool IntAcc, bool Shift>
void tile(const DotArgs& a, const std::int64_t* row, float* sums) {
  // Small tiles have few sums: two accumulators each break the dependency chain.
  constexpr int kParts = M * P <= 4 ? 2 : 1;
  const QuantizedRows& rows = a.rows;
  const std::int64_t row_bytes = rows.row_bytes, panel_bytes = a.panel_bytes, blocks = rows.blocks;
  const std::int8_t* x[M];
  const BlockScale* scales[M];
  const float* shift_terms[M];
  for (int m = 0; m < M; ++m) {
    x[m] = rows.mantissa + row[m] * row_bytes;
    scales[m] = rows.scale + row[m] * blocks;
    if constexpr (Shift) shift_terms[m] = rows.shift_term + row[m] * blocks;
  }
  __m512 y[M][P];
  for (int m = 0; m < M; ++m)
    for (int p = 0; p < P; ++p) y[m][p] = _mm512_setzero_ps();
  const std::uint8_t* w = a.weight;
  const float* kds = a.kds;
  const float* shift = a.kds_shift;
  const std::int32_t* flip_sums = a.flip_sums;
  const WeightPrefetch<P, W> ahead(a, (row - a.row + kAccumulators / P - 1) / (kAccumulators / P));
  const std::int64_t* tap = a.tap_row;
  const std::int64_t* const no_tap = tap + a.taps;
  do {
    std::int64_t at = *tap * row_bytes, block = *tap * blocks;
    const std::int64_t last = block + blocks - 1;
    do {
      __m512i acc[M][P][kParts];
      for (int m = 0; m < M; ++m)
        for (int p = 0; p < P; ++p) {
          if constexpr (W == Weights::signed_bytes)
            acc[m][p][0] = _mm512_add_epi32(_mm512_set1_epi32(IntAcc ? 0 : std::bit_cast<std::int32_t>(scales[m][block].scale)),
                                            _mm512_loadu_si512(flip_sums + p * kPanel));
          else acc[m][p][0] = _mm512_set1_epi32(scales[m][block].acc_init);
          if constexpr (kParts == 2) acc[m][p][1] = _mm512_setzero_si512();
        }
      const auto octet = [&]() __attribute__((always_inline)) {
        add_octet<W>(w, panel_bytes, x, at, acc);
        w += W == Weights::nibbles ? 64 : 128, at += 8;
      };
      int left = block < last ? a.octets : a.last_octets;
      if constexpr (kParts == 1) {
        for (; left % 4; --left) octet();
        for (; left > 0; left -= 4) {
          ahead.four_octets(w, panel_bytes);
          octet(), octet(), octet(), octet();
        }
        ahead.scales(kds, flip_sums);
      } else {
        do octet();
        while (--left > 0);
      }
      add_block<IntAcc, Shift>(acc, scales, block, kds, shift_terms, shift, y);
      kds += kNR;
      if constexpr (Shift) shift += kNR;
      if constexpr (W == Weights::signed_bytes) flip_sums += kNR;
    } while (++block <= last);
  } while (++tap != no_tap);
  for (int m = 0; m < M; ++m)
    for (int p = 0; p < P; ++p) _mm512_storeu_ps(sums + m * kNR + p * kPanel, y[m][p]);
}

struct Tile {
  template <int Panels>
  static constexpr int kMR = kAccumulators / Panels;

  template <int M, int Panels, Weights W, bool Shift>
  static void run(const DotArgs& a, const std::int64_t* row, float* sums) {
    if constexpr (W != Weights::nibbles)
      if (a.rows.int_acc) return tile<M, Panels, W, true, Shift>(a, row, sums);
    tile<M, Panels, W, false, Shift>(a, row, sums);
  }
};

// The tile of dot_one_block.h: as many sums as with two panels, with registers left for the epilogue.
struct OneBlockTile {
  using Vector = simd::X86_512;
  static constexpr int kMR = 7, kVectors = 1;

  template <int M, Weights W>
  [[gnu::always_inline]] static void sum(const DotArgs& a, const std::uint8_t* w, const OneBlockPixel* pixels,
                                         Vector::Int (&sums)[M][kVectors]) {
    const std::int8_t* x[M];
    __m512i acc[M][1][1];
    for (int m = 0; m < M; ++m) x[m] = pixels[m].x, acc[m][0][0] = _mm512_set1_epi32(pixels[m].scale.acc_init);
    std::int64_t at = 0;
    for (int left = a.last_octets; left > 0; --left, w += W == Weights::nibbles ? 64 : 128, at += 8) add_octet<W>(w, 0, x, at, acc);
    for (int m = 0; m < M; ++m) sums[m][0] = Vector::as_int(acc[m][0][0]);
  }
};

}  // namespace

constinit const Kernels kernels{.isa = "avx512vnni",
                                .mr = Tile::kMR<2>,
                                .task_pixels = 98,
                                .dot = dot<Tile>,
                                .dot_one_block = dot_one_block<OneBlockTile>,
                                .flip_winograd = true,
                                .vector = x86_512::kernels};

}  // namespace dsconv::avx512vnni
