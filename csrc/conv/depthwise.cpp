#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "../parallel.h"
#include "../scratch.h"
#include "conv.h"
#include "line_buffer.h"

namespace dsconv {
namespace {

// Returns the line of an image that a row of taps reads for line y of the outputs; null in the padding.
const float* input_line(const ConvSizes& g, const Input& from, std::int64_t image, std::int64_t y, std::int64_t ky) {
  const std::int64_t in_y = y * g.stride_h - g.pad_h + ky * g.dilation_h;
  const bool inside = in_y >= 0 && in_y < g.height;
  return inside ? from.values + image * from.strides.image + in_y * from.strides.y : nullptr;
}

// The tasks of a depthwise convolution: some lines of outputs each. Lanes are channels where those are contiguous
// (by_channel), and then a task does all of them; else lanes are pixels of a line, and a task does the filters of one
// input channel.
class DepthwiseTasks {
 public:
  DepthwiseTasks(const ConvSizes& g, const Layer& l, const Kernels& kernels, const Input& from, const Output& o)
      : g_(g), l_(l), kernels_(kernels), from_(from), o_(o), taps_(g.kernel_size()), filters_(g.group_outputs()),
        by_channel_(from.strides.channel == 1 && (!o.values || o.strides.channel == 1) && filters_ == 1),
        few_(by_channel_ && g.channels < kMaxLanes), parts_(by_channel_ ? 1 : g.groups) {
    if (!by_channel_ && (!o.targets.empty() || o.strides.x != 1))
      throw std::invalid_argument("a depthwise convolution needs an output whose lines are dense");
    const std::int64_t values = std::max<std::int64_t>(1, g.out_width * (by_channel_ ? g.channels : 1));
    lines_ = std::clamp<std::int64_t>(4096 / values, 1, std::max<std::int64_t>(1, g.out_height));
    stripes_ = ceil_div(g.out_height, lines_);
  }

  std::int64_t count() const { return g_.images * parts_ * stripes_; }

  void run(std::int64_t task) const {
    const std::int64_t stripe = task % stripes_, part = task / stripes_ % parts_, image = task / stripes_ / parts_;
    const std::int64_t zeros = by_channel_ ? g_.channels + kMaxLanes : 0, few_taps = few_ ? taps_ * kMaxLanes : 0;
    const std::int64_t kept = o_.values ? 0 : g_.out_width * g_.channels;
    struct User;
    using Mine = Scratch<User>;
    Mine scratch(Mine::size<const float*>(taps_) + Mine::size<float>(zeros) + Mine::size<float>(few_taps) +
                 Mine::size<float>(kept) + (by_channel_ ? 0 : LineBuffer::bytes(g_, 1, 1)));
    Line t{.image = image, .part = part, .y = 0, .post = l_.post};
    t.tap = scratch.take<const float*>(taps_);
    t.zeros = std::fill_n(scratch.take<float>(zeros), zeros, 0.0f) - zeros;
    t.few_taps = std::fill_n(scratch.take<float>(few_taps), few_taps, 0.0f) - few_taps;
    t.finished = scratch.take<float>(kept);
    t.rearranged = scratch.take<float>(0);
    float few_post[3][kMaxLanes] = {};
    if (few_) pad_post(t.post, few_post);
    for (t.y = stripe * lines_; t.y < std::min(g_.out_height, (stripe + 1) * lines_); ++t.y)
      by_channel_ ? line_of_channels(t) : line_of_pixels(t);
  }

 private:
  // A line of outputs, and the memory of its task.
  struct Line {
    std::int64_t image, part, y;
    PostOps post;
    const float** tap = nullptr;
    const float* zeros = nullptr;  // a pixel of the padding
    float* few_taps = nullptr;     // the taps of a pixel of few channels, filled up to a vector
    float* finished = nullptr;     // outputs that are not kept as floats
    float* rearranged = nullptr;
  };

  // Fewer channels than are read at once: fills their post-ops up.
  void pad_post(PostOps& post, float (&padded)[3][kMaxLanes]) const {
    const float** const given[] = {&post.bias, &post.gain, &post.offset};
    for (int i = 0; i < 3; ++i)
      if (*given[i]) *given[i] = std::copy_n(*given[i], g_.channels, padded[i]) - g_.channels;
  }

  const float* residual(const Line& t, std::int64_t channel, std::int64_t x) const {
    const auto& [values, s] = o_.residual;
    return values ? values + t.image * s.image + channel * s.channel + t.y * s.y + x * s.x : nullptr;
  }

  // Computes `lanes` outputs, of filter `output` or of the filters from there on, which read from tap[k][first].
  void run_kernel(const Line& t, std::int64_t output, std::int64_t first, std::int64_t lanes, float* to,
                  const float* residual) const {
    DepthwiseArgs a{};
    a.tap = t.tap, a.first = first, a.lanes = static_cast<int>(lanes), a.by_channel = by_channel_;
    a.taps = static_cast<int>(taps_), a.block_size = static_cast<int>(g_.block_size), a.bits = l_.activation_bits, a.sign = l_.sign;
    a.weight = reinterpret_cast<const std::int32_t*>(l_.weight) + output, a.filters = g_.outputs;
    a.kds = l_.kds + output, a.kds_shift = l_.kds_shift ? l_.kds_shift + output : nullptr;
    a.post = t.post.from(output), a.residual = residual, a.output = to;
    kernels_.vector.depthwise(a);
  }

  void line_of_pixels(const Line& t) const {
    const Strides &in = from_.strides, &out = o_.strides;
    LineBuffer lines(g_, 1, 1, t.rearranged);
    lines.read(from_.values + t.image * in.image + t.part * in.channel, in, t.y);
    for (std::int64_t k = 0; k < taps_; ++k) t.tap[k] = lines.at(k);
    for (std::int64_t n = t.part * filters_; n < (t.part + 1) * filters_; ++n)
      run_kernel(t, n, 0, g_.out_width, o_.values + t.image * out.image + n * out.channel + t.y * out.y, residual(t, n, 0));
  }

  void line_of_channels(const Line& t) const {
    float* const line = o_.values ? o_.values + t.image * o_.strides.image + t.y * o_.strides.y : t.finished;
    const std::int64_t stride = o_.values ? o_.strides.x : g_.channels;
    pixel_by_pixel(t, line, stride);
    for (const QuantizedTarget& target : o_.targets)
      quantize_into(target, kernels_, line, stride, (t.image * g_.out_height + t.y) * g_.out_width, g_.out_width, 0, g_.channels);
  }

  void pixel_by_pixel(const Line& t, float* line, std::int64_t stride) const {
    for (std::int64_t x = 0; x < g_.out_width; ++x) {
      for (std::int64_t ky = 0, k = 0; ky < g_.kernel_h; ++ky) {
        const float* const from = input_line(g_, from_, t.image, t.y, ky);
        std::int64_t in_x = x * g_.stride_w - g_.pad_w;
        for (std::int64_t kx = 0; kx < g_.kernel_w; ++kx, ++k, in_x += g_.dilation_w) {
          t.tap[k] = from && in_x >= 0 && in_x < g_.width ? from + in_x * from_.strides.x : t.zeros;
          if (few_) t.tap[k] = std::copy_n(t.tap[k], g_.channels, t.few_taps + k * kMaxLanes) - g_.channels;
        }
      }
      const std::int64_t whole = few_ ? g_.channels : g_.channels / kMaxLanes * kMaxLanes;
      run_kernel(t, 0, 0, whole, line + x * stride, residual(t, 0, x));
      // The last vector overlaps the one before, so that nothing behind the last channel is read.
      const std::int64_t last = g_.channels - kMaxLanes;
      if (whole < g_.channels) run_kernel(t, last, last, kMaxLanes, line + x * stride + last, residual(t, last, x));
    }
  }

  const ConvSizes& g_;
  const Layer& l_;
  const Kernels& kernels_;
  const Input& from_;
  const Output& o_;
  const std::int64_t taps_, filters_;  // filters of an input channel
  const bool by_channel_, few_;        // few: fewer channels than are read at once
  const std::int64_t parts_;
  std::int64_t lines_, stripes_;  // lines of a task
};

// The tasks of a depthwise convolution of float activations whose channels are contiguous: some lines of outputs, of some
// channels each, which are whole blocks of all targets.
class FloatDepthwiseTasks {
 public:
  FloatDepthwiseTasks(const ConvSizes& g, const Layer& l, const Kernels& kernels, const Input& from, const Output& o)
      : g_(g), l_(l), kernels_(kernels), from_(from), o_(o) {
    std::int64_t together = kChannels;
    for (const QuantizedTarget& target : o.targets) together = std::lcm(together, target.tensor.format().layout.block_size);
    channels_ = std::min(together, g.channels);
    const std::int64_t line = std::max<std::int64_t>(1, g.out_width * channels_);
    lines_ = std::clamp<std::int64_t>(kTaskValues / line, 1, std::max<std::int64_t>(1, g.out_height));
    constexpr std::int64_t kOutputs = DepthwiseLineArgs::kOutputs;
    pixels_ = std::max<std::int64_t>(1, kStaged / (channels_ * kOutputs)) * kOutputs;
    parts_ = ceil_div(g.channels, channels_), stripes_ = ceil_div(g.out_height, lines_);
  }

  std::int64_t count() const { return g_.images * stripes_ * parts_; }

  void run(std::int64_t task) const {
    const std::int64_t first = task % parts_ * channels_, channels = std::min(channels_, g_.channels - first);
    const std::int64_t stripe = task / parts_ % stripes_, image = task / parts_ / stripes_;
    DepthwiseLineArgs a{};
    a.kernel_h = g_.kernel_h, a.kernel_w = g_.kernel_w, a.stride = g_.stride_w, a.dilation = g_.dilation_w;
    a.pixel_stride = from_.strides.x, a.width = g_.width, a.channels = channels;
    a.kds = l_.kds + first, a.post = l_.post.from(first);
    a.residual_stride = o_.residual.strides.x, a.output_stride = o_.values ? o_.strides.x : channels;
    const std::int64_t staged = o_.values ? 0 : pixels_ * channels;
    struct User;
    using Mine = Scratch<User>;
    Mine scratch(Mine::size<const float*>(g_.kernel_h) + Mine::size<float>(g_.kernel_size() * channels) +
                 Mine::size<float>(a.window_size()) + Mine::size<float>(staged));
    const float** const line = scratch.take<const float*>(g_.kernel_h);
    a.line = line, a.weight = converted(first, channels, scratch.take<float>(g_.kernel_size() * channels));
    a.window = scratch.take<float>(a.window_size());
    float* const finished = scratch.take<float>(staged);
    for (std::int64_t y = stripe * lines_; y < std::min(g_.out_height, (stripe + 1) * lines_); ++y) {
      for (std::int64_t ky = 0; ky < g_.kernel_h; ++ky) {
        line[ky] = input_line(g_, from_, image, y, ky);
        if (line[ky]) line[ky] += first;
      }
      for (std::int64_t x = 0; x < g_.out_width; x += pixels_) {
        a.outputs = std::min(pixels_, g_.out_width - x), a.first = x * g_.stride_w - g_.pad_w;
        a.output = o_.values ? at(o_.values, o_.strides, image, y, x) + first : finished;
        if (o_.residual.values) a.residual = at(o_.residual.values, o_.residual.strides, image, y, x) + first;
        kernels_.vector.depthwise_line(a);
        for (const QuantizedTarget& target : o_.targets)
          quantize_into(target, kernels_, a.output, a.output_stride, (image * g_.out_height + y) * g_.out_width + x, a.outputs,
                        first, first + channels);
      }
    }
  }

 private:
  static constexpr std::int64_t kChannels = 64, kTaskValues = 8192;
  static constexpr std::int64_t kStaged = 4096;  // outputs that are quantized while they are in the first cache

  template <class T>
  static T* at(T* values, const Strides& s, std::int64_t image, std::int64_t y, std::int64_t x) {
    return values + image * s.image + y * s.y + x * s.x;
  }

  // Writes the integers of some filters as floats, [taps][channels].
  const float* converted(std::int64_t first, std::int64_t channels, float* to) const {
    const std::int32_t* const weight = reinterpret_cast<const std::int32_t*>(l_.weight) + first;
    for (std::int64_t k = 0; k < g_.kernel_size(); ++k)
      for (std::int64_t c = 0; c < channels; ++c) to[k * channels + c] = static_cast<float>(weight[k * g_.outputs + c]);
    return to;
  }

  const ConvSizes& g_;
  const Layer& l_;
  const Kernels& kernels_;
  const Input& from_;
  const Output& o_;
  std::int64_t channels_, lines_, pixels_;  // of a task; outputs that are finished together
  std::int64_t parts_, stripes_;
};

}  // namespace

void convolve_depthwise(const ConvSizes& g, const Layer& l, const Kernels& kernels, const Input& from, const Output& o) {
  const bool in_float = l.activation_bits == kFloatBits;
  if (in_float && (l.kds_shift || !g.takes_floats()))
    throw std::invalid_argument("a depthwise convolution of float activations has one block a filter and no shift");
  if (in_float && from.strides.channel == 1 && (!o.values || o.strides.channel == 1) && g.outputs == g.channels) {
    const FloatDepthwiseTasks tasks(g, l, kernels, from, o);
    return parallel(tasks.count(), [&](std::int64_t task) { tasks.run(task); });
  }
  const DepthwiseTasks tasks(g, l, kernels, from, o);
  parallel(tasks.count(), [&](std::int64_t task) { tasks.run(task); });
}

}  // namespace dsconv
