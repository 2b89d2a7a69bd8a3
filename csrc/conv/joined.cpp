#include <algorithm>

#include "../parallel.h"
#include "conv.h"
#include "depthwise_parts.h"
#include "dot_tasks.h"
#include "parts.h"

namespace dsconv {
namespace {

constexpr std::int64_t kTasks = 16;  // enough to balance some threads; each computes the lines of its halo once more
constexpr std::int64_t kLeastLines = 8;

// The lines of the first layer that the second one reads next, of some channels: a ring, which stays in the second cache.
class LineRing {
 public:
  static std::int64_t bytes(const ConvSizes& first, std::int64_t lines, std::int64_t channels) {
    return lines * first.out_width * channels * 4;
  }
  LineRing(std::int64_t lines, std::int64_t line, float* memory) : lines_(lines), line_(line), memory_(memory) {}

  float* at(std::int64_t y) const { return memory_ + y % lines_ * line_; }
  // Returns how many lines from y on lie one after another.
  std::int64_t run(std::int64_t y) const { return lines_ - y % lines_; }

 private:
  const std::int64_t lines_, line_;
  float* const memory_;
};

// The outputs of a direct convolution from channel `begin` to before `end`, as those of a layer of their own.
ConvSizes some_outputs(const ConvSizes& g, std::int64_t begin, std::int64_t end) {
  ConvSizes some = g;
  some.images = 1, some.outputs = end - begin;
  return some;
}
Layer from_output(const ConvSizes& g, const Layer& l, std::int64_t begin) {
  const std::int64_t pair = begin / kNR, scales = pair * g.taps() * g.layout().blocks() * kNR;
  Layer from = l;
  from.weight += pair * 2 * g.panel_bytes(l.wide);
  from.kds += scales, from.kds_shift = l.kds_shift ? l.kds_shift + scales : nullptr;
  from.post = l.post.from(begin);
  return from;
}

}  // namespace

bool joins(const ConvSizes& first, const ConvSizes& g, const Layer& l) {
  return first.groups == 1 && !first.flat && !first.winograd && !first.transposed && !first.volume && g.takes_floats() &&
         l.activation_bits == kFloatBits && !l.kds_shift && g.outputs == g.channels && first.outputs == g.channels &&
         first.out_height == g.height && first.out_width == g.width;
}

void convolve_joined(const ConvSizes& first, const Layer& first_layer, const QuantizedTensor& input, const ConvSizes& g,
                     const Layer& l, const Kernels& kernels, const Output& o) {
  const DepthwiseParts parts(g, l, kernels, o);
  const Output nowhere{};
  const Parts direct(first, input.grid(), nowhere);
  const Part part_of_first = direct.at(0);
  // Lines that are quantized together, and those of the first layer that they read.
  const std::int64_t together = std::clamp<std::int64_t>(parts.pixels / g.out_width, 1, g.out_height);
  const std::int64_t read = (together - 1) * g.stride_h + (g.kernel_h - 1) * g.dilation_h + 1;
  const std::int64_t wanted = ceil_div(kTasks, g.images * parts.count);
  const std::int64_t lines = std::max(ceil_div(g.out_height, wanted), std::min(kLeastLines, g.out_height));
  const std::int64_t stripes = ceil_div(g.out_height, lines);
  parallel(g.images * stripes * parts.count, [&](std::int64_t task) {
    const std::int64_t index = task % parts.count, top = task / parts.count % stripes * lines;
    const std::int64_t image = task / parts.count / stripes, bottom = std::min(g.out_height, top + lines);
    const std::int64_t channel = index * parts.channels, width = std::min(parts.channels, g.channels - channel);
    ConvSizes some = some_outputs(first, channel, channel + width);
    const Layer layer = from_output(first, first_layer, channel);
    struct User;
    Scratch<User> scratch(LineRing::bytes(first, read, width));
    const LineRing ring(read, first.out_width * width, scratch.template take<float>(0));
    std::int64_t made = std::max<std::int64_t>(0, top * g.stride_h - g.pad_h);
    const auto make = [&](std::int64_t end) {
      while (made < end) {
        some.out_height = std::min(end - made, ring.run(made));
        const Output to{ring.at(made), {0, 1, first.out_width * width, width}, {}, {}};
        const DotTasks tasks(some, layer, kernels, to, part_of_first.tap_row);
        const auto row_of = [&](std::int64_t, std::int64_t y, std::int64_t x) { return part_of_first.row_of(image, made + y, x); };
        for (std::int64_t pixel = 0; pixel < some.pixels(); pixel += kernels.task_pixels)
          tasks.run(input.of_group(0), row_of, part_of_first.pixel_rows, 0, pixel,
                    std::min(some.pixels(), pixel + kernels.task_pixels), 0, tasks.units);
        made += some.out_height;
      }
    };
    parts.with_part(index, width, [&](const auto& run) {
      for (std::int64_t y = top; y < bottom; y += together) {
        const std::int64_t end = std::min(bottom, y + together);
        make(std::min(g.height, (end - 1) * g.stride_h - g.pad_h + (g.kernel_h - 1) * g.dilation_h + 1));
        run(image, y, end, [&](std::int64_t line) { return ring.at(line); });
      }
    });
  });
}

}  // namespace dsconv
