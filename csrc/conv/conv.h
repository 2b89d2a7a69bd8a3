// A complete convolution: quantizes the input, computes dot products, and applies the epilogue.
#pragma once

#include <cstdint>
#include <span>

#include "quantized.h"
#include "sizes.h"

namespace dsconv {

struct Layer {
  const std::uint8_t* weight;  // packed
  const float* kds;            // packed
  const float* kds_shift;      // packed, or null
  PostOps post;
  bool wide;            // weights of more than 4 bits
  int activation_bits;  // of its input
  Sign sign;            // of its input

  ActivationFormat format(const ConvSizes& g) const {
    return {g.layout(), g.groups, activation_bits, sign, wide, kds_shift != nullptr};
  }
};

// A float tensor: an input (images, channels, height, width), or outputs, where x or channel has stride 1.
struct Input {
  const float* values;
  Strides strides;
};
struct Output {
  float* values;  // null where only targets are written
  Strides strides;
  Input residual;                            // its values may be null; its channel stride is that of the output
  std::span<const QuantizedTarget> targets;  // the outputs fill whole blocks of them
  Lattice lattice{};                         // of the targets
};

// Packs vqk (outputs, channels / groups, taps) into consecutive panels, wide if it has more than 4 bits; for Winograd
// into pairs of panels, product by product, followed by the sums of DotArgs.
void pack_weight(const ConvSizes&, const std::int8_t* vqk, int bits, std::uint8_t* packed);
// Packs kds (outputs, blocks, taps) into [group][pair of panels][tap][block][kNR], so that tiles read it sequentially.
void pack_kds(const ConvSizes&, const float* kds, float* packed);

// Convolves from float to float.
void convolve(const ConvSizes&, const Layer&, const Kernels&, const Input&, const Output&);
// Convolves a quantized input whose border is at least as wide as the padding; flattened blocks are not supported.
void convolve(const ConvSizes&, const Layer&, const Kernels&, const QuantizedTensor& input, const Output&);
// Convolves by Winograd; the weights are wide, and the KDS shift is that of the centre.
void convolve_winograd(const ConvSizes&, const Layer&, const Kernels&, const Input&, const Output&);
// Convolves with flattened blocks, in two dimensions and in three.
void convolve_flat(const ConvSizes&, const Layer&, const Kernels&, const Input&, const Output&);
void convolve_flat_frames(const ConvSizes&, const Layer&, const Kernels&, const Input&, const Output&);
void convolve_depthwise(const ConvSizes&, const Layer&, const Kernels&, const Input&, const Output&);

// Convolves with a first layer and then with a depthwise one of float activations, a few lines at a time: the intermediate
// lines stay in cache (joined.h).
struct FirstLayer;
void convolve_joined(const FirstLayer&, const ConvSizes&, const Layer&, const Kernels&, const Output&);

// Flattened blocks: quantizes the windows of some lines of outputs, from line `top` on, into consecutive rows.
void quantize_windows(const ConvSizes&, const QuantizedTensor& to, const Kernels&, const Input&, std::int64_t group,
                      std::int64_t image, std::int64_t top, std::int64_t count);

// Quantizes the input of a 1x1 convolution to mantissas (images, channels, pixels) and exponents (images, groups *
// blocks, pixels), which are -128 for a block that is not finite.
void quantize_activation(const ConvSizes&, const Layer&, const Kernels&, const Input&, std::int8_t* mantissa,
                         std::int8_t* exponent);

// Returns the multiply-adds per second that one thread reaches with one block and all data in the L1 cache: an upper
// bound for layers.
double peak_rate(const Kernels&, double seconds);

}  // namespace dsconv
