// A tensor of mantissas and exponents, as the sums read it.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>

#include "tile.h"

namespace dsconv {

// Where the values of a tensor lie: how far apart, in values, neighbours in each dimension are.
struct Strides {
  std::int64_t image, channel, y, x;
};

// A run of values cut into blocks, and these into octets.
struct Cut {
  std::int64_t depth, block_size;

  std::int64_t blocks() const { return (depth + block_size - 1) / block_size; }
  std::int64_t last() const { return depth - (blocks() - 1) * block_size; }
  std::int64_t size(std::int64_t block) const { return block + 1 < blocks() ? block_size : last(); }
  std::int64_t octets() const { return block_size / 8; }
  std::int64_t last_octets() const { return (last() + 7) / 8; }
  std::int64_t row_octets() const { return (blocks() - 1) * octets() + last_octets(); }
};

// How a layer wants its input: the values of a pixel in groups, each of them cut up.
struct Format {
  Cut cut;
  std::int64_t groups;
  int bits;
  Sign sign;
  bool wide;   // whether its weights are
  bool shift;  // whether it has one

  // Whether ends are factors: whether |S| can come to 2^22.
  bool factors() const { return wide && cut.block_size * kWideZero * largest_mantissa(bits) >= 1 << 22; }
  bool operator==(const Format&) const;
};

// Pixels of some images, with a border of zeros around each.
struct Grid {
  std::int64_t images, height, width, pad_h, pad_w;

  std::int64_t line() const { return width + 2 * pad_w; }
  std::int64_t image() const { return (height + 2 * pad_h) * line(); }
  std::int64_t rows() const { return images * image(); }
};

// Rows of a group lie together; a row is a pixel of the bordered image. Does not own its memory.
class Quantized {
 public:
  static std::int64_t bytes(const Format&, const Grid&);

  Quantized() = default;
  Quantized(const Format&, const Grid&, std::byte* memory);  // aligned to 64

  const Format& format() const { return format_; }
  const Grid& grid() const { return grid_; }
  Rows of_group(std::int64_t group) const;
  // Of a pixel of an image, counted from the border's inner edge.
  std::int64_t row(std::int64_t image, std::int64_t y, std::int64_t x) const {
    return image * grid_.image() + (grid_.pad_h + y) * grid_.line() + grid_.pad_w + x;
  }
  // Of neighbouring pixels, from line to line and from image to image.
  void rows_of(std::int64_t first_pixel, std::int64_t pixels, std::int64_t* row) const;
  // To be called before channels are quantized, from the first of a block to the last of one. Where the first channel is among
  // them, the border is filled.
  void begin(std::int64_t first, std::int64_t channels) const;

 private:
  void fill_borders() const;
  void blank(const Rows&, std::int64_t row, std::int64_t count) const;

  Format format_{};
  Grid grid_{};
  Rows rows_{};
};

// Where neighbouring pixels of images of this size lie, from line to line and from image to image: those of a line `apart` one
// behind the other from of_line(image, y, x) on.
template <class OfLine>
void places_of(std::int64_t first, std::int64_t pixels, std::int64_t height, std::int64_t width, std::int64_t apart, OfLine of_line,
               std::int64_t* to) {
  if (!pixels) return;  // of an image without any, perhaps
  std::int64_t image = first / width / height, y = first / width % height, x = first % width;
  for (std::int64_t p = 0; p < pixels; ++y, x = 0) {  // a line, or what is left of it
    if (y == height) y = 0, ++image;
    const std::int64_t stop = std::min(pixels, p + width - x);
    for (std::int64_t at = of_line(image, y, x); p < stop; ++p, at += apart) to[p] = at;
  }
}

// 2^e of a block, NaN where it is not finite.
inline float scale_of(const Ends& ends, bool factors) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(ends.end);
  return std::bit_cast<float>(factors || bits == kNaN ? bits : bits - (kOneAndHalf - kOne));
}

// The quantized tensors that channels of a tensor go to as well: its first channel is `first` there.
struct Target {
  Quantized quantized;
  std::int64_t first;
};

// One block of a group, of the pixels that have these rows.
Block block_of(const Quantized& to, std::int64_t group, std::int64_t index, const std::int64_t* row, std::int64_t pixels);

// Quantizes channels `from` to `to`, whole blocks of the target, of the pixels that have these rows: the channels of a pixel lie
// side by side from values[i * stride] on, where that of channel `from` is.
void quantize_into(const Target&, const Kernels&, const float* values, std::int64_t stride, const std::int64_t* row,
                   std::int64_t pixels, std::int64_t from, std::int64_t to);

// The same of neighbouring pixels, of all images one after another.
void quantize_into(const Target&, const Kernels&, const float* values, std::int64_t stride, std::int64_t first_pixel,
                   std::int64_t pixels, std::int64_t from, std::int64_t to);

// Quantizes a tensor of any strides into all of `to`, without its border.
void quantize(const Quantized& to, const Kernels&, const float* from, const Strides&);

}  // namespace dsconv
