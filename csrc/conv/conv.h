// A whole convolution: quantizes the input, runs tiles over it, writes the output.
#pragma once

#include <cstdint>

#include "tile.h"

namespace dsconv {

// Where the values of a tensor lie: how far apart, in values, neighbours in each dimension are.
struct Strides {
  std::int64_t image, channel, y, x;
};

// Shape of a convolution; 1-D has height 1, a linear layer is a 1x1 convolution of one image that is a row of pixels.
struct Geometry {
  std::int64_t images, channels, height, width;
  std::int64_t outputs, out_height, out_width;
  std::int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  std::int64_t groups;
  std::int64_t block_size;
  bool flat;   // blocks run over the channels * taps of one output

  std::int64_t taps() const { return flat ? 1 : kernel_h * kernel_w; }
  std::int64_t depth() const { return channels / groups * (flat ? kernel_h * kernel_w : 1); }  // values in a row
  std::int64_t blocks() const { return (depth() + block_size - 1) / block_size; }
  std::int64_t last() const { return depth() - (blocks() - 1) * block_size; }
  std::int64_t octets() const { return block_size / 8; }
  std::int64_t last_octets() const { return (last() + 7) / 8; }
  std::int64_t row_octets() const { return (blocks() - 1) * octets() + last_octets(); }
  std::int64_t group_outputs() const { return outputs / groups; }
  bool valid() const;  // sizes that make sense, agree, and do not overflow
  std::int64_t pairs() const { return (group_outputs() + 2 * kPanel - 1) / (2 * kPanel); }  // of panels, in a group
  std::int64_t panel_bytes(bool wide) const { return taps() * row_octets() * (wide ? 128 : 64); }
  std::int64_t packed_bytes(bool wide) const { return groups * pairs() * 2 * panel_bytes(wide); }
  std::int64_t kds_stride() const { return pairs() * 2 * kPanel; }
  std::int64_t kds_count() const { return groups * taps() * blocks() * kds_stride(); }
};

struct Operands {
  const float* input;            // (images, channels, height, width)
  Strides input_strides;
  const std::uint8_t* weight;    // packed
  const float* kds;              // packed
  const float* kds_shift;        // packed, or null
  const float* bias;             // (outputs,) or null
  float* output;                 // (images, outputs, out_height, out_width)
  Strides output_strides;
  int zero;                      // what stands for 0 in the weights
  bool wide;
  int activation_bits, sign;
};

// vqk (outputs, channels / groups, kernel_h, kernel_w) to panels; wide where it has more than 4 bits.
void pack_weight(const Geometry&, const std::int8_t* vqk, int bits, std::uint8_t* packed);
// kds (outputs, blocks, taps) to [group][tap][block][kds_stride]
void pack_kds(const Geometry&, const float* kds, float* packed);

void convolve(const Geometry&, const Operands&, const Kernels&);

}  // namespace dsconv
