// Sizes of convolutions and of quantized tensors.
#pragma once

#include <cstdint>

#include "../kernels/kernels.h"

namespace dsconv {

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// The distance in values between neighbours in each dimension of a tensor.
struct Strides {
  std::int64_t image, channel, y, x;
};

// A run of values in blocks, and these in octets.
struct BlockLayout {
  std::int64_t depth, block_size;

  std::int64_t blocks() const { return ceil_div(depth, block_size); }
  std::int64_t last_size() const { return depth - (blocks() - 1) * block_size; }
  std::int64_t size(std::int64_t block) const { return block + 1 < blocks() ? block_size : last_size(); }
  std::int64_t octets() const { return block_size / 8; }
  std::int64_t last_octets() const { return (last_size() + 7) / 8; }
  std::int64_t row_octets() const { return (blocks() - 1) * octets() + last_octets(); }
  bool operator==(const BlockLayout&) const = default;
};

// The form in which a layer reads its input: groups of values of a pixel, each in blocks.
struct ActivationFormat {
  BlockLayout layout;  // of a group
  std::int64_t groups;
  int bits;
  Sign sign;
  bool wide;   // weights
  bool shift;  // the layer has one

  // |S| can come to 2^22.
  bool int_acc() const { return wide && layout.block_size * kWideZeroPoint * max_mantissa(bits) >= 1 << 22; }
  bool operator==(const ActivationFormat&) const = default;
};

// Pixels of some images, with a border of zeros around each.
struct PaddedGrid {
  std::int64_t images, height, width, pad_h, pad_w;

  std::int64_t line() const { return width + 2 * pad_w; }
  std::int64_t image() const { return (height + 2 * pad_h) * line(); }
  std::int64_t rows() const { return images * image(); }
};

// 1-D has height 1; a linear layer is a 1x1 convolution of one image that is a row of pixels.
struct ConvSizes {
  std::int64_t images, channels, height, width;
  std::int64_t outputs, out_height, out_width;
  std::int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  std::int64_t groups;
  std::int64_t block_size;
  bool flat;      // blocks run over the channels * taps of one output
  bool winograd;  // of 3x3 and stride 1; its products take the place of taps

  bool operator==(const ConvSizes&) const = default;
  bool valid() const;  // sizes are in range, agree, and do not overflow
  // One input channel per group. Blocks run over the taps of a filter; blocks of one tap are flat blocks of one value.
  bool depthwise() const { return flat && groups > 1 && groups == channels; }
  // Depthwise with one block a filter: its activations may stay float.
  bool takes_floats() const { return depthwise() && layout().blocks() == 1; }
  std::int64_t kernel_size() const { return kernel_h * kernel_w; }
  std::int64_t taps() const { return flat ? 1 : winograd ? kWinogradProducts : kernel_size(); }
  std::int64_t pixels() const { return images * out_height * out_width; }
  BlockLayout layout() const { return {channels / groups * (flat ? kernel_size() : 1), block_size}; }
  PaddedGrid grid() const { return {images, height, width, pad_h, pad_w}; }  // of a quantized input, unless blocks are flat
  std::int64_t group_outputs() const { return outputs / groups; }
  std::int64_t panel_pairs() const { return ceil_div(group_outputs(), kNR); }  // of a group
  std::int64_t panel_bytes(bool wide) const { return taps() * layout().row_octets() * (wide ? 128 : 64); }
  std::int64_t packed_bytes(bool wide) const {
    if (depthwise()) return (kernel_size() * outputs + kMaxLanes) * 4;
    return panels_bytes(wide) + (winograd ? kds_count() * 4 : 0);  // and the sums of DotArgs
  }
  std::int64_t panels_bytes(bool wide) const { return groups * panel_pairs() * 2 * panel_bytes(wide); }
  std::int64_t kds_count() const {
    return depthwise() ? layout().blocks() * outputs + kMaxLanes : groups * panel_pairs() * taps() * layout().blocks() * kNR;
  }
};

}  // namespace dsconv
