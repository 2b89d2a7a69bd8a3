// The two pieces of work that an instruction set does its own way. Both are stateless: they allocate nothing, start no
// thread and know no image. Where a pixel lies is given by offsets, so that padding, stride, dilation and groups are the
// caller's business.
#pragma once

#include <cstdint>

namespace dsconv {

inline constexpr int kPanel = 16;    // outputs that a packed row of weights holds
inline constexpr int kPixels = 6;    // output pixels in a tile, at most
inline constexpr int kLanes = 16;    // pixels that are quantized together

// The sums of up to kPixels output pixels times two panels of outputs, over all taps and blocks.
struct Tile {
  // Input: one row of mantissas for each pixel of the bordered image, and for each of its blocks 2^e (NaN where the block
  // is not finite) and the sum of the mantissas.
  const std::int8_t* mantissa;
  const float* scale;
  const std::int32_t* sum;
  std::int64_t row_bytes;
  int blocks;
  int octets, last_octets;    // groups of eight values in a block, and in the last one

  // Weights of the first panel and how far the second is. They are unsigned, `zero` stands for 0: a nibble each in narrow
  // weights, a byte in wide ones.
  const std::uint8_t* weight;
  std::int64_t panel_bytes;
  int zero;
  bool wide;
  const float* kds;           // [taps * blocks][kds_stride]
  const float* kds_shift;     // the same, or null
  std::int64_t kds_stride;

  const std::int64_t* pixel;  // where each output pixel reads its first tap, in rows
  const std::int64_t* tap;    // how much further each tap is, in rows
  int taps;

  float* output;              // [kPixels][2 * kPanel]
};

// One block of activations for kLanes pixels: values[c][lane] to mantissas, written to output + lane * row_bytes + c.
struct Block {
  const float* values;
  int channels;
  int bits;
  int sign;                   // 0 adaptive, 1 extra, 2 included
  std::int8_t* output;
  std::int64_t row_bytes;
  int lanes;                  // of which only the first so many are written
  float* scale;               // + lane * block_stride
  std::int32_t* sum;
  std::int64_t block_stride;
};

struct Kernels {
  const char* isa;
  void (*tile)(const Tile&, int pixels);
  void (*quantize)(const Block&);
};

}  // namespace dsconv
