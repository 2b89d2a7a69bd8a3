#include "joined.h"

#include "../parallel.h"
#include "depthwise_parts.h"

namespace dsconv {

void convolve_joined(const FirstLayer& first, const ConvSizes& g, const Layer& l, const Kernels& kernels, const Output& o) {
  const DepthwiseParts parts(g, l, kernels, o);
  // Lines that are quantized together, and the lines of the first layer that they read.
  const std::int64_t together = std::clamp<std::int64_t>(parts.pixels / g.out_width, 1, g.out_height);
  const std::int64_t read = (together - 1) * g.stride_h + (g.kernel_h - 1) * g.dilation_h + 1;
  const Stripes stripes(g.out_height, g.images * parts.count);
  parallel(g.images * stripes.count * parts.count, [&](std::int64_t task) {
    const std::int64_t index = task % parts.count, top = task / parts.count % stripes.count * stripes.lines;
    const std::int64_t image = task / parts.count / stripes.count, bottom = std::min(g.out_height, top + stripes.lines);
    const std::int64_t begin = index * parts.channels, end = std::min(g.channels, begin + parts.channels);
    struct User;
    Scratch<User> scratch(LineRing::bytes(first.g, read, end - begin));
    // Returns the end of the lines that outputs before line `y` read.
    const auto end_of = [&](std::int64_t y) {
      return std::min(g.height, (y - 1) * g.stride_h - g.pad_h + (g.kernel_h - 1) * g.dilation_h + 1);
    };
    LineRing ring(first, kernels, image, begin, end, read, std::max<std::int64_t>(0, top * g.stride_h - g.pad_h), end_of(bottom),
                  scratch.template take<float>(0));
    parts.with_part(index, end - begin, [&](const auto& run) {
      for (std::int64_t y = top; y < bottom; y += together) {
        const std::int64_t stop = std::min(bottom, y + together);
        ring.make(end_of(stop));
        run(image, y, stop, [&](std::int64_t line) { return ring.at(line); });
      }
    });
  });
}

}  // namespace dsconv
