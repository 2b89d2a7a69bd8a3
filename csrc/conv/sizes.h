// Sizes of convolutions and of quantized tensors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../kernels/kernels.h"

namespace dsconv {

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// The strides of a tensor, in values.
struct Strides {
  std::int64_t image, channel, y, x;
};

// Division of consecutive values into blocks, and of blocks into octets.
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

// The format in which a layer reads its input: groups of values of a pixel, each in blocks.
struct ActivationFormat {
  BlockLayout layout;  // of a group
  std::int64_t groups;
  int bits;
  Sign sign;
  bool wide;   // weights
  bool shift;  // the layer has one

  // |S| can reach 2^22.
  bool int_acc() const { return wide && layout.block_size * kWideZeroPoint * max_mantissa(bits) >= 1 << 22; }
  bool operator==(const ActivationFormat&) const = default;
};

// Pixels of some images, each with a border of zeros.
struct PaddedGrid {
  std::int64_t images, height, width, pad_h, pad_w;

  std::int64_t line() const { return width + 2 * pad_w; }
  std::int64_t image() const { return (height + 2 * pad_h) * line(); }
  std::int64_t rows() const { return images * image(); }
};

// One dimension of a convolution. In a transposed one, outputs at a distance of `stride` have the same taps: they form a
// phase. Otherwise all outputs form one phase.
struct Axis {
  std::int64_t size, out, kernel, stride, pad, dilation;
  bool transposed;

  std::int64_t phases() const { return transposed ? std::min(stride, out) : 1; }
  std::int64_t outputs(std::int64_t phase) const { return transposed ? ceil_div(out - phase, stride) : out; }
  std::int64_t output_step() const { return transposed ? stride : 1; }  // distance between outputs of a phase
  std::int64_t input_step() const { return transposed ? 1 : stride; }   // corresponding distance in the input
  // Taps with the same key belong to the same phase. They are consecutive in packed weights.
  std::int64_t key(std::int64_t tap) const { return transposed ? tap * dilation % stride : 0; }
  std::int64_t key_of(std::int64_t phase) const { return transposed ? (phase + pad) % stride : 0; }
  // Returns the input index that the first output of a phase reads at one of its taps.
  std::int64_t place(std::int64_t phase, std::int64_t tap) const {
    return transposed ? (phase + pad - tap * dilation) / stride : tap * dilation - pad;
  }
  std::int64_t border() const {  // zeros on both sides that outputs read
    if (!transposed) return pad;
    return std::max({std::int64_t{0}, ((kernel - 1) * dilation - pad) / stride, (out - 1 + pad) / stride - (size - 1)});
  }
};

// 1-D has height 1, 2-D has depth 1; a linear layer is a 1x1 convolution of one image with one row of pixels. A 3-D image
// consists of `depth` frames, stacked vertically.
struct ConvSizes {
  std::int64_t images, channels, height, width;
  std::int64_t outputs, out_height, out_width;
  std::int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  std::int64_t groups;
  std::int64_t block_size;
  bool flat;      // blocks span the channels * taps of one output
  bool winograd;  // for 3x3 kernels with stride 1; its products replace taps
  bool transposed = false;
  bool volume = false;  // 3-D
  std::int64_t depth = 1, out_depth = 1, kernel_d = 1, stride_d = 1, pad_d = 0, dilation_d = 1;

  bool operator==(const ConvSizes&) const = default;
  bool valid() const;  // sizes are in range, agree, and do not overflow
  // One input channel per group. Blocks span the taps of a filter; blocks of one tap are flat blocks of one value.
  bool depthwise() const { return flat && groups > 1 && groups == channels && !volume; }
  // Depthwise with one block per filter: its activations may stay float.
  bool takes_floats() const { return depthwise() && layout().blocks() == 1; }
  Axis axis_d() const { return {depth, out_depth, kernel_d, stride_d, pad_d, dilation_d, transposed}; }
  Axis axis_h() const { return {height, out_height, kernel_h, stride_h, pad_h, dilation_h, transposed}; }
  Axis axis_w() const { return {width, out_width, kernel_w, stride_w, pad_w, dilation_w, transposed}; }
  std::int64_t kernel_size() const { return kernel_d * kernel_h * kernel_w; }
  std::int64_t taps() const { return flat ? 1 : winograd ? kWinogradProducts : kernel_size(); }
  std::int64_t pixels() const { return images * out_depth * out_height * out_width; }
  BlockLayout layout() const { return {channels / groups * (flat ? kernel_size() : 1), block_size}; }
  PaddedGrid grid() const {  // of a quantized input, unless blocks are flat
    return {images * depth, height, width, axis_h().border(), axis_w().border()};
  }
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
