#include "conv.h"

#include <algorithm>
#include <numeric>

#include "../parallel.h"
#include "../scratch.h"
#include "dot_tasks.h"
#include "line_buffer.h"
#include "parts.h"

namespace dsconv {
namespace {

constexpr std::int64_t kTasks = 32;      // enough to balance the threads
constexpr std::int64_t kWindows = 1024;  // outputs per task, which quantizes their windows

}  // namespace

void quantize_windows(const ConvSizes& g, const QuantizedTensor& to, const Kernels& kernels, const Input& input, std::int64_t group,
                      std::int64_t image, std::int64_t top, std::int64_t count) {
  const BlockLayout layout = g.layout();
  const std::int64_t channels = g.channels / g.groups;
  struct User;
  using Mine = Scratch<User>;
  Mine scratch(Mine::size<const float*>(layout.depth) + Mine::size<std::int64_t>(count * g.out_width) +
               LineBuffer::bytes(g, channels, count));
  const float** const channel = scratch.take<const float*>(layout.depth);
  std::int64_t* const row = scratch.take<std::int64_t>(count * g.out_width);
  std::iota(row, row + count * g.out_width, 0);
  LineBuffer lines(g, channels, count, scratch.take<float>(0));
  lines.read(input.values + image * input.strides.image + group * channels * input.strides.channel, input.strides, top);
  for (std::int64_t c = 0; c < layout.depth; ++c) channel[c] = lines.at(c);
  for (std::int64_t y = 0; y < count; ++y)
    for (std::int64_t b = 0; b < layout.blocks(); ++b)
      kernels.vector.quantize_nchw(quantize_args(to, 0, b, row + y * g.out_width, g.out_width), channel + b * layout.block_size,
                                   y * lines.next_line());
}

// A task quantizes its windows, and computes their dot products while they are in cache.
void convolve_flat(const ConvSizes& g, const Layer& l, const Kernels& kernels, const Input& input, const Output& o) {
  static constexpr std::int64_t kTap[] = {0};
  const DotTasks tasks(g, l, kernels, o, kTap);
  // Lines with a few hundred outputs, whose input is rearranged once; fewer if there are too few lines to balance the
  // threads.
  const std::int64_t width = std::max<std::int64_t>(1, g.out_width), lines = std::max<std::int64_t>(1, g.out_height);
  const std::int64_t most = std::max<std::int64_t>(1, kWindows / width), shared = g.groups * g.images * lines / (kTasks / 2);
  const std::int64_t least = std::min(most, ceil_div(kernels.task_pixels, width));
  const std::int64_t together = std::min(lines, std::clamp(shared, least, most)), parts = ceil_div(lines, together);
  ActivationFormat format = l.format(g);
  format.groups = 1;
  parallel(g.groups * g.images * parts, [&](std::int64_t task) {
    const std::int64_t part = task % parts, image = task / parts % g.images, group = task / parts / g.images;
    const std::int64_t top = part * together, count = std::min(together, g.out_height - top);
    const PaddedGrid grid{1, count, g.out_width, 0, 0};
    struct User;
    Scratch<User> scratch(QuantizedTensor::bytes(format, grid));
    const QuantizedTensor q(format, grid, scratch.template take<std::byte>(0));
    q.begin(0, format.layout.depth);
    quantize_windows(g, q, kernels, input, group, image, top, count);
    const std::int64_t begin = (image * g.out_height + top) * g.out_width, end = begin + count * g.out_width;
    const auto row_of = [&](std::int64_t i, std::int64_t y, std::int64_t x) {
      return (i * g.out_height + y) * g.out_width + x - begin;
    };
    for (std::int64_t first = begin; first < end; first += kernels.task_pixels)
      tasks.run(q.of_group(0), row_of, 1, group, first, std::min(end, first + kernels.task_pixels), 0, tasks.units);
  });
}

void convolve(const ConvSizes& g, const Layer& l, const Kernels& kernels, const QuantizedTensor& q, const Output& o) {
  const Parts parts(g, q.grid(), o);
  const Part first_part = parts.at(0);
  const std::int64_t units = DotTasks(first_part.g, l, kernels, first_part.o, first_part.tap_row).units;
  // Chunks of similar size, of whole tiles. A task keeps its pixels in cache and iterates over the weights; if there are
  // few pixels, the weights are split into more tasks.
  const std::int64_t pixels = parts.pixels(), chunks = ceil_div(pixels, kernels.task_pixels);
  const std::int64_t even = ceil_div(pixels, std::max<std::int64_t>(1, chunks));
  const std::int64_t chunk = std::min<std::int64_t>(kernels.task_pixels, ceil_div(even, kernels.mr) * kernels.mr);
  const std::int64_t of_part = g.groups * chunks;
  const std::int64_t split = std::clamp<std::int64_t>(kTasks / std::max<std::int64_t>(1, of_part * parts.count()), 1, units);
  parallel(parts.count() * of_part * split, [&](std::int64_t task) {
    const std::int64_t share = task % split, group = task / split / chunks % g.groups, first = task / split % chunks * chunk;
    const auto run = [&](const Part& part) {
      const std::int64_t end = std::min(part.g.pixels(), first + chunk);
      const auto row_of = [&](std::int64_t image, std::int64_t y, std::int64_t x) { return part.row_of(image, y, x); };
      if (first < end)
        DotTasks(part.g, l, kernels, part.o, part.tap_row, part.first_tap)
            .run(q.of_group(group), row_of, part.pixel_rows, group, first, end, share * units / split, (share + 1) * units / split);
    };
    const std::int64_t index = task / split / of_part;
    index ? run(parts.at(index)) : run(first_part);
  });
}

void convolve(const ConvSizes& whole, const Layer& l, const Kernels& kernels, const Input& whole_input, const Output& o) {
  ConvSizes g = whole;
  Input input = whole_input;
  if (g.depthwise()) return convolve_depthwise(g, l, kernels, input, o);
  if (g.flat) return g.volume ? convolve_flat_frames(g, l, kernels, input, o) : convolve_flat(g, l, kernels, input, o);
  if (g.winograd) return convolve_winograd(g, l, kernels, input, o);
  if (g.kernel_size() == 1 && !g.pad_h && !g.pad_w && !g.transposed && !g.volume) {
    // Pixels that a strided 1x1 convolution skips are not quantized.
    input.strides.y *= g.stride_h, input.strides.x *= g.stride_w;
    g.height = g.out_height, g.width = g.out_width;
    g.stride_h = g.stride_w = 1;
  }
  const ActivationFormat format = l.format(g);
  struct User;
  Scratch<User> scratch(QuantizedTensor::bytes(format, g.grid()));
  const QuantizedTensor q(format, g.grid(), scratch.take<std::byte>(0));
  quantize(q, kernels, input.values, input.strides, g.depth);
  convolve(g, l, kernels, q, o);
}

void quantize_activation(const ConvSizes& g, const Layer& l, const Kernels& kernels, const Input& input, std::int8_t* mantissa,
                         std::int8_t* exponent) {
  const ActivationFormat format = l.format(g);
  struct User;
  Scratch<User> scratch(QuantizedTensor::bytes(format, g.grid()));
  const QuantizedTensor q(format, g.grid(), scratch.take<std::byte>(0));
  quantize(q, kernels, input.values, input.strides);
  const std::int64_t pixels = g.height * g.width, depth = g.layout().depth, blocks = g.layout().blocks();
  parallel(g.images * g.groups, [&](std::int64_t task) {
    const std::int64_t image = task / g.groups, group = task % g.groups;
    const QuantizedRows r = q.of_group(group);
    for (std::int64_t p = 0; p < pixels; ++p) {
      const std::int64_t row = image * pixels + p;
      for (std::int64_t c = 0; c < depth; ++c) mantissa[(task * depth + c) * pixels + p] = r.mantissa[row * r.row_bytes + c];
      for (std::int64_t b = 0; b < blocks; ++b) {
        const std::uint32_t word = std::bit_cast<std::uint32_t>(exact_scale(r.scale[row * blocks + b], r.int_acc));
        exponent[(task * blocks + b) * pixels + p] = static_cast<std::int8_t>(static_cast<int>(word >> 23 & 255) - 127);
      }
    }
  });
}

}  // namespace dsconv
