// Tensors of mantissas and block scales, in the layout of the dot products.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>

#include "sizes.h"

namespace dsconv {

// Rows of a group are contiguous; a row is a pixel of the padded image. The class does not own its memory.
class QuantizedTensor {
 public:
  static std::int64_t bytes(const ActivationFormat&, const PaddedGrid&);

  QuantizedTensor() = default;
  QuantizedTensor(const ActivationFormat&, const PaddedGrid&, std::byte* memory);  // aligned to 64

  const ActivationFormat& format() const { return format_; }
  const PaddedGrid& grid() const { return grid_; }
  QuantizedRows of_group(std::int64_t group) const;
  // Returns the row of a pixel of an image; (0, 0) is the first pixel inside the border.
  std::int64_t row(std::int64_t image, std::int64_t y, std::int64_t x) const {
    return image * grid_.image() + (grid_.pad_h + y) * grid_.line() + grid_.pad_w + x;
  }
  // Writes the rows of consecutive pixels, across lines and images.
  void rows_of(std::int64_t first_pixel, std::int64_t pixels, std::int64_t* row) const;
  // Must be called before channels, which are whole blocks, are quantized. Fills the border with zeros for the first
  // channel.
  void begin(std::int64_t first, std::int64_t channels) const;

 private:
  void fill_borders() const;
  void fill_zero(const QuantizedRows&, std::int64_t row, std::int64_t count) const;

  ActivationFormat format_{};
  PaddedGrid grid_{};
  QuantizedRows rows_{};
};

// Writes the offsets of consecutive pixels, across lines and images: within a line they begin at of_line(image, y, x)
// and have stride `stride`.
template <class OfLine>
void pixel_offsets(std::int64_t first, std::int64_t pixels, std::int64_t height, std::int64_t width, std::int64_t stride,
                   OfLine of_line, std::int64_t* to) {
  if (!pixels) return;  // images may have none
  std::int64_t image = first / width / height, y = first / width % height, x = first % width;
  for (std::int64_t p = 0; p < pixels; ++y, x = 0) {  // a line, or the rest of it
    if (y == height) y = 0, ++image;
    const std::int64_t stop = std::min(pixels, p + width - x);
    for (std::int64_t at = of_line(image, y, x); p < stop; ++p, at += stride) to[p] = at;
  }
}

// Returns 2^e of a block; NaN if the block is not finite.
inline float exact_scale(const BlockScale& block, bool int_acc) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(block.scale);
  return std::bit_cast<float>(int_acc || bits == kNanBits ? bits : bits - (kMagicBits - kOneBits));
}

// The pixels of a tensor that receive outputs: one of every `frames` images, and there every n-th line and pixel, from
// given offsets.
struct Lattice {
  std::int64_t frames = 1, frame = 0, y = 0, x = 0, step_y = 1, step_x = 1;
};

// A quantized tensor that receives the channels of another tensor, starting at its channel `first`.
struct QuantizedTarget {
  QuantizedTensor tensor;
  std::int64_t first;
};

// Returns one block of a group, for the pixels with these rows.
QuantizeArgs quantize_args(const QuantizedTensor& to, std::int64_t group, std::int64_t block, const std::int64_t* row,
                           std::int64_t pixels);

// Quantizes channels `from` to `to`, whole blocks of the target, of the pixels with these rows. The channels of pixel i
// are contiguous and start at values[i * stride] with channel `from`.
void quantize_into(const QuantizedTarget&, const Kernels&, const float* values, std::int64_t stride, const std::int64_t* row,
                   std::int64_t pixels, std::int64_t from, std::int64_t to);

// The same for consecutive pixels, across images.
void quantize_into(const QuantizedTarget&, const Kernels&, const float* values, std::int64_t stride, std::int64_t first_pixel,
                   std::int64_t pixels, std::int64_t from, std::int64_t to);

// Quantizes a tensor with any strides into all of `to`, and fills the border. Each image of the tensor consists of this
// many images of `to`, its frames, whose lines are consecutive.
void quantize(const QuantizedTensor& to, const Kernels&, const float* from, const Strides&, std::int64_t frames = 1);

}  // namespace dsconv
