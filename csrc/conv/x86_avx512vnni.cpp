#include <immintrin.h>

#include "x86_vectors.h"

namespace dsconv::avx512vnni {

using namespace x86_512;

static constexpr int kAhead = 2048;  // bytes

constexpr int kSums = 14;  // and as many of floats, in the 32 registers
template <int P>
constexpr int kHeight = kSums / P;

static inline void ask_for(const void* bytes) { _mm_prefetch(static_cast<const char*>(bytes), _MM_HINT_T0); }

// Four bytes to all lanes, straight from memory.
static inline __m512i spread(const std::int8_t* from) {
  std::int32_t four;
  __builtin_memcpy(&four, from, 4);
  return _mm512_set1_epi32(four);
}

// A template, so that all sums stay in registers. Loops are known to run once at least, and what a tap or a block changes is
// one offset for all pixels: otherwise the compiler keeps many more values than there are registers. All but low tiles take
// octets in fours, since every turn of a loop copies the sums.
template <int M, int P, bool Wide, bool Factors, bool Shift>
static void tile_of(const Sums& t, const std::int64_t* pixel, float* output) {
  // Low tiles have few sums: two of each, so that one does not wait for the other.
  constexpr int kParts = M * P <= 4 ? 2 : 1;
  const Rows& rows = t.rows;
  const std::int64_t row_bytes = rows.row_bytes, panel_bytes = t.panel_bytes, blocks = rows.blocks;
  const std::int8_t* x[M];
  const Ends* ends[M];
  const float* shifted[M];
  for (int m = 0; m < M; ++m) {
    x[m] = rows.mantissa + pixel[m] * row_bytes;
    ends[m] = rows.ends + pixel[m] * blocks;
    if constexpr (Shift) shifted[m] = rows.shifted + pixel[m] * blocks;
  }
  __m512 y[M][P];
  for (int m = 0; m < M; ++m)
    for (int p = 0; p < P; ++p) y[m][p] = _mm512_setzero_ps();
  const std::uint8_t* w = t.weight;
  const float* kds = t.kds;
  const float* shift = t.kds_shift;
  const __m512i low = _mm512_set1_epi8(15);
  // Weights come from a cache far away, or from none, in three times as long as the sums over them take: tiles over the first
  // pixels ask for those of the next outputs, each for a fourth, and the first one for its own, earlier than the processor would.
  constexpr int kLines = Wide ? 4 : 2;
  const std::int64_t turn = (pixel - t.pixel) / M;
  const std::int64_t next = turn < 4 ? (P + turn / 2) * panel_bytes + turn % 2 * kLines * 64 : 0;
  const std::int64_t next_kds = turn == 0 ? t.taps * blocks * kPair : 0;
  const std::int64_t* tap = t.tap;
  const std::int64_t* const no_tap = tap + t.taps;
  do {
    std::int64_t at = *tap * row_bytes, block = *tap * blocks;
    const std::int64_t last = block + blocks - 1;
    do {
      __m512i s[M][P][kParts];
      for (int m = 0; m < M; ++m)
        for (int p = 0; p < P; ++p) {
          s[m][p][0] = _mm512_set1_epi32(ends[m][block].start);
          if constexpr (kParts == 2) s[m][p][1] = _mm512_setzero_si512();
        }
      const auto octet = [&]() __attribute__((always_inline)) {
        __m512i weights[P];
        const auto add = [&](int part, int four) {
          for (int m = 0; m < M; ++m) {
            const __m512i a = spread(x[m] + at + four);
            for (int p = 0; p < P; ++p) s[m][p][part] = _mm512_dpbusd_epi32(s[m][p][part], weights[p], a);
          }
        };
        for (int p = 0; p < P; ++p) {
          const std::uint8_t* row = w + p * panel_bytes;
          if constexpr (kParts == 2) ask_for(row + kAhead);  // a low tile waits for nothing else
          weights[p] = _mm512_loadu_si512(row);
          if constexpr (!Wide) weights[p] = _mm512_and_si512(weights[p], low);
        }
        add(0, 0);
        for (int p = 0; p < P; ++p) {
          weights[p] = _mm512_loadu_si512(w + p * panel_bytes + (Wide ? 64 : 0));
          if constexpr (!Wide) weights[p] = _mm512_and_si512(_mm512_srli_epi16(weights[p], 4), low);
        }
        add(kParts - 1, 4);
        w += Wide ? 128 : 64;
        at += 8;
      };
      int left = block < last ? t.octets : t.last_octets;
      if constexpr (kParts == 1) {
        for (; left % 4; --left) octet();
        for (; left > 0; left -= 4) {
          for (int i = 0; i < kLines; ++i) ask_for(w + next + i * 64);
          if (turn == 0)
            for (int p = 0; p < P; ++p)
              for (int i = 0; i < 2 * kLines; ++i) ask_for(w + p * panel_bytes + kAhead + i * 64);
          octet(), octet(), octet(), octet();
        }
        for (int i = 0; i < P; ++i) ask_for(kds + next_kds + i * kPanel);
      } else {
        do octet();
        while (--left > 0);
      }
      for (int m = 0; m < M; ++m) {
        const __m512 e = _mm512_set1_ps(ends[m][block].end);
        for (int p = 0; p < P; ++p) {
          if constexpr (kParts == 2) s[m][p][0] = _mm512_add_epi32(s[m][p][0], s[m][p][1]);
          const __m512 term =
              Factors ? _mm512_mul_ps(_mm512_cvtepi32_ps(s[m][p][0]), e) : _mm512_sub_ps(_mm512_castsi512_ps(s[m][p][0]), e);
          y[m][p] = _mm512_fmadd_ps(_mm512_loadu_ps(kds + p * kPanel), term, y[m][p]);
        }
        if constexpr (Shift) {
          const __m512 term = _mm512_set1_ps(shifted[m][block]);
          for (int p = 0; p < P; ++p) y[m][p] = _mm512_fmadd_ps(_mm512_loadu_ps(shift + p * kPanel), term, y[m][p]);
        }
      }
      kds += kPair;
      if constexpr (Shift) shift += kPair;
    } while (++block <= last);
  } while (++tap != no_tap);
  for (int m = 0; m < M; ++m)
    for (int p = 0; p < P; ++p) _mm512_storeu_ps(output + m * kPair + p * kPanel, y[m][p]);
}

template <int M, int P, bool Wide, bool Shift>
static void tile(const Sums& t, const std::int64_t* pixel, float* output) {
  if constexpr (Wide)
    if (t.rows.factors) return tile_of<M, P, true, true, Shift>(t, pixel, output);
  tile_of<M, P, Wide, false, Shift>(t, pixel, output);
}

#include "sum_by_height.inc"

extern const Kernels kernels;
const Kernels kernels{"avx512vnni", kWidth,         7,   98,   nullptr, quantize_pixels, quantize_channels, sum, store, store_block,
                      depthwise,    depthwise_line, map, pool, average};

}  // namespace dsconv::avx512vnni
