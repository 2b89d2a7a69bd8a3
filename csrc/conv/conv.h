// A whole convolution: quantizes the input, sums over it, writes the output.
#pragma once

#include <cstdint>
#include <span>

#include "quantized.h"
#include "tile.h"

namespace dsconv {

// Shape of a convolution; 1-D has height 1, a linear layer is a 1x1 convolution of one image that is a row of pixels.
struct Geometry {
  std::int64_t images, channels, height, width;
  std::int64_t outputs, out_height, out_width;
  std::int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  std::int64_t groups;
  std::int64_t block_size;
  bool flat;  // blocks run over the channels * taps of one output

  bool valid() const;  // sizes that make sense, agree, and do not overflow
  // A channel a group. Blocks run over the taps of a filter; those of one tap are flat blocks of one value.
  bool depthwise() const { return flat && groups > 1 && groups == channels; }
  std::int64_t positions() const { return kernel_h * kernel_w; }
  std::int64_t taps() const { return flat ? 1 : positions(); }
  std::int64_t pixels() const { return images * out_height * out_width; }
  Cut cut() const { return {channels / groups * (flat ? positions() : 1), block_size}; }
  // What its quantized input needs to hold, but for flattened blocks.
  Grid grid() const { return {images, height, width, pad_h, pad_w}; }
  std::int64_t group_outputs() const { return outputs / groups; }
  std::int64_t pairs() const { return (group_outputs() + kPair - 1) / kPair; }  // of panels, in a group
  std::int64_t panel_bytes(bool wide) const { return taps() * cut().row_octets() * (wide ? 128 : 64); }
  std::int64_t packed_bytes(bool wide) const {
    return depthwise() ? (positions() * outputs + kMaxLanes) * 4 : groups * pairs() * 2 * panel_bytes(wide);
  }
  std::int64_t kds_count() const {
    return depthwise() ? cut().blocks() * outputs + kMaxLanes : groups * pairs() * taps() * cut().blocks() * kPair;
  }
};

struct Layer {
  const std::uint8_t* weight;  // packed
  const float* kds;            // packed
  const float* kds_shift;      // packed, or null
  Terms terms;
  bool wide;  // weights of more than 4 bits
  int bits;   // of its activations
  Sign sign;
  Activation activation;
  float slope;  // of a leaky ReLU

  Format format(const Geometry& g) const { return {g.cut(), g.groups, bits, sign, wide, kds_shift != nullptr}; }
};

// A float tensor: an input (images, channels, height, width), or outputs, where x or channel has stride 1.
struct Input {
  const float* values;
  Strides strides;
};
struct Output {
  float* values;  // null where only targets are wanted
  Strides strides;
  Input residual;                   // its values may be null; channels as far apart as those of the output
  std::span<const Target> targets;  // whole blocks of which are made of the outputs
};

// vqk (outputs, channels / groups, kernel_h, kernel_w) to panels; wide where it has more than 4 bits.
void pack_weight(const Geometry&, const std::int8_t* vqk, int bits, std::uint8_t* packed);
// kds (outputs, blocks, taps) to [group][pair of panels][tap][block][kPair], so that a tile reads on and on
void pack_kds(const Geometry&, const float* kds, float* packed);

// From float to float.
void convolve(const Geometry&, const Layer&, const Kernels&, const Input&, const Output&);
// Of an input that is quantized already, in a border at least as wide as the padding; not for flattened blocks.
void convolve(const Geometry&, const Layer&, const Kernels&, const Quantized& input, const Output&);
void convolve_depthwise(const Geometry&, const Layer&, const Kernels&, const Input&, const Output&);

// What a 1x1 convolution makes of its input: mantissas (images, channels, pixels), and exponents (images, groups * blocks,
// pixels), which are -128 for a block that is not finite.
void quantize_activation(const Geometry&, const Layer&, const Kernels&, const Input&, std::int8_t* mantissa, std::int8_t* exponent);

// Multiply-adds in a second that one thread reaches with everything in the first cache and one block: what no layer exceeds.
double peak_rate(const Kernels&, double seconds);

}  // namespace dsconv
