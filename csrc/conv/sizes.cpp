#include "sizes.h"

#include <initializer_list>

namespace dsconv {
namespace {

constexpr std::int64_t kMaxSize = std::int64_t{1} << 31;
constexpr double kMaxValues = 1e15;  // of a tensor

}  // namespace

bool ConvSizes::valid() const {
  for (const std::int64_t size : {images, channels, height, width, outputs, out_height, out_width, pad_h, pad_w})
    if (size < 0 || size > kMaxSize) return false;
  for (const std::int64_t size :
       {kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, groups, block_size, channels, outputs})
    if (size < 1 || size > kMaxSize) return false;
  const auto out = [](std::int64_t n, std::int64_t pad, std::int64_t dilation, std::int64_t kernel, std::int64_t stride) {
    const std::int64_t room = n + 2 * pad - dilation * (kernel - 1) - 1;
    return room < 0 ? -1 : room / stride + 1;
  };
  // No size in bytes comes near the end of 64 bits.
  const auto size = [](auto... factors) { return (1.0 * ... * static_cast<double>(factors)); };
  const double padded = size(height + 2 * pad_h, width + 2 * pad_w), taps_read = size(kernel_h, kernel_w, dilation_h, dilation_w);
  if (size(images, channels, padded) > kMaxValues || size(images, out_height, out_width, outputs) > kMaxValues ||
      size(images, out_height, out_width, channels, kernel_h, kernel_w) > kMaxValues || padded * taps_read > kMaxValues ||
      size(outputs + kNR * groups, channels + block_size * groups, kernel_h, kernel_w) > kMaxValues)
    return false;
  const bool square = kernel_h == 3 && kernel_w == 3 && stride_h == 1 && stride_w == 1 && dilation_h == 1 && dilation_w == 1;
  if (winograd && (!square || groups != 1 || flat)) return false;
  // |S| stays within 24 bits, and with it every sum within 32, up to this block size.
  return channels % groups == 0 && outputs % groups == 0 && (block_size % 8 == 0 || depthwise()) && block_size <= kMaxBlockSize &&
         out(height, pad_h, dilation_h, kernel_h, stride_h) == out_height &&
         out(width, pad_w, dilation_w, kernel_w, stride_w) == out_width;
}

}  // namespace dsconv
