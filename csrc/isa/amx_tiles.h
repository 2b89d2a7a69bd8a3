// The tile instructions of AMX: eight registers of up to 16 rows of 64 bytes. Tile numbers are literals. With
// DSCONV_EMULATE_AMX they are plain C++ that aborts where the processor would fault, so that tests need no AMX.
#pragma once

#include <cstdint>

#ifdef DSCONV_EMULATE_AMX
#include <cstdio>
#include <cstdlib>
#include <cstring>
#else
#include <immintrin.h>
#endif

namespace dsconv::amx {

struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};  // of each tile; a tile without rows cannot be used
  std::uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

}  // namespace dsconv::amx

#ifdef DSCONV_EMULATE_AMX

namespace dsconv::amx::emulated {

constexpr int kTiles = 8, kTileRows = 16, kRowBytes = 64;

struct Tiles {
  bool configured = false;
  TileConfig config;
  std::int8_t byte[kTiles][kTileRows][kRowBytes];
};
inline thread_local Tiles tiles;

inline void require(bool met, const char* what) {
  if (met) return;
  std::fprintf(stderr, "tiles: %s\n", what);
  std::abort();
}

inline int rows(int tile) {
  require(tiles.configured && tiles.config.rows[tile] > 0, "use of a tile that is not configured");
  return tiles.config.rows[tile];
}
inline int row_bytes(int tile) {
  rows(tile);
  return tiles.config.row_bytes[tile];
}

inline void configure(const TileConfig& c) {
  require(reinterpret_cast<std::uintptr_t>(&c) % alignof(TileConfig) == 0, "configuration is not aligned");
  require(c.palette == 1 && c.start_row == 0, "palette or first row");
  for (const std::uint8_t byte : c.reserved) require(byte == 0, "reserved bytes are not zero");
  for (int i = 0; i < 16; ++i) {
    require(c.rows[i] <= (i < kTiles ? kTileRows : 0), "too many rows");
    require(c.row_bytes[i] <= (i < kTiles ? kRowBytes : 0), "rows too long");
    require((c.rows[i] == 0) == (c.row_bytes[i] == 0), "rows without bytes, or bytes without rows");
  }
  tiles.configured = true;
  tiles.config = c;
  std::memset(tiles.byte, 0, sizeof tiles.byte);
}

inline void release() { tiles.configured = false; }

inline void zero(int tile) {
  rows(tile);
  std::memset(tiles.byte[tile], 0, sizeof tiles.byte[tile]);
}

inline void load(int tile, const void* from, std::int64_t stride) {
  zero(tile);
  for (int i = 0; i < rows(tile); ++i)
    std::memcpy(tiles.byte[tile][i], static_cast<const char*>(from) + i * stride, row_bytes(tile));
}

inline void store(int tile, void* to, std::int64_t stride) {
  for (int i = 0; i < rows(tile); ++i) std::memcpy(static_cast<char*>(to) + i * stride, tiles.byte[tile][i], row_bytes(tile));
}

inline void dot(int c, int a, int b) {
  require(c != a && c != b && a != b, "the same tile twice");
  require(row_bytes(c) % 4 == 0 && row_bytes(a) % 4 == 0 && row_bytes(b) % 4 == 0, "row of no whole words");
  require(rows(c) == rows(a) && row_bytes(c) == row_bytes(b) && row_bytes(a) / 4 == rows(b), "shapes do not fit");
  for (int m = 0; m < rows(c); ++m)
    for (int n = 0; n < row_bytes(c) / 4; ++n) {
      std::int32_t sum;
      std::memcpy(&sum, &tiles.byte[c][m][4 * n], 4);
      for (int k = 0; k < row_bytes(a); ++k) sum += tiles.byte[a][m][k] * tiles.byte[b][k / 4][4 * n + k % 4];
      std::memcpy(&tiles.byte[c][m][4 * n], &sum, 4);
    }
}

}  // namespace dsconv::amx::emulated

#define TILE_CONFIGURE(config) ::dsconv::amx::emulated::configure(config)
#define TILE_RELEASE() ::dsconv::amx::emulated::release()
#define TILE_ZERO(tile) ::dsconv::amx::emulated::zero(tile)
#define TILE_LOAD(tile, from, stride) ::dsconv::amx::emulated::load(tile, from, stride)
#define TILE_STORE(tile, to, stride) ::dsconv::amx::emulated::store(tile, to, stride)
#define TILE_DOT(c, a, b) ::dsconv::amx::emulated::dot(c, a, b)

#else

// Compilers do not know all memory that these instructions read: GCC 12 assumes that a tile load reads nothing and that
// a configuration reads 8 bytes. A compiler barrier keeps earlier stores before them and later ones after them.
#define TILE_READS(from) __asm__ volatile("" : : "r"(from) : "memory")
#define TILE_CONFIGURE(config)   \
  do {                           \
    TILE_READS(&(config));       \
    _tile_loadconfig(&(config)); \
    TILE_READS(&(config));       \
  } while (0)
#define TILE_RELEASE() _tile_release()
#define TILE_ZERO(tile) _tile_zero(tile)
#define TILE_LOAD(tile, from, stride)     \
  do {                                    \
    const void* const tile_from = (from); \
    TILE_READS(tile_from);                \
    _tile_loadd(tile, tile_from, stride); \
    TILE_READS(tile_from);                \
  } while (0)
#define TILE_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#define TILE_DOT(c, a, b) _tile_dpbssd(c, a, b)  // c += a * b, of signed bytes

#endif
