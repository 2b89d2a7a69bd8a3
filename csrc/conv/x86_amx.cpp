#include <immintrin.h>

#include "amx_tiles.h"
#include "x86_vectors.h"

namespace dsconv::avx512vnni {
void sum(const Sums&);
}

namespace dsconv::amx {

using namespace x86_512;

constexpr int kTileRows = 16;
constexpr int kFewest = 8;  // pixels that are worth tiles, and a run of them that is worth a tile of its own
constexpr int kGroup = 3;   // blocks scaled at once: their outputs are loaded and stored once

// The workspace: stored sums of two groups, pixels gathered to the rows of two tiles, unpacked weights.
constexpr std::int64_t kBlockSums = 2 * kTileRows * kPair;
constexpr std::int64_t kSumsBytes = 2 * kGroup * kBlockSums * 4;
constexpr std::int64_t kTileBytes = kTileRows * 64;
constexpr std::int64_t kOctetBytes = 8 * kPanel;  // of unpacked weights

// How many octets a product of tiles takes, and into how many products a block is cut. Zero weights fill up the last.
struct Depth {
  int octets, steps, last_steps;
  std::int64_t panel_bytes;

  inline explicit Depth(const Sums& t) {
    const int most = t.rows.blocks > 1 ? t.octets : t.last_octets;
    steps = (most + 7) / 8;
    octets = (most + steps - 1) / steps;
    last_steps = (t.last_octets + octets - 1) / octets;
    panel_bytes = kOctetBytes * octets * t.taps * (std::int64_t{steps} * (t.rows.blocks - 1) + last_steps);
  }
};

static std::int64_t workspace(const Sums& t) { return kSumsBytes + 2 * kTileBytes + t.panels * Depth(t).panel_bytes; }

// Weights to signed bytes: in each row of 64 bytes four values of 16 outputs.
template <bool Wide>
static void unpack(const Sums& t, const Depth& depth, std::int8_t* to) {
  const __m512i low = _mm512_set1_epi8(15), zero = _mm512_set1_epi8(static_cast<char>(Wide ? kWideZero : kZero));
  for (int p = 0; p < t.panels; ++p) {
    const std::uint8_t* w = t.weight + p * t.panel_bytes;
    for (int k = 0; k < t.taps; ++k)
      for (int b = 0; b < t.rows.blocks; ++b) {
        const bool last = b + 1 == t.rows.blocks;
        const int octets = last ? t.last_octets : t.octets;
        const int filled = (last ? depth.last_steps : depth.steps) * depth.octets;
        for (int o = 0; o < octets; ++o, w += Wide ? 128 : 64, to += kOctetBytes) {
          __m512i first = _mm512_loadu_si512(w), second;
          if constexpr (Wide) {
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

// The pixels of one tile. Those at a constant distance are loaded where they lie, others are gathered.
struct Pixels {
  int count = 0;
  bool gathered;
  std::int64_t stride;                // in bytes
  const std::int8_t* row[kTileRows];  // the first alone where none is gathered
  std::int8_t* copy;

  inline void take(const Sums& t, int from) {
    const int left = t.pixels - from;
    const std::int64_t* pixel = t.pixel + from;
    int run = left < 2 ? left : 2;
    while (run < left && run < 2 * kTileRows && pixel[run] - pixel[run - 1] == pixel[1] - pixel[0]) ++run;
    gathered = run < left && run < kFewest;
    if (gathered) count = left < kTileRows ? left : kTileRows;
    else  // two tiles of nearly the same height rather than a full one and a low one
      count = run <= kTileRows ? run : run < 2 * kTileRows ? (run + 1) / 2 : kTileRows;
    stride = gathered ? 64 : count > 1 ? (pixel[1] - pixel[0]) * t.rows.row_bytes : 0;
    for (int m = 0; m < (gathered ? count : count > 0); ++m) row[m] = t.rows.mantissa + pixel[m] * t.rows.row_bytes;
  }
};

[[gnu::noinline]] static const std::int8_t* gather(const Pixels& p, std::int64_t at) {
  for (int m = 0; m < p.count; ++m) _mm512_store_si512(p.copy + 64 * m, _mm512_loadu_si512(p.row[m] + at));
  return p.copy;
}
static inline const std::int8_t* rows_from(const Pixels& p, std::int64_t at) { return p.gathered ? gather(p, at) : p.row[0] + at; }

// Tiles 0 and 1 are sums of the first pixels, a panel each, 2 and 3 of the second; 4 and 5 pixels, 6 and 7 weights.
static void configure(const Pixels* pixels, const Depth& depth) {
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

// Leaves the sums of one block in tiles. The rows of pixels are read from `at` on.
template <int P>
[[gnu::noinline]] static void multiply(const Pixels* pixels, std::int64_t at, const std::int8_t* w, const Depth& depth, int steps) {
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
static inline void store_sums(const Pixels* pixels, std::int32_t* sums) {
  TILE_STORE(0, sums, kPair * 4);
  if constexpr (P == 2) TILE_STORE(1, sums + kPanel, kPair * 4);
  if (pixels[1].count > 0) {
    sums += pixels[0].count * kPair;
    TILE_STORE(2, sums, kPair * 4);
    if constexpr (P == 2) TILE_STORE(3, sums + kPanel, kPair * 4);
  }
}

// Blocks whose sums are stored, one after another, and what makes outputs of them.
struct Group {
  int blocks, pixels;
  bool first;  // of its outputs, which hold nothing yet
  const std::int64_t* pixel;
  float* output;
  const float* kds;
  const float* kds_shift;
  std::int64_t block[kGroup];  // where its scale is, from that of the pixel
  std::int32_t* sums;
};

// S * 2^e, of a tile's sums, which start at zero.
template <bool Factors>
static inline __m512 scaled(__m512i s, const Ends& ends) {
  const __m512 end = _mm512_set1_ps(ends.end);
  if constexpr (Factors) return _mm512_mul_ps(_mm512_cvtepi32_ps(s), end);
  return _mm512_sub_ps(_mm512_castsi512_ps(_mm512_add_epi32(s, _mm512_castps_si512(end))), end);
}

template <int N, int P, bool Factors, bool Shift>
static void scale_blocks(const Sums& t, const Group& g, int from, int to) {
  __m512 kds[N][P], shift[N][P];
  const Ends* ends[N];
  const float* shifted[N];
  for (int n = 0; n < N; ++n) {
    ends[n] = t.rows.ends + g.block[n];
    if constexpr (Shift) shifted[n] = t.rows.shifted + g.block[n];
    for (int p = 0; p < P; ++p) {
      kds[n][p] = _mm512_loadu_ps(g.kds + n * kPair + p * kPanel);
      if constexpr (Shift) shift[n][p] = _mm512_loadu_ps(g.kds_shift + n * kPair + p * kPanel);
    }
  }
  const std::int64_t* pixel = g.pixel;
  const std::int64_t blocks = t.rows.blocks;
  const bool first = g.first;
  const std::int32_t* s = g.sums + from * kPair;
  float* output = g.output + from * kPair;
  for (int m = from; m < to; ++m, s += kPair, output += kPair) {
    const std::int64_t at = pixel[m] * blocks;
    __m512 y[P];
    for (int p = 0; p < P; ++p) y[p] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(output + p * kPanel);
    for (int n = 0; n < N; ++n) {
      for (int p = 0; p < P; ++p) {
        const __m512 term = scaled<Factors>(_mm512_load_si512(s + n * kBlockSums + p * kPanel), ends[n][at]);
        y[p] = _mm512_fmadd_ps(kds[n][p], term, y[p]);
      }
      if constexpr (Shift) {
        const __m512 term = _mm512_set1_ps(shifted[n][at]);
        for (int p = 0; p < P; ++p) y[p] = _mm512_fmadd_ps(shift[n][p], term, y[p]);
      }
    }
    for (int p = 0; p < P; ++p) _mm512_storeu_ps(output + p * kPanel, y[p]);
  }
}

template <int P, bool Wide, bool Shift>
static inline void scale_group(const Sums& t, const Group& g, int from, int to) {
  static_assert(kGroup == 3);
  if (from == to) return;
  const auto of_ends = [&]<bool Factors>() {
    if (g.blocks == 3) scale_blocks<3, P, Factors, Shift>(t, g, from, to);
    else g.blocks == 2 ? scale_blocks<2, P, Factors, Shift>(t, g, from, to) : scale_blocks<1, P, Factors, Shift>(t, g, from, to);
  };
  Wide&& t.rows.factors ? of_ends.template operator()<true>() : of_ends.template operator()<false>();
}

// Returns how many pixels are done.
template <int P, bool Wide, bool Shift>
static int tiles(const Sums& t) {
  const Depth depth(t);
  std::int8_t* const copies = reinterpret_cast<std::int8_t*>(t.workspace + kSumsBytes);
  std::int8_t* const weight = copies + 2 * kTileBytes;
  unpack<Wide>(t, depth, weight);

  Pixels pixels[2];
  for (int i = 0; i < 2; ++i) pixels[i].copy = copies + i * kTileBytes;
  // While tiles multiply a block of one group, vectors scale a part of the group before. Sums are stored only then, so
  // that nothing waits for a product that is not ready.
  Group groups[2];
  for (int i = 0; i < 2; ++i) groups[i].sums = reinterpret_cast<std::int32_t*>(t.workspace) + i * kGroup * kBlockSums;
  groups[1].pixels = 0;
  int now = 0, m = 0;
  while (t.pixels - m >= kFewest) {
    const int before[2] = {pixels[0].count, pixels[1].count};
    pixels[0].take(t, m);
    pixels[1].take(t, m + pixels[0].count);
    if (pixels[0].count != before[0] || pixels[1].count != before[1]) configure(pixels, depth);

    const std::int8_t* w = weight;
    std::int64_t at = t.tap[0] * t.rows.row_bytes;
    const int total = t.taps * t.rows.blocks;
    for (int done = 0, k = 0, b = 0; done < total; now ^= 1) {
      Group& g = groups[now];
      const Group& last = groups[now ^ 1];
      g.blocks = total - done < kGroup ? total - done : kGroup;
      g.pixels = pixels[0].count + pixels[1].count;
      g.first = done == 0;
      g.pixel = t.pixel + m;
      g.output = t.output + m * kPair;
      g.kds = t.kds + done * kPair;
      if constexpr (Shift) g.kds_shift = t.kds_shift + done * kPair;
      for (int n = 0, scaled = 0; n < g.blocks; ++n, ++done) {
        const bool end = b + 1 == t.rows.blocks;
        const int steps = end ? depth.last_steps : depth.steps;
        g.block[n] = t.tap[k] * t.rows.blocks + b;
        multiply<P>(pixels, at, w, depth, steps);
        const int part = last.pixels * (n + 1) / g.blocks;
        scale_group<P, Wide, Shift>(t, last, scaled, part);
        scaled = part;
        store_sums<P>(pixels, g.sums + n * kBlockSums);
        w += steps * depth.octets * kOctetBytes;
        at += 8 * t.octets;
        ++b;
        if (end && ++k < t.taps) {
          b = 0;
          at = t.tap[k] * t.rows.row_bytes;
        }
      }
    }
    m += pixels[0].count + pixels[1].count;
  }
  TILE_RELEASE();  // others may use tiles on this thread
  scale_group<P, Wide, Shift>(t, groups[now ^ 1], 0, groups[now ^ 1].pixels);
  return m;
}

template <bool Wide, bool Shift>
static int panels(const Sums& t) {
  return t.panels == 2 ? tiles<2, Wide, Shift>(t) : tiles<1, Wide, Shift>(t);
}

template <bool Wide>
static int tiles(const Sums& t) {
  return t.kds_shift ? panels<Wide, true>(t) : panels<Wide, false>(t);
}

static void sum(const Sums& t) {
  Sums rest = t;
  if (t.pixels >= kFewest) {
    const int done = t.rows.wide ? tiles<true>(t) : tiles<false>(t);
    rest.pixel += done;
    rest.output += done * kPair;
    rest.pixels -= done;
  }
  if (rest.pixels > 0) avx512vnni::sum(rest);
}

extern const Kernels kernels;
const Kernels kernels{"amx",     kWidth,         32,  384,  workspace, quantize_pixels, quantize_channels, sum, store, store_block,
                      depthwise, depthwise_line, map, pool, average};

}  // namespace dsconv::amx
