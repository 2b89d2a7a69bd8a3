#pragma once

#include <algorithm>
#include <cstdint>

#include "sizes.h"

namespace dsconv {

// The lines of an image that some lines of outputs read, rearranged so that the inputs of neighbouring outputs at a tap
// are contiguous: every stride-th value of a line, with zeros as padding.
class LineBuffer {
 public:
  static std::int64_t bytes(const ConvSizes& g, std::int64_t channels, std::int64_t outputs) {
    return static_cast<std::int64_t>(sizeof(float)) * channels * read_by(g, outputs) * g.stride_w * length(g);
  }

  // `memory` has `bytes` bytes.
  LineBuffer(const ConvSizes& g, std::int64_t channels, std::int64_t outputs, float* memory)
      : g_(g), channels_(channels), lines_(read_by(g, outputs)), length_(length(g)), memory_(memory) {}

  // Reads the input of `outputs` lines of outputs, from line y on.
  void read(const float* from, const Strides& s, std::int64_t y) {
    float* to = memory_;
    for (std::int64_t channel = 0; channel < channels_; ++channel)
      for (std::int64_t line = 0; line < lines_; ++line) {
        const std::int64_t in_y = y * g_.stride_h - g_.pad_h + line;
        const bool inside = in_y >= 0 && in_y < g_.height;
        for (std::int64_t phase = 0; phase < g_.stride_w; ++phase, to += length_)
          read_phase(inside ? from + channel * s.channel + in_y * s.y : nullptr, s.x, phase - g_.pad_w, to);
      }
  }

  // Returns the inputs of the first line of outputs at an index of the flattened channels and taps; the distance to the
  // next line is next_line().
  const float* at(std::int64_t place) const {
    const std::int64_t kx = place % g_.kernel_w * g_.dilation_w, row = place / g_.kernel_w;
    const std::int64_t line = row / g_.kernel_h * lines_ + row % g_.kernel_h * g_.dilation_h;
    return memory_ + (line * g_.stride_w + kx % g_.stride_w) * length_ + kx / g_.stride_w;
  }
  std::int64_t next_line() const { return g_.stride_h * g_.stride_w * length_; }

 private:
  // Reads every stride-th value of a line, from pixel in_x on; zeros if the line is null.
  void read_phase(const float* line, std::int64_t x_stride, std::int64_t in_x, float* to) const {
    if (!line) return void(std::fill_n(to, length_, 0.0f));
    const std::int64_t step = g_.stride_w * x_stride;
    // The image covers values `begin` to `end`.
    const std::int64_t begin = std::min(in_x < 0 ? (g_.stride_w - 1 - in_x) / g_.stride_w : 0, length_);
    const std::int64_t end = std::clamp((g_.width - in_x + g_.stride_w - 1) / g_.stride_w, begin, length_);
    std::fill_n(to, begin, 0.0f);
    std::fill(to + end, to + length_, 0.0f);
    const float* values = line + in_x * x_stride;
    if (step == 1) std::copy(values + begin, values + end, to + begin);
    else if (step == 2)
      for (std::int64_t i = begin; i < end; ++i) to[i] = values[2 * i];
    else
      for (std::int64_t i = begin; i < end; ++i) to[i] = values[i * step];
  }

  static std::int64_t read_by(const ConvSizes& g, std::int64_t outputs) {
    return (outputs - 1) * g.stride_h + (g.kernel_h - 1) * g.dilation_h + 1;
  }
  static std::int64_t length(const ConvSizes& g) { return g.out_width + (g.kernel_w - 1) * g.dilation_w / g.stride_w + kMaxLanes; }

  const ConvSizes& g_;
  const std::int64_t channels_, lines_, length_;
  float* const memory_;
};

}  // namespace dsconv
