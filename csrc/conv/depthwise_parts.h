// Depthwise convolutions of float activations in NHWC, some channels and lines at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "../scratch.h"
#include "conv.h"

namespace dsconv {

// A part is a range of channels that are whole blocks of all targets.
class DepthwiseParts {
 public:
  DepthwiseParts(const ConvSizes& g, const Layer& l, const Kernels& kernels, const Output& o)
      : channels(channels_of(g, o)), count(ceil_div(g.channels, channels)),
        pixels(std::max<std::int64_t>(1, kStaged / (channels * kOutputs)) * kOutputs), g_(g), l_(l), kernels_(kernels), o_(o) {}

  const std::int64_t channels, count;  // of a part; parts
  const std::int64_t pixels;           // that are quantized together

  // Calls body(run), where run(image, begin, end, line_of) computes lines `begin` to `end` of the outputs of an image.
  // line_of(y) is the address of line y of the input, at the first channel of the part; `pixel_stride` separates its pixels.
  template <class Body>
  void with_part(std::int64_t part, std::int64_t pixel_stride, Body body) const {
    const std::int64_t first = part * channels, width = std::min(channels, g_.channels - first);
    DepthwiseLineArgs a{};
    a.kernel_h = g_.kernel_h, a.kernel_w = g_.kernel_w, a.stride = g_.stride_w, a.dilation = g_.dilation_w;
    a.pixel_stride = pixel_stride, a.width = g_.width, a.channels = width;
    a.kds = l_.kds + first, a.post = l_.post.from(first);
    a.residual_stride = o_.residual.strides.x, a.output_stride = o_.values ? o_.strides.x : width;
    const std::int64_t staged = o_.values ? 0 : pixels * width;
    struct User;
    using Mine = Scratch<User>;
    Mine scratch(Mine::template size<const float*>(g_.kernel_h) + Mine::template size<float>(g_.kernel_size() * width) +
                 Mine::template size<const float*>(a.window_size()) + Mine::template size<float>(width) +
                 Mine::template size<float>(staged));
    const float** const line = scratch.template take<const float*>(g_.kernel_h);
    a.line = line, a.weight = converted(first, width, scratch.template take<float>(g_.kernel_size() * width));
    a.pixel = scratch.template take<const float*>(a.window_size());
    a.zeros = std::fill_n(scratch.template take<float>(width), width, 0.0f) - width;
    float* const finished = scratch.template take<float>(staged);
    body([&](std::int64_t image, std::int64_t begin, std::int64_t end, auto line_of) {
      run(image, begin, end, first, line_of, a, line, finished);
    });
  }

 private:
  static constexpr std::int64_t kOutputs = DepthwiseLineArgs::kOutputs;
  static constexpr std::int64_t kChannels = 64, kStaged = 4096;  // values that fit in the L1 cache

  static std::int64_t channels_of(const ConvSizes& g, const Output& o) {
    std::int64_t together = kChannels;
    for (const QuantizedTarget& target : o.targets) together = std::lcm(together, target.tensor.format().layout.block_size);
    return std::min(together, g.channels);
  }

  template <class LineOf>
  void run(std::int64_t image, std::int64_t begin, std::int64_t end, std::int64_t first, LineOf line_of, DepthwiseLineArgs& a,
           const float** line, float* finished) const {
    const std::int64_t most = std::min(pixels, g_.out_width);
    std::int64_t staged = 0, pixel = (image * g_.out_height + begin) * g_.out_width;
    for (std::int64_t y = begin; y < end; ++y) {
      for (std::int64_t ky = 0; ky < g_.kernel_h; ++ky) {
        const std::int64_t in_y = y * g_.stride_h - g_.pad_h + ky * g_.dilation_h;
        line[ky] = in_y >= 0 && in_y < g_.height ? line_of(in_y) : nullptr;
      }
      for (std::int64_t x = 0; x < g_.out_width; x += most) {
        a.outputs = std::min(most, g_.out_width - x), a.first = x * g_.stride_w - g_.pad_w;
        a.output = o_.values ? at(o_.values, o_.strides, image, y, x) + first : finished + staged * a.channels;
        if (o_.residual.values) a.residual = at(o_.residual.values, o_.residual.strides, image, y, x) + first;
        kernels_.vector.depthwise_line(a);
        staged += a.outputs;
        const bool last = y + 1 == end && x + most >= g_.out_width;
        if (!o_.values && !last && staged + most <= pixels) continue;
        for (const QuantizedTarget& target : o_.targets)
          quantize_into(target, kernels_, o_.values ? a.output : finished, a.output_stride, pixel, staged, first,
                        first + a.channels);
        pixel += staged, staged = 0;
      }
    }
  }

  template <class T>
  static T* at(T* values, const Strides& s, std::int64_t image, std::int64_t y, std::int64_t x) {
    return values + image * s.image + y * s.y + x * s.x;
  }

  // Writes the integers of some filters as floats, [taps][channels].
  const float* converted(std::int64_t first, std::int64_t width, float* to) const {
    const std::int32_t* const weight = reinterpret_cast<const std::int32_t*>(l_.weight) + first;
    for (std::int64_t k = 0; k < g_.kernel_size(); ++k)
      for (std::int64_t c = 0; c < width; ++c) to[k * width + c] = static_cast<float>(weight[k * g_.outputs + c]);
    return to;
  }

  const ConvSizes& g_;
  const Layer& l_;
  const Kernels& kernels_;
  const Output& o_;
};

}  // namespace dsconv
