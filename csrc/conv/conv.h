// A whole convolution: quantizes the input, sums over it, writes the output.
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

  bool valid() const;  // sizes that make sense, agree, and do not overflow
  // A channel a group. Blocks run over the taps of a filter; those of one tap are flat blocks of one value.
  bool depthwise() const { return flat && groups > 1 && groups == channels; }
  std::int64_t positions() const { return kernel_h * kernel_w; }
  std::int64_t taps() const { return flat ? 1 : positions(); }
  std::int64_t depth() const { return channels / groups * (flat ? positions() : 1); }  // values in a row
  std::int64_t blocks() const { return (depth() + block_size - 1) / block_size; }
  std::int64_t last() const { return depth() - (blocks() - 1) * block_size; }
  std::int64_t octets() const { return block_size / 8; }
  std::int64_t last_octets() const { return (last() + 7) / 8; }
  std::int64_t row_octets() const { return (blocks() - 1) * octets() + last_octets(); }
  std::int64_t group_outputs() const { return outputs / groups; }
  std::int64_t pairs() const { return (group_outputs() + kPair - 1) / kPair; }  // of panels, in a group
  std::int64_t panel_bytes(bool wide) const { return taps() * row_octets() * (wide ? 128 : 64); }
  std::int64_t packed_bytes(bool wide) const {
    return depthwise() ? (positions() * outputs + kMaxLanes) * 4 : groups * pairs() * 2 * panel_bytes(wide);
  }
  std::int64_t kds_count() const {
    return depthwise() ? blocks() * outputs + kMaxLanes : groups * pairs() * taps() * blocks() * kPair;
  }
};

struct Operands {
  const float* input;            // (images, channels, height, width)
  Strides input_strides;
  const std::uint8_t* weight;    // packed
  const float* kds;              // packed
  const float* kds_shift;        // packed, or null
  const float* bias;             // (outputs,) or null
  const float* residual;         // of the strides of the output, or null
  float* output;                 // (images, outputs, out_height, out_width), x or channel of stride 1
  Strides output_strides;
  bool wide;                     // weights of more than 4 bits
  int activation_bits;
  Sign sign;
  Activation activation;
  float slope;                   // of a leaky ReLU
};

// vqk (outputs, channels / groups, kernel_h, kernel_w) to panels; wide where it has more than 4 bits.
void pack_weight(const Geometry&, const std::int8_t* vqk, int bits, std::uint8_t* packed);
// kds (outputs, blocks, taps) to [group][pair of panels][tap][block][kPair], so that a tile reads on and on
void pack_kds(const Geometry&, const float* kds, float* packed);

void convolve(const Geometry&, const Operands&, const Kernels&);

// What a 1x1 convolution makes of its input: mantissas (images, channels, pixels), and exponents (images, groups * blocks,
// pixels), which are -128 for a block that is not finite.
void quantize_activation(const Geometry&, const Operands&, const Kernels&, std::int8_t* mantissa, std::int8_t* exponent);

// Multiply-adds in a second that one thread reaches with everything in the first cache and one block: what no layer exceeds.
double peak_rate(const Kernels&, double seconds);

}  // namespace dsconv
