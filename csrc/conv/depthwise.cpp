#include <algorithm>
#include <stdexcept>

#include "../parallel.h"
#include "../scratch.h"
#include "conv.h"
#include "lines.h"

namespace dsconv {

constexpr std::int64_t kLargestLine = 5;  // the larger of the sizes of filters that depthwise_line knows

void convolve_depthwise(const Geometry& g, const Layer& l, const Kernels& kernels, const Input& from, const Output& o) {
  const Strides& in = from.strides;
  const Strides& out = o.strides;
  const Strides& add = o.residual.strides;
  const std::int64_t per_group = g.group_outputs(), taps = g.positions();
  // Lanes are channels where those lie side by side, and pixels of a line otherwise.
  const bool by_lane = in.channel == 1 && (!o.values || out.channel == 1) && per_group == 1;
  if (!by_lane && (!o.targets.empty() || out.x != 1))
    throw std::invalid_argument("a depthwise convolution needs an output whose lines are dense");
  const bool in_lines = by_lane && g.channels >= kMaxLanes && g.kernel_h == g.kernel_w &&
                        (g.kernel_w == 3 || g.kernel_w == kLargestLine) && g.stride_w <= 2 && g.dilation_w == 1 &&
                        taps <= g.block_size;
  const std::int64_t parts = by_lane ? 1 : g.groups;
  const std::int64_t values = std::max<std::int64_t>(1, g.out_width * (by_lane ? g.channels : 1));
  const std::int64_t lines = std::clamp<std::int64_t>(4096 / values, 1, std::max<std::int64_t>(1, g.out_height));
  const std::int64_t stripes = (g.out_height + lines - 1) / lines;
  parallel(g.images * parts * stripes, [&](std::int64_t task) {
    const std::int64_t stripe = task % stripes, part = task / stripes % parts, image = task / stripes / parts;
    struct User;
    using Mine = Scratch<User>;
    const bool few = by_lane && g.channels < kMaxLanes;  // fewer channels than are read at once
    const std::int64_t zeros = by_lane ? g.channels + kMaxLanes : 0, ends = few ? taps * kMaxLanes : 0;
    const std::int64_t kept = o.values ? 0 : g.out_width * g.channels;
    Mine scratch(Mine::size<const float*>(taps) + Mine::size<float>(zeros) + Mine::size<float>(ends) + Mine::size<float>(kept) +
                 (by_lane ? 0 : Lines::bytes(g, 1, 1)));
    const float** tap = scratch.take<const float*>(taps);
    float* zero = scratch.take<float>(zeros);
    float* end = scratch.take<float>(ends);
    float* const finished = scratch.take<float>(kept);
    Lines cut(g, 1, 1, scratch.take<float>(0));
    std::fill_n(zero, zeros, 0.0f);
    std::fill_n(end, ends, 0.0f);
    float few_terms[3][kMaxLanes] = {};
    const auto filled = [&](const float* from, float* to) {
      return from ? std::copy_n(from, g.channels, to) - g.channels : nullptr;
    };
    const Terms terms =
        few ? Terms{filled(l.terms.bias, few_terms[0]), filled(l.terms.gain, few_terms[1]), filled(l.terms.offset, few_terms[2])}
            : l.terms;

    // `lanes` outputs, of filter `output` or of the filters from there on, which read from tap[k][first].
    const auto run = [&](std::int64_t output, std::int64_t first, std::int64_t lanes, float* to, const float* residual) {
      const Store store{nullptr, 0, 0, nullptr, nullptr, 1, terms.from(output), residual, to, l.activation, l.slope};
      kernels.depthwise({tap, first, static_cast<int>(lanes), by_lane, static_cast<int>(taps), static_cast<int>(g.block_size),
                         l.bits, l.sign, reinterpret_cast<const std::int32_t*>(l.weight) + output, l.kds + output,
                         l.kds_shift ? l.kds_shift + output : nullptr, g.outputs, store});
    };
    for (std::int64_t y = stripe * lines; y < std::min(g.out_height, (stripe + 1) * lines); ++y) {
      const auto residual = [&](std::int64_t channel, std::int64_t x) {
        return o.residual.values ? o.residual.values + image * add.image + channel * add.channel + y * add.y + x * add.x : nullptr;
      };
      const float* input = from.values + image * in.image + (by_lane ? 0 : part * in.channel);
      if (!by_lane) {
        cut.read(input, in, y);
        for (std::int64_t k = 0; k < taps; ++k) tap[k] = cut.at(k);
        for (std::int64_t output = part * per_group; output < (part + 1) * per_group; ++output)
          run(output, 0, g.out_width, o.values + image * out.image + output * out.channel + y * out.y, residual(output, 0));
        continue;
      }
      float* const line = o.values ? o.values + image * out.image + y * out.y : finished;
      const std::int64_t pixel = o.values ? out.x : g.channels;
      if (in_lines) {
        const float* lines_read[kLargestLine];
        std::int64_t step[kLargestLine];
        for (std::int64_t k = 0; k < g.kernel_h; ++k) {
          const std::int64_t in_y = y * g.stride_h - g.pad_h + k * g.dilation_h;
          const bool inside = in_y >= 0 && in_y < g.height;
          lines_read[k] = inside ? input + in_y * in.y : zero, step[k] = inside ? in.x : 0;
        }
        kernels.depthwise_line({static_cast<int>(g.kernel_w),
                                static_cast<int>(g.stride_w),
                                lines_read,
                                step,
                                -g.pad_w,
                                g.width,
                                g.out_width,
                                g.channels,
                                l.bits,
                                l.sign,
                                reinterpret_cast<const std::int32_t*>(l.weight),
                                l.kds,
                                l.kds_shift,
                                terms,
                                residual(0, 0),
                                add.x,
                                line,
                                pixel,
                                l.activation,
                                l.slope});
      }
      for (std::int64_t x = in_lines ? g.out_width : 0; x < g.out_width; ++x) {
        for (std::int64_t ky = 0, k = 0; ky < g.kernel_h; ++ky) {
          const std::int64_t in_y = y * g.stride_h - g.pad_h + ky * g.dilation_h;
          std::int64_t in_x = x * g.stride_w - g.pad_w;
          for (std::int64_t kx = 0; kx < g.kernel_w; ++kx, ++k, in_x += g.dilation_w) {
            const bool inside = in_y >= 0 && in_y < g.height && in_x >= 0 && in_x < g.width;
            tap[k] = inside ? input + in_y * in.y + in_x * in.x : zero;
            if (few) tap[k] = std::copy_n(tap[k], g.channels, end + k * kMaxLanes) - g.channels;
          }
        }
        const std::int64_t whole = few ? g.channels : g.channels / kMaxLanes * kMaxLanes;
        run(0, 0, whole, line + x * pixel, residual(0, x));
        // What is left, once more with some before, so that nothing behind the last channel is read.
        const std::int64_t last = g.channels - kMaxLanes;
        if (whole < g.channels) run(last, last, kMaxLanes, line + x * pixel + last, residual(last, x));
      }
      for (const Target& target : o.targets)
        quantize_into(target, kernels, line, pixel, (image * g.out_height + y) * g.out_width, g.out_width, 0, g.channels);
    }
  });
}

}  // namespace dsconv
