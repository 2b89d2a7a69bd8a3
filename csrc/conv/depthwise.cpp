#include <algorithm>
#include <stdexcept>

#include "../parallel.h"
#include "../scratch.h"
#include "conv.h"
#include "depthwise_parts.h"
#include "line_buffer.h"

namespace dsconv {
namespace {

// Returns the line of an image that a row of taps reads for line y of the outputs; null in the padding.
const float* input_line(const ConvSizes& g, const Input& from, std::int64_t image, std::int64_t y, std::int64_t ky) {
  const std::int64_t in_y = y * g.stride_h - g.pad_h + ky * g.dilation_h;
  const bool inside = in_y >= 0 && in_y < g.height;
  return inside ? from.values + image * from.strides.image + in_y * from.strides.y : nullptr;
}

// The tasks of a depthwise convolution: some lines of outputs each. Lanes are channels if those are contiguous
// (by_channel), and a task computes all channels; otherwise lanes are pixels of a line, and a task computes the filters
// of one input channel.
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
  // A line of outputs, and the scratch memory of its task.
  struct Line {
    std::int64_t image, part, y;
    PostOps post;
    const float** tap = nullptr;
    const float* zeros = nullptr;  // a pixel of the padding
    float* few_taps = nullptr;     // the taps of a pixel of few channels, padded to a vector
    float* finished = nullptr;     // outputs that are not stored as floats
    float* rearranged = nullptr;
  };

  // Pads the post-ops if there are fewer channels than a vector reads.
  void pad_post(PostOps& post, float (&padded)[3][kMaxLanes]) const {
    const float** const given[] = {&post.bias, &post.gain, &post.offset};
    for (int i = 0; i < 3; ++i)
      if (*given[i]) *given[i] = std::copy_n(*given[i], g_.channels, padded[i]) - g_.channels;
  }

  const float* residual(const Line& t, std::int64_t channel, std::int64_t x) const {
    const auto& [values, s] = o_.residual;
    return values ? values + t.image * s.image + channel * s.channel + t.y * s.y + x * s.x : nullptr;
  }

  // Computes `lanes` outputs, of filter `output` or of consecutive filters from there, which read from tap[k][first].
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
      // The last vector overlaps the previous one, so that nothing beyond the last channel is read.
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
  const bool by_channel_, few_;        // few: fewer channels than a vector reads
  const std::int64_t parts_;
  std::int64_t lines_, stripes_;  // lines of a task
};

}  // namespace

void convolve_depthwise(const ConvSizes& g, const Layer& l, const Kernels& kernels, const Input& from, const Output& o) {
  const bool in_float = l.activation_bits == kFloatBits;
  if (in_float && (l.kds_shift || !g.takes_floats()))
    throw std::invalid_argument("a depthwise convolution of float activations has one block a filter and no shift");
  if (in_float && from.strides.channel == 1 && (!o.values || o.strides.channel == 1) && g.outputs == g.channels) {
    constexpr std::int64_t kTaskValues = 8192;
    const DepthwiseParts parts(g, l, kernels, o);
    const std::int64_t line = std::max<std::int64_t>(1, g.out_width * parts.channels);
    const std::int64_t lines = std::clamp<std::int64_t>(kTaskValues / line, 1, std::max<std::int64_t>(1, g.out_height));
    const std::int64_t stripes = ceil_div(g.out_height, lines);
    return parallel(g.images * stripes * parts.count, [&](std::int64_t task) {
      const std::int64_t part = task % parts.count, top = task / parts.count % stripes * lines;
      const std::int64_t image = task / parts.count / stripes;
      parts.with_part(part, from.strides.x, [&](const auto& run) {
        const float* const values = from.values + image * from.strides.image + part * parts.channels;
        run(image, top, std::min(g.out_height, top + lines), [&](std::int64_t y) { return values + y * from.strides.y; });
      });
    });
  }
  const DepthwiseTasks tasks(g, l, kernels, from, o);
  parallel(tasks.count(), [&](std::int64_t task) { tasks.run(task); });
}

}  // namespace dsconv
