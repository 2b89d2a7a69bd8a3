// Two fused steps: the first one, a convolution, computes lines of its outputs when the second one reads them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../parallel.h"
#include "conv.h"
#include "dot_tasks.h"
#include "parts.h"

namespace dsconv {

// A convolution, and its input: quantized, or with flattened blocks in float32.
struct FirstLayer {
  const ConvSizes& g;
  const Layer& l;
  QuantizedTensor quantized;
  Input values;
};

inline bool makes_lines(const ConvSizes& g) { return g.groups == 1 && !g.winograd && !g.transposed && !g.volume; }

// Partition of the lines of outputs of some images: as few tasks as balance the threads, since each recomputes the lines of
// its halo.
struct Stripes {
  std::int64_t lines, count;  // of a stripe; stripes

  Stripes(std::int64_t height, std::int64_t tasks_of_line) {
    constexpr std::int64_t kTasksOfThread = 4, kLeastLines = 8;
    const int threads = expected_threads;
    const std::int64_t tasks = threads == 1 ? 1 : kTasksOfThread * threads;
    lines = std::max(ceil_div(height, ceil_div(tasks, std::max<std::int64_t>(1, tasks_of_line))), std::min(kLeastLines, height));
    count = ceil_div(height, lines);
  }
};

// Lines of some outputs of an image, in a ring buffer that fits in the L2 cache.
class LineRing {
 public:
  // Windows of flattened blocks are quantized some lines at a time.
  static std::int64_t ahead(const ConvSizes& g) { return g.flat ? 3 : 0; }
  static std::int64_t kept(const ConvSizes& g, std::int64_t lines) { return std::min(lines + ahead(g), g.out_height); }
  static std::int64_t bytes(const ConvSizes& g, std::int64_t lines, std::int64_t outputs) {
    return kept(g, lines) * g.out_width * outputs * 4;
  }

  // Holds `lines` of the lines in [first_line, last_line), of outputs `begin` to `end`; `begin` is a multiple of kNR.
  LineRing(const FirstLayer& first, const Kernels& kernels, std::int64_t image, std::int64_t begin, std::int64_t end,
           std::int64_t lines, std::int64_t first_line, std::int64_t last_line, float* memory)
      : first_(first), kernels_(kernels), g_(some_outputs(first.g, end - begin)), l_(from_output(first, begin)),
        part_(Parts(first.g, first.quantized.grid(), nowhere_).at(0)), image_(image), outputs_(end - begin),
        lines_(kept(first.g, lines)), last_(last_line), made_(first_line), memory_(memory) {}

  const float* at(std::int64_t y) const { return memory_ + y % lines_ * line(); }
  std::int64_t line() const { return first_.g.out_width * outputs_; }

  // Computes the missing lines before `end`.
  void make(std::int64_t end) {
    if (made_ >= end) return;
    end = std::min(end + ahead(first_.g), last_);
    while (made_ < end) {
      const std::int64_t count = std::min(end - made_, lines_ - made_ % lines_);  // that are consecutive in the ring
      g_.flat ? flat_lines(count) : direct_lines(count);
      made_ += count;
    }
  }

 private:
  static ConvSizes some_outputs(const ConvSizes& g, std::int64_t outputs) {
    ConvSizes some = g;
    some.images = 1, some.outputs = outputs;
    return some;
  }
  static Layer from_output(const FirstLayer& first, std::int64_t begin) {
    const std::int64_t pair = begin / kNR, scales = pair * first.g.taps() * first.g.layout().blocks() * kNR;
    Layer from = first.l;
    from.weight += pair * 2 * first.g.panel_bytes(from.wide);
    from.kds += scales, from.kds_shift = from.kds_shift ? from.kds_shift + scales : nullptr;
    from.post = from.post.from(begin);
    return from;
  }

  void direct_lines(std::int64_t count) {
    lines_of(count, first_.quantized.of_group(0), part_.tap_row, part_.pixel_rows,
             [&](std::int64_t, std::int64_t y, std::int64_t x) { return part_.row_of(image_, made_ + y, x); });
  }

  void flat_lines(std::int64_t count) {
    static constexpr std::int64_t kTap[] = {0};
    const ActivationFormat format = first_.l.format(g_);
    const PaddedGrid grid{1, count, g_.out_width, 0, 0};
    struct User;
    Scratch<User> scratch(QuantizedTensor::bytes(format, grid));
    const QuantizedTensor q(format, grid, scratch.template take<std::byte>(0));
    q.begin(0, format.layout.depth);
    quantize_windows(g_, q, kernels_, first_.values, 0, image_, made_, count);
    lines_of(count, q.of_group(0), kTap, 1, [&](std::int64_t, std::int64_t y, std::int64_t x) { return y * g_.out_width + x; });
  }

  template <class RowOf>
  void lines_of(std::int64_t count, const QuantizedRows& rows, std::span<const std::int64_t> tap_row, std::int64_t row_stride,
                RowOf row_of) {
    g_.out_height = count;
    const Output to{memory_ + made_ % lines_ * line(), {0, 1, line(), outputs_}, {}, {}};
    const DotTasks tasks(g_, l_, kernels_, to, tap_row);
    const std::int64_t pixels = g_.pixels();
    for (std::int64_t p = 0; p < pixels; p += kernels_.task_pixels)
      tasks.run(rows, row_of, row_stride, 0, p, std::min(pixels, p + kernels_.task_pixels), 0, tasks.units);
  }

  const FirstLayer& first_;
  const Kernels& kernels_;
  ConvSizes g_;  // of some lines
  const Layer l_;
  const Output nowhere_{};
  const Part part_;
  const std::int64_t image_, outputs_, lines_, last_;
  std::int64_t made_;
  float* const memory_;
};

}  // namespace dsconv
