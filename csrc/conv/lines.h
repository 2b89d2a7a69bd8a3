#pragma once

#include <algorithm>
#include <cstdint>

#include "conv.h"

namespace dsconv {

// The lines of an image that some lines of outputs read, cut up so that what neighbouring outputs read at a tap lies side by
// side: every stride-th value of a line, with zeros where the image ends.
class Lines {
 public:
  static std::int64_t bytes(const Geometry& g, std::int64_t channels, std::int64_t outputs) {
    return static_cast<std::int64_t>(sizeof(float)) * channels * read_by(g, outputs) * g.stride_w * length(g);
  }

  // `memory` of so many bytes.
  Lines(const Geometry& g, std::int64_t channels, std::int64_t outputs, float* memory)
      : g_(g), channels_(channels), lines_(read_by(g, outputs)), memory_(memory) {}

  // What `outputs` lines of outputs from line y on read.
  void read(const float* from, const Strides& s, std::int64_t y) {
    const std::int64_t length = Lines::length(g_), step = g_.stride_w * s.x;
    float* to = memory_;
    for (std::int64_t channel = 0; channel < channels_; ++channel)
      for (std::int64_t line = 0; line < lines_; ++line) {
        const std::int64_t in_y = y * g_.stride_h - g_.pad_h + line;
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
          const float* values = from + channel * s.channel + in_y * s.y + in_x * s.x;
          if (step == 1) std::copy(values + begin, values + end, to + begin);
          else if (step == 2)
            for (std::int64_t i = begin; i < end; ++i) to[i] = values[2 * i];
          else
            for (std::int64_t i = begin; i < end; ++i) to[i] = values[i * step];
        }
      }
  }

  // What the outputs of the first line read at a place of the flattened channels and taps; those of the next line read
  // that much further on.
  const float* at(std::int64_t place) const {
    const std::int64_t kx = place % g_.kernel_w * g_.dilation_w, row = place / g_.kernel_w;
    const std::int64_t line = row / g_.kernel_h * lines_ + row % g_.kernel_h * g_.dilation_h;
    return memory_ + (line * g_.stride_w + kx % g_.stride_w) * length(g_) + kx / g_.stride_w;
  }
  std::int64_t next_line() const { return g_.stride_h * g_.stride_w * length(g_); }

 private:
  static std::int64_t read_by(const Geometry& g, std::int64_t outputs) {
    return (outputs - 1) * g.stride_h + (g.kernel_h - 1) * g.dilation_h + 1;
  }
  static std::int64_t length(const Geometry& g) { return g.out_width + (g.kernel_w - 1) * g.dilation_w / g.stride_w + kMaxLanes; }

  const Geometry& g_;
  std::int64_t channels_, lines_;
  float* memory_;
};

}  // namespace dsconv
