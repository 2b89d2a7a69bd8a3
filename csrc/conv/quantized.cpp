#include "quantized.h"

#include <algorithm>
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

Block block_of(const Quantized& to, std::int64_t group, std::int64_t index, const std::int64_t* row, std::int64_t pixels) {
  const Format& f = to.format();
  return {static_cast<int>(f.cut.size(index)),
          f.bits,
          f.sign,
          row,
          static_cast<int>(pixels),
          to.of_group(group),
          static_cast<int>(index),
          index * f.cut.block_size};
}

bool Format::operator==(const Format& other) const {
  return cut.depth == other.cut.depth && cut.block_size == other.cut.block_size && groups == other.groups && bits == other.bits &&
         sign == other.sign && wide == other.wide && shift == other.shift;
}

std::int64_t Quantized::bytes(const Format& f, const Grid& grid) {
  const std::int64_t rows = f.groups * grid.rows();
  return padded<std::int8_t>(rows * f.cut.row_octets() * 8 + kSlack) + padded<Ends>(rows * f.cut.blocks()) +
         padded<std::uint8_t>(f.groups * f.cut.blocks()) + (f.shift ? padded<float>(rows * f.cut.blocks()) : 0);
}

Quantized::Quantized(const Format& f, const Grid& grid, std::byte* memory) : format_(f), grid_(grid) {
  const std::int64_t rows = f.groups * grid.rows(), blocks = f.cut.blocks();
  const auto take = [&](std::int64_t bytes) { return std::exchange(memory, memory + bytes); };
  rows_.row_bytes = f.cut.row_octets() * 8;
  rows_.mantissa = reinterpret_cast<std::int8_t*>(take(padded<std::int8_t>(rows * rows_.row_bytes + kSlack)));
  rows_.ends = reinterpret_cast<Ends*>(take(padded<Ends>(rows * blocks)));
  rows_.beyond = reinterpret_cast<std::uint8_t*>(take(padded<std::uint8_t>(f.groups * blocks)));
  rows_.shifted = f.shift ? reinterpret_cast<float*>(memory) : nullptr;
  rows_.blocks = static_cast<int>(blocks);
  rows_.wide = f.wide;
  rows_.factors = f.factors();
}

Rows Quantized::of_group(std::int64_t group) const {
  Rows r = rows_;
  const std::int64_t first = group * grid_.rows();
  r.mantissa += first * r.row_bytes;
  r.ends += first * r.blocks;
  r.beyond += group * r.blocks;
  if (r.shifted) r.shifted += first * r.blocks;
  return r;
}

void Quantized::blank(const Rows& r, std::int64_t row, std::int64_t count) const {
  std::memset(r.mantissa + row * r.row_bytes, 0, count * r.row_bytes);
  const std::uint32_t end = r.factors ? kOne : kOneAndHalf, start = r.factors ? 0 : end;
  std::fill_n(r.ends + row * r.blocks, count * r.blocks, Ends{static_cast<std::int32_t>(start), std::bit_cast<float>(end)});
  if (r.shifted) std::fill_n(r.shifted + row * r.blocks, count * r.blocks, 0.0f);
}

void Quantized::begin(std::int64_t first, std::int64_t channels) const {
  const auto block = [this](std::int64_t channel) {
    return channel / format_.cut.depth * rows_.blocks + channel % format_.cut.depth / format_.cut.block_size;
  };
  if (channels > 0) std::fill(rows_.beyond + block(first), rows_.beyond + block(first + channels - 1) + 1, 0);
  if (first == 0) fill_borders();
}

void Quantized::fill_borders() const {
  const auto [images, height, width, pad_h, pad_w] = grid_;
  std::memset(rows_.mantissa + format_.groups * grid_.rows() * rows_.row_bytes, 0, kSlack);
  if ((!pad_h && !pad_w) || (!pad_h && !height)) return;
  const std::int64_t line = grid_.line();
  parallel(format_.groups * images, [&](std::int64_t task) {
    const Rows r = of_group(task / images);
    const std::int64_t first = task % images * grid_.image();
    // Down the sides, the end of a line and the beginning of the next lie together.
    blank(r, first, pad_h * line + pad_w);
    for (std::int64_t y = 0; y + 1 < height; ++y) blank(r, first + (pad_h + y + 1) * line - pad_w, 2 * pad_w);
    blank(r, first + (pad_h + height) * line - pad_w, pad_w + pad_h * line);
  });
}

void Quantized::rows_of(std::int64_t first_pixel, std::int64_t pixels, std::int64_t* to) const {
  const auto of_line = [this](std::int64_t image, std::int64_t y, std::int64_t x) { return row(image, y, x); };
  places_of(first_pixel, pixels, grid_.height, grid_.width, 1, of_line, to);
}

void quantize_into(const Target& target, const Kernels& kernels, const float* values, std::int64_t stride, const std::int64_t* row,
                   std::int64_t pixels, std::int64_t from, std::int64_t to) {
  const Cut& cut = target.quantized.format().cut;
  for (std::int64_t channel = target.first + from; channel < target.first + to;) {
    const std::int64_t group = channel / cut.depth, index = channel % cut.depth / cut.block_size;
    kernels.quantize_channels(block_of(target.quantized, group, index, row, pixels), values + (channel - target.first - from),
                              stride);
    channel += cut.size(index);
  }
}

void quantize_into(const Target& target, const Kernels& kernels, const float* values, std::int64_t stride, std::int64_t first_pixel,
                   std::int64_t pixels, std::int64_t from, std::int64_t to) {
  std::int64_t row[kMaxTask];
  for (std::int64_t done = 0; done < pixels; done += kMaxTask) {
    const std::int64_t now = std::min<std::int64_t>(kMaxTask, pixels - done);
    target.quantized.rows_of(first_pixel + done, now, row);
    quantize_into(target, kernels, values + done * stride, stride, row, now, from, to);
  }
}

void quantize(const Quantized& to, const Kernels& kernels, const float* from, const Strides& s) {
  const auto [images, height, width, pad_h, pad_w] = to.grid();
  const Cut& cut = to.format().cut;
  to.begin(0, to.format().groups * cut.depth);
  // A task is some hundred pixels: lines, or a part of one. Those that do not lie side by side are copied first, fewer at a time.
  const bool dense = s.channel == 1 || (s.x == 1 && s.y == width);
  const std::int64_t most = dense ? 256 : 128, columns = std::clamp<std::int64_t>(width, 1, most);
  const std::int64_t lines = width > most ? 1 : std::clamp<std::int64_t>(most / columns, 1, std::max<std::int64_t>(1, height));
  const std::int64_t across = (width + columns - 1) / columns, down = (height + lines - 1) / lines;
  parallel(to.format().groups * images * down * across, [&](std::int64_t task) {
    const std::int64_t left = task % across * columns, top = task / across % down * lines;
    const std::int64_t image = task / across / down % images, group = task / across / down / images;
    const std::int64_t wide = std::min(width - left, columns), count = std::min(height - top, lines);
    const float* values = from + image * s.image + group * cut.depth * s.channel + top * s.y + left * s.x;
    const std::int64_t first = (image * height + top) * width + left, pixels = count * wide;
    if (s.channel == 1) {
      const std::int64_t run = s.y == wide * s.x ? count : 1;
      for (std::int64_t y = 0; y < count; y += run)
        quantize_into({to, group * cut.depth}, kernels, values + y * s.y, s.x, first + y * width, run * wide, 0, cut.depth);
      return;
    }
    const bool copy = !dense || pixels < kernels.lanes;
    const std::int64_t room = (pixels + kMaxLanes - 1) / kMaxLanes * kMaxLanes;
    struct User;
    using Mine = Scratch<User>;
    Mine scratch(Mine::template size<std::int64_t>(pixels) + Mine::template size<float>(copy ? cut.block_size * room : 0));
    std::int64_t* const row = scratch.template take<std::int64_t>(pixels);
    float* const copied = scratch.template take<float>(0);
    to.rows_of(first, pixels, row);
    for (std::int64_t b = 0; b < cut.blocks(); ++b) {
      const float* channel[kMaxBlock];
      for (std::int64_t c = 0; c < cut.size(b); ++c) {
        const float* const line = values + (b * cut.block_size + c) * s.channel;
        channel[c] = copy ? copied + c * room : line;
        if (!copy) continue;
        for (std::int64_t y = 0; y < count; ++y) {
          const float* const from = line + y * s.y;
          float* const into = copied + c * room + y * wide;
          if (s.x == 2)
            for (std::int64_t x = 0; x < wide; ++x) into[x] = from[2 * x];
          else
            for (std::int64_t x = 0; x < wide; ++x) into[x] = from[x * s.x];
        }
        std::fill(copied + c * room + pixels, copied + (c + 1) * room, 0.0f);
      }
      kernels.quantize_pixels(block_of(to, group, b, row, pixels), channel, 0);
    }
  });
}

}  // namespace dsconv
