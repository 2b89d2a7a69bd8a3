// Tensors of mantissas and block scales, as dot products read them.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>

#include "sizes.h"

namespace dsconv {

// Rows of a group are contiguous; a row is a pixel of the bordered image. Does not own its memory.
class QuantizedTensor {
 public:
  static std::int64_t bytes(const ActivationFormat&, const PaddedGrid&);

  QuantizedTensor() = default;
  QuantizedTensor(const ActivationFormat&, const PaddedGrid&, std::byte* memory);  // aligned to 64

  const ActivationFormat& format() const { return format_; }
  const PaddedGrid& grid() const { return grid_; }
  QuantizedRows of_group(std::int64_t group) const;
  // Returns the row of a pixel of an image, counted from the border's inner edge.
  std::int64_t row(std::int64_t image, std::int64_t y, std::int64_t x) const {
    return image * grid_.image() + (grid_.pad_h + y) * grid_.line() + grid_.pad_w + x;
  }
  // Writes the rows of neighbouring pixels, from line to line and from image to image.
  void rows_of(std::int64_t first_pixel, std::int64_t pixels, std::int64_t* row) const;
  // Must be called before channels are quantized, from the first of a block to the last of one. Fills the border for
  // the first channel.
  void begin(std::int64_t first, std::int64_t channels) const;

 private:
  void fill_borders() const;
  void fill_zero(const QuantizedRows&, std::int64_t row, std::int64_t count) const;

  ActivationFormat format_{};
  PaddedGrid grid_{};
  QuantizedRows rows_{};
};

// Writes the offsets of neighbouring pixels, from line to line and from image to image: those of a line lie `stride`
// apart, from of_line(image, y, x) on.
template <class OfLine>
void pixel_offsets(std::int64_t first, std::int64_t pixels, std::int64_t height, std::int64_t width, std::int64_t stride,
                   OfLine of_line, std::int64_t* to) {
  if (!pixels) return;  // images may have none
  std::int64_t image = first / width / height, y = first / width % height, x = first % width;
  for (std::int64_t p = 0; p < pixels; ++y, x = 0) {  // a line, or what is left of it
    if (y == height) y = 0, ++image;
    const std::int64_t stop = std::min(pixels, p + width - x);
    for (std::int64_t at = of_line(image, y, x); p < stop; ++p, at += stride) to[p] = at;
  }
}

// Returns 2^e of a block, NaN where it is not finite.
inline float exact_scale(const BlockScale& block, bool int_acc) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(block.scale);
  return std::bit_cast<float>(int_acc || bits == kNanBits ? bits : bits - (kMagicBits - kOneBits));
}

// The pixels of a tensor that outputs become: of every `frames` images one, and there of every so many lines and pixels
// one, from these on.
struct Lattice {
  std::int64_t frames = 1, frame = 0, y = 0, x = 0, step_y = 1, step_x = 1;
};

// A quantized tensor that receives channels of another tensor, the first one as its channel `first`.
struct QuantizedTarget {
  QuantizedTensor tensor;
  std::int64_t first;
};

// Returns one block of a group, of the pixels that have these rows.
QuantizeArgs quantize_args(const QuantizedTensor& to, std::int64_t group, std::int64_t block, const std::int64_t* row,
                           std::int64_t pixels);

// Quantizes channels `from` to `to`, whole blocks of the target, of the pixels that have these rows. The channels of a
// pixel are contiguous from values[i * stride] on, where channel `from` lies.
void quantize_into(const QuantizedTarget&, const Kernels&, const float* values, std::int64_t stride, const std::int64_t* row,
                   std::int64_t pixels, std::int64_t from, std::int64_t to);

// The same of neighbouring pixels, of all images one after another.
void quantize_into(const QuantizedTarget&, const Kernels&, const float* values, std::int64_t stride, std::int64_t first_pixel,
                   std::int64_t pixels, std::int64_t from, std::int64_t to);

// Quantizes a tensor of any strides into the whole of `to`, and fills the border. So many images of `to` are the frames of
// one of the tensor, the lines of one after those of another.
void quantize(const QuantizedTensor& to, const Kernels&, const float* from, const Strides&, std::int64_t frames = 1);

}  // namespace dsconv
