#include "quantized.h"

#include <cstring>
#include <utility>

#include "../parallel.h"
#include "../scratch.h"

namespace dsconv {
namespace {

template <class T>
std::int64_t padded(std::int64_t count) {
  return Scratch<void>::size<T>(count);
}

}  // namespace

QuantizeArgs quantize_args(const QuantizedTensor& to, std::int64_t group, std::int64_t block, const std::int64_t* row,
                           std::int64_t pixels) {
  const ActivationFormat& f = to.format();
  QuantizeArgs a{};
  a.channels = static_cast<int>(f.layout.size(block)), a.bits = f.bits, a.sign = f.sign;
  a.row = row, a.pixels = static_cast<int>(pixels);
  a.rows = to.of_group(group), a.block = static_cast<int>(block), a.first_byte = block * f.layout.block_size;
  return a;
}

std::int64_t QuantizedTensor::bytes(const ActivationFormat& f, const PaddedGrid& grid) {
  const std::int64_t rows = f.groups * grid.rows(), blocks = f.layout.blocks();
  return padded<std::int8_t>(rows * f.layout.row_octets() * 8 + kReadPastEnd) + padded<BlockScale>(rows * blocks) +
         padded<std::uint8_t>(f.groups * blocks) + (f.shift ? padded<float>(rows * blocks) : 0);
}

QuantizedTensor::QuantizedTensor(const ActivationFormat& f, const PaddedGrid& grid, std::byte* memory) : format_(f), grid_(grid) {
  const std::int64_t rows = f.groups * grid.rows(), blocks = f.layout.blocks();
  const auto take = [&](std::int64_t bytes) { return std::exchange(memory, memory + bytes); };
  rows_.row_bytes = f.layout.row_octets() * 8;
  rows_.mantissa = reinterpret_cast<std::int8_t*>(take(padded<std::int8_t>(rows * rows_.row_bytes + kReadPastEnd)));
  rows_.scale = reinterpret_cast<BlockScale*>(take(padded<BlockScale>(rows * blocks)));
  rows_.overflow = reinterpret_cast<std::uint8_t*>(take(padded<std::uint8_t>(f.groups * blocks)));
  rows_.shift_term = f.shift ? reinterpret_cast<float*>(memory) : nullptr;
  rows_.blocks = static_cast<int>(blocks);
  rows_.wide = f.wide;
  rows_.int_acc = f.int_acc();
}

QuantizedRows QuantizedTensor::of_group(std::int64_t group) const {
  QuantizedRows r = rows_;
  const std::int64_t first = group * grid_.rows();
  r.mantissa += first * r.row_bytes;
  r.scale += first * r.blocks;
  r.overflow += group * r.blocks;
  if (r.shift_term) r.shift_term += first * r.blocks;
  return r;
}

void QuantizedTensor::fill_zero(const QuantizedRows& r, std::int64_t row, std::int64_t count) const {
  std::memset(r.mantissa + row * r.row_bytes, 0, count * r.row_bytes);
  const std::uint32_t scale = r.int_acc ? kOneBits : kMagicBits, init = r.int_acc ? 0 : scale;
  const BlockScale zero{static_cast<std::int32_t>(init), std::bit_cast<float>(scale)};
  std::fill_n(r.scale + row * r.blocks, count * r.blocks, zero);
  if (r.shift_term) std::fill_n(r.shift_term + row * r.blocks, count * r.blocks, 0.0f);
}

void QuantizedTensor::begin(std::int64_t first, std::int64_t channels) const {
  const auto block = [this](std::int64_t channel) {
    return channel / format_.layout.depth * rows_.blocks + channel % format_.layout.depth / format_.layout.block_size;
  };
  if (channels > 0) std::fill(rows_.overflow + block(first), rows_.overflow + block(first + channels - 1) + 1, 0);
  if (first == 0) fill_borders();
}

void QuantizedTensor::fill_borders() const {
  const auto [images, height, width, pad_h, pad_w] = grid_;
  std::memset(rows_.mantissa + format_.groups * grid_.rows() * rows_.row_bytes, 0, kReadPastEnd);
  if ((!pad_h && !pad_w) || (!pad_h && !height)) return;
  const std::int64_t line = grid_.line();
  parallel(format_.groups * images, [&](std::int64_t task) {
    const QuantizedRows r = of_group(task / images);
    const std::int64_t first = task % images * grid_.image();
    // At the left and right borders, the end of a line and the beginning of the next are contiguous.
    fill_zero(r, first, pad_h * line + pad_w);
    for (std::int64_t y = 0; y + 1 < height; ++y) fill_zero(r, first + (pad_h + y + 1) * line - pad_w, 2 * pad_w);
    fill_zero(r, first + (pad_h + height) * line - pad_w, pad_w + pad_h * line);
  });
}

void QuantizedTensor::rows_of(std::int64_t first_pixel, std::int64_t pixels, std::int64_t* to) const {
  const auto of_line = [this](std::int64_t image, std::int64_t y, std::int64_t x) { return row(image, y, x); };
  pixel_offsets(first_pixel, pixels, grid_.height, grid_.width, 1, of_line, to);
}

void quantize_into(const QuantizedTarget& target, const Kernels& kernels, const float* values, std::int64_t stride,
                   const std::int64_t* row, std::int64_t pixels, std::int64_t from, std::int64_t to) {
  const BlockLayout& layout = target.tensor.format().layout;
  for (std::int64_t channel = target.first + from; channel < target.first + to;) {
    const std::int64_t group = channel / layout.depth, block = channel % layout.depth / layout.block_size;
    kernels.vector.quantize_nhwc(quantize_args(target.tensor, group, block, row, pixels), values + (channel - target.first - from),
                                 stride);
    channel += layout.size(block);
  }
}

void quantize_into(const QuantizedTarget& target, const Kernels& kernels, const float* values, std::int64_t stride,
                   std::int64_t first_pixel, std::int64_t pixels, std::int64_t from, std::int64_t to) {
  std::int64_t row[kMaxTaskPixels];
  for (std::int64_t done = 0; done < pixels; done += kMaxTaskPixels) {
    const std::int64_t now = std::min<std::int64_t>(kMaxTaskPixels, pixels - done);
    target.tensor.rows_of(first_pixel + done, now, row);
    quantize_into(target, kernels, values + done * stride, stride, row, now, from, to);
  }
}

namespace {

// Part of an image: `height` lines of `width` pixels, and the index of the first pixel.
struct Patch {
  std::int64_t group, first_pixel, height, width;
};

void copy_line(const float* from, std::int64_t stride, std::int64_t count, float* to) {
  if (stride == 2)
    for (std::int64_t x = 0; x < count; ++x) to[x] = from[2 * x];
  else
    for (std::int64_t x = 0; x < count; ++x) to[x] = from[x * stride];
}

// Quantizes a patch whose channels are not contiguous. Strided pixels, or fewer than a vector, are copied first.
void quantize_planes(const QuantizedTensor& to, const Kernels& kernels, const float* values, const Strides& s, bool contiguous,
                     const Patch& patch) {
  const BlockLayout& layout = to.format().layout;
  const std::int64_t pixels = patch.height * patch.width;
  const bool copy = !contiguous || pixels < kernels.vector.lanes;
  const std::int64_t room = ceil_div(pixels, kMaxLanes) * kMaxLanes;
  struct User;
  using Mine = Scratch<User>;
  Mine scratch(Mine::size<std::int64_t>(pixels) + Mine::size<float>(copy ? layout.block_size * room : 0));
  std::int64_t* const row = scratch.take<std::int64_t>(pixels);
  float* const copied = scratch.take<float>(0);
  to.rows_of(patch.first_pixel, pixels, row);
  for (std::int64_t b = 0; b < layout.blocks(); ++b) {
    const float* channel[kMaxBlockSize];
    for (std::int64_t c = 0; c < layout.size(b); ++c) {
      const float* const plane = values + (b * layout.block_size + c) * s.channel;
      channel[c] = copy ? copied + c * room : plane;
      if (!copy) continue;
      for (std::int64_t y = 0; y < patch.height; ++y)
        copy_line(plane + y * s.y, s.x, patch.width, copied + c * room + y * patch.width);
      std::fill(copied + c * room + pixels, copied + (c + 1) * room, 0.0f);
    }
    kernels.vector.quantize_nchw(quantize_args(to, patch.group, b, row, pixels), channel, 0);
  }
}

}  // namespace

void quantize(const QuantizedTensor& to, const Kernels& kernels, const float* from, const Strides& s, std::int64_t frames) {
  const auto [images, height, width, pad_h, pad_w] = to.grid();
  const std::int64_t depth = to.format().layout.depth;
  to.begin(0, to.format().groups * depth);
  // A task is a few hundred pixels: lines, or a part of one; fewer if they are copied.
  const bool contiguous = s.channel == 1 || (s.x == 1 && s.y == width);
  const std::int64_t most = contiguous ? 256 : 128, columns = std::clamp<std::int64_t>(width, 1, most);
  const std::int64_t lines = width > most ? 1 : std::clamp<std::int64_t>(most / columns, 1, std::max<std::int64_t>(1, height));
  const std::int64_t across = ceil_div(width, columns), down = ceil_div(height, lines);
  parallel(to.format().groups * images * down * across, [&](std::int64_t task) {
    const std::int64_t left = task % across * columns, top = task / across % down * lines;
    const std::int64_t image = task / across / down % images, group = task / across / down / images;
    const std::int64_t line = image % frames * height + top;
    const float* values = from + image / frames * s.image + group * depth * s.channel + line * s.y + left * s.x;
    const Patch patch{group, (image * height + top) * width + left, std::min(height - top, lines), std::min(width - left, columns)};
    if (s.channel != 1) return quantize_planes(to, kernels, values, s, contiguous, patch);
    const std::int64_t run = s.y == patch.width * s.x ? patch.height : 1;
    for (std::int64_t y = 0; y < patch.height; y += run)
      quantize_into({to, group * depth}, kernels, values + y * s.y, s.x, patch.first_pixel + y * width, run * patch.width, 0,
                    depth);
  });
}

}  // namespace dsconv
