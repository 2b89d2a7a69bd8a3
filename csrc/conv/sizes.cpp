#include "sizes.h"

#include <initializer_list>

namespace dsconv {
namespace {

constexpr std::int64_t kMaxSize = std::int64_t{1} << 31;
constexpr double kMaxValues = 1e15;  // in a tensor

// Whether the number of outputs matches the other sizes, and all are within range.
bool agree(const Axis& a) {
  for (const std::int64_t size : {a.size, a.out, a.pad})
    if (size < 0 || size > kMaxSize) return false;
  for (const std::int64_t size : {a.kernel, a.stride, a.dilation})
    if (size < 1 || size > kMaxSize) return false;
  const std::int64_t span = a.dilation * (a.kernel - 1) + 1;
  if (!a.transposed) {
    const std::int64_t room = a.size + 2 * a.pad - span;
    return room >= 0 && room / a.stride + 1 == a.out;
  }
  // The input size does not determine the outputs in the last stride.
  const std::int64_t more = a.out - ((a.size - 1) * a.stride - 2 * a.pad + span);
  return a.size >= 1 && a.out >= 1 && more >= 0 && more < std::max(a.stride, a.dilation);
}

}  // namespace

bool ConvSizes::valid() const {
  const Axis axes[] = {axis_d(), axis_h(), axis_w()};
  for (const Axis& axis : axes)
    if (!agree(axis)) return false;
  if (images < 0 || images > kMaxSize) return false;
  for (const std::int64_t size : {groups, block_size, channels, outputs})
    if (size < 1 || size > kMaxSize) return false;
  // Sizes in bytes must not overflow 64 bits.
  const auto size = [](auto... factors) { return (1.0 * ... * static_cast<double>(factors)); };
  double padded = 1.0, taps_read = 1.0, made = size(images), taps = 1.0;
  for (const Axis& axis : axes) {
    padded *= static_cast<double>(axis.size + 2 * axis.border());
    taps_read *= size(axis.kernel, axis.dilation), taps *= size(axis.kernel), made *= size(axis.out);
  }
  if (size(images, channels) * padded > kMaxValues || made * size(outputs) > kMaxValues ||
      made * size(channels) * taps > kMaxValues || padded * taps_read > kMaxValues ||
      size(outputs + kNR * groups, channels + block_size * groups) * taps > kMaxValues)
    return false;
  if (!volume && (depth != 1 || out_depth != 1 || kernel_d != 1 || stride_d != 1 || pad_d != 0 || dilation_d != 1)) return false;
  if (transposed && (flat || winograd)) return false;
  const bool square = kernel_h == 3 && kernel_w == 3 && stride_h == 1 && stride_w == 1 && dilation_h == 1 && dilation_w == 1;
  if (winograd && (!square || groups != 1 || flat || volume)) return false;
  // Up to this block size |S| fits in 24 bits, and every sum in 32.
  return channels % groups == 0 && outputs % groups == 0 && (block_size % 8 == 0 || depthwise()) && block_size <= kMaxBlockSize;
}

}  // namespace dsconv
