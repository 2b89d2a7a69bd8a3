#include <immintrin.h>

#include "amx_tiles.h"
#include "list.h"

namespace dsconv::amx {
namespace {

constexpr int kTileRows = 16;
constexpr int kMinPixels = 8;    // minimum for a tile
constexpr int kGroupBlocks = 3;  // dequantized at once: their sums are loaded and stored once

// The workspace: accumulators of two groups, pixels gathered into the rows of two tiles, and unpacked weights.
constexpr std::int64_t kBlockAccumulators = 2 * kTileRows * kNR;
constexpr std::int64_t kAccumulatorBytes = 2 * kGroupBlocks * kBlockAccumulators * 4;
constexpr std::int64_t kTileBytes = kTileRows * 64;
constexpr std::int64_t kOctetBytes = 8 * kPanel;  // of unpacked weights

// The octets of a tile product, and the products of a block. The last one is padded with zero weights.
struct Depth {
  int octets, steps, last_steps;
  std::int64_t panel_bytes;

  explicit Depth(const DotArgs& a) {
    const int most = a.rows.blocks > 1 ? a.octets : a.last_octets;
    steps = (most + 7) / 8;
    octets = (most + steps - 1) / steps;
    last_steps = (a.last_octets + octets - 1) / octets;
    panel_bytes = kOctetBytes * octets * a.taps * (std::int64_t{steps} * (a.rows.blocks - 1) + last_steps);
  }
};

// Signed weights are multiplied by signed mantissas, which only tiles support.
int min_pixels(const DotArgs& a) { return a.weights() == Weights::signed_bytes ? 1 : kMinPixels; }

std::int64_t workspace_bytes(const DotArgs& a) { return kAccumulatorBytes + 2 * kTileBytes + a.panels * Depth(a).panel_bytes; }

// Unpacks weights to signed bytes: each row of 64 bytes holds four values of 16 outputs.
template <Weights W>
void unpack(const DotArgs& a, const Depth& depth, std::int8_t* to) {
  constexpr int kZero = W == Weights::nibbles ? kZeroPoint : W == Weights::bytes ? kWideZeroPoint : 0;
  const __m512i low = _mm512_set1_epi8(15), zero = _mm512_set1_epi8(static_cast<char>(kZero));
  for (int p = 0; p < a.panels; ++p) {
    const std::uint8_t* w = a.weight + p * a.panel_bytes;
    for (int k = 0; k < a.taps; ++k)
      for (int b = 0; b < a.rows.blocks; ++b) {
        const bool last = b + 1 == a.rows.blocks;
        const int octets = last ? a.last_octets : a.octets;
        const int filled = (last ? depth.last_steps : depth.steps) * depth.octets;
        for (int o = 0; o < octets; ++o, w += W == Weights::nibbles ? 64 : 128, to += kOctetBytes) {
          __m512i first = _mm512_loadu_si512(w), second;
          if constexpr (W != Weights::nibbles) {
            second = _mm512_loadu_si512(w + 64);
          } else {
            second = _mm512_and_si512(_mm512_srli_epi16(first, 4), low);
            first = _mm512_and_si512(first, low);
          }
          _mm512_store_si512(to, _mm512_sub_epi8(first, zero));
          _mm512_store_si512(to + 64, _mm512_sub_epi8(second, zero));
        }
        for (int o = octets; o < filled; ++o, to += kOctetBytes) {
          _mm512_store_si512(to, _mm512_setzero_si512());
          _mm512_store_si512(to + 64, _mm512_setzero_si512());
        }
      }
  }
}

// The pixels of one tile. Pixels with a constant stride are loaded directly, others are gathered.
struct TilePixels {
  int count = 0;
  bool gathered;
  std::int64_t stride;                // in bytes
  const std::int8_t* row[kTileRows];  // only the first is set unless gathered
  std::int8_t* copy;

  void take(const DotArgs& a, int from) {
    const int left = a.pixels - from;
    const std::int64_t* pixel = a.row + from;
    int run = left < 2 ? left : 2;
    while (run < left && run < 2 * kTileRows && pixel[run] - pixel[run - 1] == pixel[1] - pixel[0]) ++run;
    gathered = run < left && run < kMinPixels;
    if (gathered) count = left < kTileRows ? left : kTileRows;
    else  // two tiles of similar height are faster than a full one and a small one
      count = run <= kTileRows ? run : run < 2 * kTileRows ? (run + 1) / 2 : kTileRows;
    stride = gathered ? 64 : count > 1 ? (pixel[1] - pixel[0]) * a.rows.row_bytes : 0;
    for (int m = 0; m < (gathered ? count : count > 0); ++m) row[m] = a.rows.mantissa + pixel[m] * a.rows.row_bytes;
  }
};

[[gnu::noinline]] const std::int8_t* gather(const TilePixels& p, std::int64_t at) {
  for (int m = 0; m < p.count; ++m) _mm512_store_si512(p.copy + 64 * m, _mm512_loadu_si512(p.row[m] + at));
  return p.copy;
}
inline const std::int8_t* rows_from(const TilePixels& p, std::int64_t at) { return p.gathered ? gather(p, at) : p.row[0] + at; }

// Tiles 0 and 1 accumulate the first pixels, one panel each, 2 and 3 the second ones; 4 and 5 hold pixels, 6 and 7 weights.
void configure(const TilePixels* pixels, const Depth& depth) {
  TileConfig c;
  const auto shape = [&c](int tile, int rows, int row_bytes) {
    c.rows[tile] = static_cast<std::uint8_t>(rows);
    c.row_bytes[tile] = static_cast<std::uint16_t>(rows ? row_bytes : 0);
  };
  for (int i = 0; i < 2; ++i) {
    shape(2 * i, pixels[i].count, 64);
    shape(2 * i + 1, pixels[i].count, 64);
    shape(4 + i, pixels[i].count, 8 * depth.octets);
    shape(6 + i, 2 * depth.octets, 64);
  }
  TILE_CONFIGURE(c);
}

// Computes the dot products of one block, which stay in tiles. Rows of pixels are read from `at` on.
template <int P>
[[gnu::noinline]] void multiply(const TilePixels* pixels, std::int64_t at, const std::int8_t* w, const Depth& depth, int steps) {
  const bool both = pixels[1].count > 0;
  TILE_ZERO(0);
  if constexpr (P == 2) TILE_ZERO(1);
  if (both) {
    TILE_ZERO(2);
    if constexpr (P == 2) TILE_ZERO(3);
  }
  for (int s = 0; s < steps; ++s, at += 8 * depth.octets, w += kOctetBytes * depth.octets) {
    const std::int8_t* x = rows_from(pixels[0], at);
    TILE_LOAD(4, x, pixels[0].stride);
    TILE_LOAD(6, w, 64);
    TILE_DOT(0, 4, 6);
    if constexpr (P == 2) {
      TILE_LOAD(7, w + depth.panel_bytes, 64);
      TILE_DOT(1, 4, 7);
    }
    if (both) {
      x = rows_from(pixels[1], at);
      TILE_LOAD(5, x, pixels[1].stride);
      TILE_DOT(2, 5, 6);
      if constexpr (P == 2) TILE_DOT(3, 5, 7);
    }
  }
}

template <int P>
inline void store_accumulators(const TilePixels* pixels, std::int32_t* acc) {
  TILE_STORE(0, acc, kNR * 4);
  if constexpr (P == 2) TILE_STORE(1, acc + kPanel, kNR * 4);
  if (pixels[1].count > 0) {
    acc += pixels[0].count * kNR;
    TILE_STORE(2, acc, kNR * 4);
    if constexpr (P == 2) TILE_STORE(3, acc + kPanel, kNR * 4);
  }
}

// Blocks whose accumulators are stored consecutively, and the data for adding them to the sums.
struct BlockGroup {
  int blocks, pixels;
  bool first;  // sums are not initialized yet
  const std::int64_t* row;
  float* sums;
  const float *kds, *kds_shift;
  std::int64_t scale_offset[kGroupBlocks];  // of a block's scale, relative to the pixel's first one
  std::int32_t* acc;
};

// S * 2^e of an accumulator that started at zero.
template <bool IntAcc>
inline __m512 dequantized(__m512i acc, const BlockScale& block) {
  const __m512 scale = _mm512_set1_ps(block.scale);
  if constexpr (IntAcc) return _mm512_mul_ps(_mm512_cvtepi32_ps(acc), scale);
  return _mm512_sub_ps(_mm512_castsi512_ps(_mm512_add_epi32(acc, _mm512_castps_si512(scale))), scale);
}

// Adds N blocks to the sums of pixels `from` to `to`.
template <int N, int P, bool IntAcc, bool Shift>
void add_blocks(const DotArgs& a, const BlockGroup& g, int from, int to) {
  __m512 kds[N][P], shift[N][P];
  const BlockScale* scales[N];
  const float* shift_terms[N];
  for (int n = 0; n < N; ++n) {
    scales[n] = a.rows.scale + g.scale_offset[n];
    if constexpr (Shift) shift_terms[n] = a.rows.shift_term + g.scale_offset[n];
    for (int p = 0; p < P; ++p) {
      kds[n][p] = _mm512_loadu_ps(g.kds + n * kNR + p * kPanel);
      if constexpr (Shift) shift[n][p] = _mm512_loadu_ps(g.kds_shift + n * kNR + p * kPanel);
    }
  }
  const std::int64_t* row = g.row;
  const std::int64_t blocks = a.rows.blocks;
  const bool first = g.first;
  const std::int32_t* acc = g.acc + from * kNR;
  float* sums = g.sums + from * kNR;
  for (int m = from; m < to; ++m, acc += kNR, sums += kNR) {
    const std::int64_t at = row[m] * blocks;
    __m512 y[P];
    for (int p = 0; p < P; ++p) y[p] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + p * kPanel);
    for (int n = 0; n < N; ++n) {
      for (int p = 0; p < P; ++p) {
        const __m512 term = dequantized<IntAcc>(_mm512_load_si512(acc + n * kBlockAccumulators + p * kPanel), scales[n][at]);
        y[p] = _mm512_fmadd_ps(kds[n][p], term, y[p]);
      }
      if constexpr (Shift) {
        const __m512 term = _mm512_set1_ps(shift_terms[n][at]);
        for (int p = 0; p < P; ++p) y[p] = _mm512_fmadd_ps(shift[n][p], term, y[p]);
      }
    }
    for (int p = 0; p < P; ++p) _mm512_storeu_ps(sums + p * kPanel, y[p]);
  }
}

template <int P, Weights W, bool Shift>
inline void add_group(const DotArgs& a, const BlockGroup& g, int from, int to) {
  static_assert(kGroupBlocks == 3);
  if (from == to) return;
  const auto with_form = [&]<bool IntAcc>() {
    if (g.blocks == 3) add_blocks<3, P, IntAcc, Shift>(a, g, from, to);
    else g.blocks == 2 ? add_blocks<2, P, IntAcc, Shift>(a, g, from, to) : add_blocks<1, P, IntAcc, Shift>(a, g, from, to);
  };
  W != Weights::nibbles&& a.rows.int_acc ? with_form.template operator()<true>() : with_form.template operator()<false>();
}

// Sums the pixels of two tiles. While tiles multiply a block of one group, vectors add a part of the previous group.
// Accumulators are stored only afterwards, so that nothing waits for an unfinished product.
template <int P, Weights W, bool Shift>
inline void sum_pixels(const DotArgs& a, const Depth& depth, const std::int8_t* w, const TilePixels* pixels, int from,
                       BlockGroup* groups, int& now) {
  std::int64_t at = a.tap_row[0] * a.rows.row_bytes;
  const int total = a.taps * a.rows.blocks;
  for (int done = 0, k = 0, b = 0; done < total; now ^= 1) {
    BlockGroup& g = groups[now];
    const BlockGroup& before = groups[now ^ 1];
    g.blocks = total - done < kGroupBlocks ? total - done : kGroupBlocks;
    g.pixels = pixels[0].count + pixels[1].count;
    g.first = done == 0;
    g.row = a.row + from;
    g.sums = a.sums + from * kNR;
    g.kds = a.kds + done * kNR;
    if constexpr (Shift) g.kds_shift = a.kds_shift + done * kNR;
    for (int n = 0, added = 0; n < g.blocks; ++n, ++done) {
      const bool last = b + 1 == a.rows.blocks;
      const int steps = last ? depth.last_steps : depth.steps;
      g.scale_offset[n] = a.tap_row[k] * a.rows.blocks + b;
      multiply<P>(pixels, at, w, depth, steps);
      const int part = before.pixels * (n + 1) / g.blocks;
      add_group<P, W, Shift>(a, before, added, part);
      added = part;
      store_accumulators<P>(pixels, g.acc + n * kBlockAccumulators);
      w += steps * depth.octets * kOctetBytes;
      at += 8 * a.octets;
      ++b;
      if (last && ++k < a.taps) {
        b = 0;
        at = a.tap_row[k] * a.rows.row_bytes;
      }
    }
  }
}

// Returns the number of pixels that were computed.
template <int P, Weights W, bool Shift>
int tiles(const DotArgs& a) {
  const Depth depth(a);
  std::int8_t* const copies = reinterpret_cast<std::int8_t*>(a.workspace + kAccumulatorBytes);
  std::int8_t* const unpacked = copies + 2 * kTileBytes;
  // Tiles read signed weights directly, unless octets need padding.
  const bool ready = W == Weights::signed_bytes && depth.panel_bytes == a.panel_bytes;
  if (!ready) unpack<W>(a, depth, unpacked);
  const std::int8_t* const weight = ready ? reinterpret_cast<const std::int8_t*>(a.weight) : unpacked;

  TilePixels pixels[2];
  for (int i = 0; i < 2; ++i) pixels[i].copy = copies + i * kTileBytes;
  BlockGroup groups[2];
  for (int i = 0; i < 2; ++i) groups[i].acc = reinterpret_cast<std::int32_t*>(a.workspace) + i * kGroupBlocks * kBlockAccumulators;
  groups[1].pixels = 0;
  const int least = min_pixels(a);
  int now = 0, m = 0;
  while (a.pixels - m >= least) {
    const int before[2] = {pixels[0].count, pixels[1].count};
    pixels[0].take(a, m);
    pixels[1].take(a, m + pixels[0].count);
    if (pixels[0].count != before[0] || pixels[1].count != before[1]) configure(pixels, depth);
    sum_pixels<P, W, Shift>(a, depth, weight, pixels, m, groups, now);
    m += pixels[0].count + pixels[1].count;
  }
  TILE_RELEASE();  // other code may use tiles on this thread
  add_group<P, W, Shift>(a, groups[now ^ 1], 0, groups[now ^ 1].pixels);
  return m;
}

void dot(const DotArgs& a) {
  DotArgs rest = a;
  const auto with_settings = [&]<Weights W, bool Shift>() { return a.panels == 2 ? tiles<2, W, Shift>(a) : tiles<1, W, Shift>(a); };
  const auto with_weights = [&]<Weights W>() {
    return a.kds_shift ? with_settings.template operator()<W, true>() : with_settings.template operator()<W, false>();
  };
  if (a.pixels >= min_pixels(a)) {
    const int done = a.weights() == Weights::nibbles ? with_weights.template operator()<Weights::nibbles>()
                     : a.weights() == Weights::bytes ? with_weights.template operator()<Weights::bytes>()
                                                     : with_weights.template operator()<Weights::signed_bytes>();
    rest.row += done;
    rest.sums += done * kNR;
    rest.pixels -= done;
  }
  if (rest.pixels > 0) avx512vnni::kernels.dot(rest);
}

// A block of few octets would leave most of a tile empty.
void dot_one_block(const DotArgs& a, const EpilogueArgs& to) { avx512vnni::kernels.dot_one_block(a, to); }

}  // namespace

constinit const Kernels kernels{.isa = "amx",
                                .mr = 2 * kTileRows,
                                .task_pixels = 384,
                                .workspace_bytes = workspace_bytes,
                                .dot = dot,
                                .dot_one_block = dot_one_block,
                                .vector = x86_512::kernels};

}  // namespace dsconv::amx
