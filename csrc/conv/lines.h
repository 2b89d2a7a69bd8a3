#pragma once

#include <algorithm>
#include <cstdint>

#include "conv.h"

namespace dsconv {

// The lines of an image that one line of outputs reads, cut up so that what neighbouring outputs read at a tap lies side by
// side: every stride-th value of a line, with zeros where the image ends.
class Lines {
 public:
  static std::int64_t bytes(const Geometry& g, std::int64_t channels) {
    return static_cast<std::int64_t>(sizeof(float)) * channels * g.kernel_h * g.stride_w * length(g);
  }

  Lines(const Geometry& g, std::int64_t channels, float* memory) : g_(g), channels_(channels), memory_(memory) {}

  void read(const float* from, const Strides& s, std::int64_t y) {
    const std::int64_t length = Lines::length(g_);
    float* to = memory_;
    for (std::int64_t channel = 0; channel < channels_; ++channel)
      for (std::int64_t ky = 0; ky < g_.kernel_h; ++ky) {
        const std::int64_t in_y = y * g_.stride_h - g_.pad_h + ky * g_.dilation_h;
        const bool inside = in_y >= 0 && in_y < g_.height;
        for (std::int64_t phase = 0; phase < g_.stride_w; ++phase, to += length) {
          // Places from which on, and up to which, the image is there to be read.
          const std::int64_t in_x = phase - g_.pad_w;
          const std::int64_t begin = std::min(in_x < 0 ? (g_.stride_w - 1 - in_x) / g_.stride_w : 0, length);
          const std::int64_t end = std::clamp((g_.width - in_x + g_.stride_w - 1) / g_.stride_w, begin, length);
          if (!inside) {
            std::fill_n(to, length, 0.0f);
            continue;
          }
          std::fill_n(to, begin, 0.0f);
          std::fill(to + end, to + length, 0.0f);
          const float* line = from + channel * s.channel + in_y * s.y + in_x * s.x;
          const std::int64_t step = g_.stride_w * s.x;
          if (step == 1)
            std::copy(line + begin, line + end, to + begin);
          else if (step == 2)
            for (std::int64_t i = begin; i < end; ++i) to[i] = line[2 * i];
          else
            for (std::int64_t i = begin; i < end; ++i) to[i] = line[i * step];
        }
      }
  }

  // What the outputs of the line read at a place of the flattened channels and taps.
  const float* at(std::int64_t place) const {
    const std::int64_t kx = place % g_.kernel_w * g_.dilation_w, line = place / g_.kernel_w;
    return memory_ + (line * g_.stride_w + kx % g_.stride_w) * length(g_) + kx / g_.stride_w;
  }

 private:
  static std::int64_t length(const Geometry& g) {
    return g.out_width + (g.kernel_w - 1) * g.dilation_w / g.stride_w + kMaxLanes;
  }

  const Geometry& g_;
  std::int64_t channels_;
  float* memory_;
};

}  // namespace dsconv
