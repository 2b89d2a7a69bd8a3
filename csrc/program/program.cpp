#include "program.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <stdexcept>

#include "../parallel.h"
#include "../scratch.h"

namespace dsconv {
namespace {

constexpr std::int64_t kMaxImageBytes = std::int64_t{1} << 40;
constexpr double kMaxRunBytes = 1e18;
constexpr int kMaxBases = 1 << 20;
constexpr std::int64_t kTaskPixels = 96;

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

bool is_size(std::int64_t n) { return n > 0 && n < (std::int64_t{1} << 31); }

// Copies to (images, channels, pixels) from pixels and images with these strides.
void to_nchw(const float* from, std::int64_t image_stride, std::int64_t pixel_stride, std::int64_t images, std::int64_t channels,
             std::int64_t pixels, float* to) {
  constexpr std::int64_t kTogether = 64;  // a few cache lines of every pixel: the output stays in the L1 cache
  const std::int64_t parts = ceil_div(channels, kTogether);
  parallel(images * parts, [&](std::int64_t task) {
    const std::int64_t first = task % parts * kTogether, end = std::min(channels, first + kTogether);
    const float* read = from + task / parts * image_stride;
    float* written = to + task / parts * channels * pixels;
    for (std::int64_t p = 0; p < pixels; ++p)
      for (std::int64_t c = first; c < end; ++c) written[c * pixels + p] = read[p * pixel_stride + c];
  });
}

}  // namespace

int Program::add_float(const FloatTensor& v) {
  require(v.base >= 0 && v.base < kMaxBases && v.offset >= 0 && v.offset < kMaxImageBytes && v.offset % 64 == 0 && v.first >= 0 &&
              is_size(v.channels) && is_size(v.height) && is_size(v.width),
          "values: sizes and places are not negative");
  const Strides& s = v.strides;
  require(s.image >= 0 && s.channel >= 0 && s.y >= 0 && s.x >= 0, "values: strides are not negative");
  // In floating point, so that no product overflows; accepted sizes are small enough to be exact.
  const auto far = [](std::int64_t size, std::int64_t stride) {
    return static_cast<double>(size - 1) * static_cast<double>(stride);
  };
  const double last = static_cast<double>(v.first) + far(v.channels, s.channel) + far(v.height, s.y) + far(v.width, s.x);
  require(s.image < kMaxImageBytes / 4 && last < static_cast<double>(std::max<std::int64_t>(s.image, 1)),
          "values: a tensor goes beyond its memory");
  const std::int64_t end = v.offset + ceil_div(s.image * 4, 64) * 64;
  if (v.base == 0) bytes_ = std::max(bytes_, end);
  largest_ = std::max(largest_, end);
  bases_ = std::max(bases_, v.base + 1);
  floats_.push_back(v);
  return static_cast<int>(floats_.size()) - 1;
}

std::int64_t Program::quantized_bytes(const ActivationFormat& format, const PaddedGrid& grid) {
  const BlockLayout& layout = format.layout;
  require(
      is_size(layout.depth) && layout.block_size > 0 && layout.block_size <= kMaxBlockSize && layout.block_size % 8 == 0 &&
          is_size(format.groups) && is_size(grid.images) && is_size(grid.height) && is_size(grid.width) && grid.pad_h >= 0 &&
          grid.pad_w >= 0 &&
          1.0 * format.groups * layout.depth * grid.images * (grid.height + 2.0 * grid.pad_h) * (grid.width + 2.0 * grid.pad_w) <
              kMaxImageBytes,
      "quantized: sizes are not negative");
  return QuantizedTensor::bytes(format, grid);
}

int Program::add_quantized(const ActivationFormat& format, const PaddedGrid& grid, std::int64_t offset) {
  const std::int64_t bytes = quantized_bytes(format, grid);
  require(offset >= 0 && offset < kMaxImageBytes && offset % 64 == 0, "quantized: expected an offset of a multiple of 64");
  quantized_.push_back({format, grid, offset});
  bytes_ = std::max(bytes_, offset + bytes);
  largest_ = std::max(largest_, bytes_);
  return static_cast<int>(quantized_.size()) - 1;
}

const FloatTensor& Program::float_tensor(int id) const {
  require(id >= 0 && id < static_cast<int>(floats_.size()), "no such float tensor");
  return floats_[id];
}

const Program::QuantizedSlot& Program::quantized_slot(int id) const {
  require(id >= 0 && id < static_cast<int>(quantized_.size()), "no such quantized tensor");
  return quantized_[id];
}

std::uintptr_t Program::base(const Run& run, int number) const {
  require(run.bases[number], "run: expected the address of every tensor that its steps use");
  return run.bases[number];
}

float* Program::address(const Run& run, const FloatTensor& v) const {
  return reinterpret_cast<float*>(base(run, v.base) + v.offset * run.images) + v.first;
}

Input Program::input(const Run& run, int id) const {
  if (id < 0) return {};
  const FloatTensor& v = floats_[id];
  return {address(run, v), v.strides};
}

Output Program::output(const Run& run, const StepOutputs& to, std::span<const QuantizedTarget> targets) const {
  const Input values = input(run, to.values);
  return {const_cast<float*>(values.values), values.strides, input(run, to.residual), targets};
}

QuantizedTensor Program::quantized(const Run& run, int id) const {
  const QuantizedSlot& t = quantized_[id];
  PaddedGrid grid = t.grid;
  grid.images *= run.images;
  return {t.format, grid, reinterpret_cast<std::byte*>(base(run, 0) + t.offset * run.images)};
}

// Returns the targets, prepared for this number of channels.
std::vector<QuantizedTarget> Program::targets(const Run& run, const StepOutputs& to, std::int64_t channels) const {
  std::vector<QuantizedTarget> all;
  for (const auto& [id, first] : to.targets) {
    all.push_back({quantized(run, id), first});
    all.back().tensor.begin(first, channels);
  }
  return all;
}

// `whole`: the step computes all channels before it quantizes any.
void Program::check(const StepOutputs& to, std::int64_t channels, std::int64_t height, std::int64_t width, bool whole) const {
  const auto alike = [&](const FloatTensor& v) {
    return v.channels == channels && v.height == height && v.width == width && v.dense();
  };
  if (to.values >= 0) require(alike(float_tensor(to.values)), "outputs: expected a dense tensor of their shape");
  if (to.residual >= 0) require(alike(float_tensor(to.residual)), "residual: expected a dense tensor of the outputs' shape");
  for (const auto& [id, first] : to.targets) {
    const QuantizedSlot& t = quantized_slot(id);
    const BlockLayout& layout = t.format.layout;
    const auto at_block = [&](std::int64_t channel) { return channel % layout.depth % layout.block_size == 0; };
    require(t.grid.images * t.grid.height == height && t.grid.width == width && first >= 0 &&
                first <= layout.depth * t.format.groups - channels && at_block(first) && at_block(first + channels) &&
                (whole || t.format.groups == 1),
            "targets: expected whole blocks of a tensor of the outputs' size");
  }
  require(to.values >= 0 || !to.targets.empty(), "a step without an output");
}

void Program::convolve(const ConvSizes& sizes, const Layer& layer, int from, int input_id, const StepOutputs& to) {
  ConvSizes g = sizes;
  g.images = 1;
  require(g.valid(), "the sizes of the convolution do not agree");
  require(g.groups == 1 || g.depthwise() || to.targets.empty(), "a grouped convolution cannot quantize its outputs");
  check(to, g.outputs, g.out_depth * g.out_height, g.out_width, g.depthwise());
  for (const auto& [id, first] : to.targets)
    require(quantized_slot(id).grid.images == g.out_depth, "targets: expected a tensor of as many frames as the outputs");
  if (from >= 0) {
    const FloatTensor& v = float_tensor(from);
    require(v.channels == g.channels && v.height == g.depth * g.height && v.width == g.width,
            "expected an input of the layer's sizes");
  } else {
    require(!g.flat && !g.winograd, "flattened blocks and Winograd need a float input");
  }
  if (!g.flat && !g.winograd) {
    const QuantizedSlot& t = quantized_slot(input_id);
    const PaddedGrid needed = g.grid();
    require(t.format == layer.format(g), "expected an input quantized as the layer wants it");
    require(t.grid.images == needed.images && t.grid.height == needed.height && t.grid.width == needed.width &&
                t.grid.pad_h >= needed.pad_h && t.grid.pad_w >= needed.pad_w,
            "expected a quantized input of the layer's sizes");
  }
  Layer l = layer;
  l.post.activation = to.activation;
  layers_.push_back({g, l, from, input_id, to, steps_.size()});
  if (g.takes_floats() && l.activation_bits == kFloatBits && !l.kds_shift && g.outputs == g.channels)
    joinable_.push_back({from, steps_.size(), [=, this](const Run& run, const FirstLayer& first) {
                           ConvSizes now = g;
                           now.images = run.images;
                           const std::vector<QuantizedTarget> into = targets(run, to, g.outputs);
                           convolve_joined(first, now, l, kernels_, output(run, to, into));
                         }});
  steps_.push_back([=, this](const Run& run) {
    ConvSizes now = g;
    now.images = run.images;
    const std::vector<QuantizedTarget> into = targets(run, to, g.outputs);
    if (now.flat || now.winograd) return dsconv::convolve(now, l, kernels_, input(run, from), output(run, to, into));
    dsconv::convolve(now, l, kernels_, quantized(run, input_id), output(run, to, into));
  });
}

void Program::join() {
  const std::size_t last = steps_.size() - 1;
  require(!joinable_.empty() && joinable_.back().step == last, "join: expected a step that reads lines as the last one");
  const Joinable second = joinable_.back();
  const auto found = std::find_if(layers_.begin(), layers_.end(), [&](const LayerStep& step) { return step.step + 1 == last; });
  require(found != layers_.end(), "join: expected a layer as the step before");
  const LayerStep first = *found;
  require(makes_lines(first.g) && first.to.values >= 0 && first.to.values == second.from && first.to.targets.empty() &&
              first.to.residual < 0,
          "join: expected a convolution to float32 alone that the last step reads");
  steps_[first.step] = [](const Run&) {};
  steps_[last] = [=, this](const Run& run) {
    ConvSizes g = first.g;
    g.images = run.images;
    second.together(run, {g, first.l, first.g.flat ? QuantizedTensor() : quantized(run, first.input),
                          first.g.flat ? input(run, first.from) : Input{}});
  };
}

// Quantizes an input in NCHW without other operations.
void Program::quantize_whole(const FloatTensor& v, const StepOutputs& to) {
  require(std::all_of(to.targets.begin(), to.targets.end(),
                      [&](const auto& target) {
                        const ActivationFormat& format = quantized_slot(target.first).format;
                        return target.second == 0 && format.layout.depth * format.groups == v.channels;
                      }),
          "expected a dense tensor, or nothing to do but to quantize it whole");
  steps_.push_back([=, this](const Run& run) {
    for (const auto& [id, first] : to.targets)
      quantize(quantized(run, id), kernels_, address(run, v), v.strides, quantized_slot(id).grid.images);
  });
}

void Program::map(int from, const std::vector<MapOperation>& given, const StepOutputs& to) {
  const FloatTensor v = float_tensor(from);
  std::vector<MapOperation> all = given;
  bool by_image = false;  // an operand is a tensor of the image
  for (const MapOperation& o : all) {
    const bool of_pixel = o.operation == Operation::normalize || o.operation == Operation::softmax;
    require(o.tensor < 0 || !(of_pixel || o.operation == Operation::activate), "map: expected an operation that has an operand");
    require((o.operation != Operation::normalize && o.operation != Operation::scale) || (o.constants && o.offset),
            "map: expected factors and offsets of all channels");
    if (o.tensor < 0) continue;
    const FloatTensor& other = float_tensor(o.tensor);
    require(other.dense() && (other.channels == v.channels || other.channels == 1) &&
                (other.pixels() == 1 || (other.height == v.height && other.width == v.width)),
            "map: expected a dense operand of the input's channels or one, of its size or of one pixel");
    by_image |= other.pixels() == 1;
  }
  check(to, v.channels, v.height, v.width, true);
  require(to.residual < 0 && to.activation.kind == Activation::none, "map: expected operations in the place of post-ops");
  if (!v.dense()) {
    require(all.empty() && to.values < 0, "expected a dense tensor, or nothing to do but to quantize it whole");
    return quantize_whole(v, to);
  }
  if (all.empty() && to.values >= 0) all.push_back({Operation::activate, {}, -1, nullptr, nullptr});  // a copy
  steps_.push_back([=, this](const Run& run) {
    const std::vector<QuantizedTarget> into = targets(run, to, v.channels);
    const float* values = address(run, v);
    const Input output = input(run, to.values);
    const std::int64_t pixels = by_image ? v.pixels() : run.images * v.pixels();  // consecutive pixels with the same operands
    const std::int64_t tasks = ceil_div(pixels, kTaskPixels);
    parallel((by_image ? run.images : 1) * tasks, [&](std::int64_t task) {
      const std::int64_t image = task / tasks, begin = task % tasks * kTaskPixels;
      const std::int64_t first = image * v.pixels() + begin, count = std::min(kTaskPixels, pixels - begin);
      struct User;
      Scratch<User> scratch(all.empty() || output.values ? 0 : count * v.channels * 4);
      const float* made = values + first * v.strides.x;
      std::int64_t stride = v.strides.x;
      if (!all.empty()) {
        float* const written =
            output.values ? const_cast<float*>(output.values) + first * output.strides.x : scratch.take<float>(0);
        stride = output.values ? output.strides.x : v.channels;
        // Several operations are applied to values while these are in the L1 cache.
        constexpr std::int64_t kCachedValues = 4096;
        const std::int64_t part = all.size() == 1 ? count : std::max<std::int64_t>(1, kCachedValues / v.channels);
        for (std::int64_t p = 0; p < count; p += part) {
          MapArgs a{};
          a.input = made + p * v.strides.x, a.input_stride = v.strides.x;
          a.output = written + p * stride, a.output_stride = stride;
          a.pixels = std::min(part, count - p), a.channels = v.channels;
          for (const MapOperation& o : all) {
            a.operation = o.operation, a.activation = o.activation;
            a.operand = o.constants ? o.constants : &o.activation.alpha, a.offset = o.offset;
            a.operand_stride = 0, a.one_operand = !o.constants;
            if (o.tensor >= 0) {
              const FloatTensor& other = floats_[o.tensor];
              const bool one = other.pixels() == 1;
              a.operand = address(run, other) + (one ? image * other.strides.image : (first + p) * other.strides.x);
              a.operand_stride = one ? 0 : other.strides.x, a.one_operand = other.channels == 1 && v.channels > 1;
            }
            kernels_.vector.map(a);
            a.input = a.output, a.input_stride = stride;
          }
        }
        made = written;
      }
      for (const QuantizedTarget& target : into) quantize_into(target, kernels_, made, stride, first, count, 0, v.channels);
    });
  });
}

namespace {

// Returns the taps, from `begin` to before `end`, of a window at `start` that are inside the image.
Span inside(std::int64_t start, std::int64_t kernel, std::int64_t dilation, std::int64_t size) {
  const std::int64_t begin = start < 0 ? ceil_div(-start, dilation) : 0;
  return {begin, start < size ? std::min(kernel, (size - 1 - start) / dilation + 1) : begin};
}

// Pools one line of outputs. Windows that overlap share the maxima over the lines that they cover (`by_line`).
class PoolLine {
 public:
  PoolLine(const Kernels& kernels, const FloatTensor& v, const PoolWindow& w, bool by_line, const float** tap, float* maxima)
      : pool_(kernels.vector.pool), v_(v), w_(w), by_line_(by_line), tap_(tap), maxima_(maxima) {}

  // Reads the lines of an image at line_at(y), and writes outputs with stride `stride`.
  template <class LineAt>
  void run(LineAt line_at, std::int64_t y, std::int64_t out_width, float* to, std::int64_t stride) const {
    const std::int64_t top = y * w_.stride_h - w_.pad_h;
    const Span rows = inside(top, w_.kernel_h, w_.dilation_h, v_.height);
    if (by_line_) {
      int lines = 0;
      for (std::int64_t ky = rows.begin; ky < rows.end; ++ky) tap_[lines++] = line_at(top + ky * w_.dilation_h);
      pool_({tap_, lines, v_.width * v_.channels, 0.0f, maxima_});
    }
    for (std::int64_t x = 0; x < out_width; ++x) {
      int taps = 0;
      const std::int64_t left = x * w_.stride_w - w_.pad_w;
      const Span columns = inside(left, w_.kernel_w, w_.dilation_w, v_.width);
      for (std::int64_t ky = rows.begin; ky < (by_line_ ? std::min(rows.begin + 1, rows.end) : rows.end); ++ky) {
        const float* from = by_line_ ? maxima_ : line_at(top + ky * w_.dilation_h);
        for (std::int64_t kx = columns.begin; kx < columns.end; ++kx)
          tap_[taps++] = from + (left + kx * w_.dilation_w) * v_.strides.x;
      }
      if (taps || w_.average) pool_({tap_, taps, v_.channels, w_.average ? divisor(top, left, taps) : 0.0f, to + x * stride});
      else std::fill_n(to + x * stride, v_.channels, -std::numeric_limits<float>::infinity());  // a window of padding alone
    }
  }

 private:
  float divisor(std::int64_t top, std::int64_t left, int taps) const {
    // Padding counts up to the end that the window would have if the output's size were not rounded up.
    const std::int64_t counted =
        (std::min(top + w_.kernel_h, v_.height + w_.pad_h) - top) * (std::min(left + w_.kernel_w, v_.width + w_.pad_w) - left);
    return static_cast<float>(w_.divisor ? w_.divisor : w_.count_padding ? counted : taps);
  }

  void (*pool_)(const PoolArgs&);
  const FloatTensor& v_;
  const PoolWindow& w_;
  bool by_line_;
  const float** tap_;
  float* maxima_;
};

}  // namespace

void Program::pool(int from, const PoolWindow& w, std::int64_t out_height, std::int64_t out_width, const StepOutputs& to) {
  const FloatTensor v = float_tensor(from);
  require(v.strides.channel == 1, "expected a tensor whose channels lie side by side");
  for (const std::int64_t n : {w.kernel_h, w.kernel_w, w.stride_h, w.stride_w, w.dilation_h, w.dilation_w, out_height, out_width})
    require(is_size(n), "pool: expected positive sizes");
  require(w.pad_h >= 0 && w.pad_w >= 0 && w.pad_h < w.kernel_h * w.dilation_h && w.pad_w < w.kernel_w * w.dilation_w &&
              is_size(w.kernel_h * w.kernel_w) && (out_height - 1) * w.stride_h < v.height + w.pad_h &&
              (out_width - 1) * w.stride_w < v.width + w.pad_w && w.divisor >= 0 && to.residual < 0 &&
              to.activation.kind == Activation::none,
          "pool: expected a padding smaller than the kernel, windows that begin within the image, and nothing else to do");
  check(to, v.channels, out_height, out_width, true);
  // A line of outputs, of the image with lines at line_at(y).
  const auto line_of = [=, this](const FloatTensor& v, const Input& output, std::span<const QuantizedTarget> into,
                                 std::int64_t line, auto line_at) {
    const bool by_line = !w.average && w.kernel_h > 1 && w.kernel_w > w.stride_w && v.strides.x == v.channels;
    struct User;
    using Mine = Scratch<User>;
    const std::int64_t kept = output.values ? 0 : out_width * v.channels, maxima = by_line ? v.width * v.channels : 0;
    const std::int64_t taps = std::min(w.kernel_h, v.height) * std::min(w.kernel_w, v.width);
    Mine scratch(Mine::template size<const float*>(taps) + Mine::template size<float>(kept) + Mine::template size<float>(maxima));
    const float** const tap = scratch.template take<const float*>(taps);
    float* made = scratch.template take<float>(kept);
    if (output.values) made = const_cast<float*>(output.values) + line * out_width * output.strides.x;
    const std::int64_t stride = output.values ? output.strides.x : v.channels;
    PoolLine(kernels_, v, w, by_line, tap, scratch.template take<float>(maxima))
        .run(line_at, line % out_height, out_width, made, stride);
    for (const QuantizedTarget& target : into)
      quantize_into(target, kernels_, made, stride, line * out_width, out_width, 0, v.channels);
  };
  joinable_.push_back(
      {from, steps_.size(), [=, this](const Run& run, const FirstLayer& first) {
         const std::vector<QuantizedTarget> into = targets(run, to, v.channels);
         const Input output = input(run, to.values);
         FloatTensor lines = v;
         lines.strides.x = v.channels;
         const std::int64_t read = (w.kernel_h - 1) * w.dilation_h + 1;
         const Stripes stripes(out_height, run.images);
         parallel(run.images * stripes.count, [&](std::int64_t task) {
           const std::int64_t image = task / stripes.count, top = task % stripes.count * stripes.lines;
           const std::int64_t bottom = std::min(out_height, top + stripes.lines);
           const auto end_of = [&](std::int64_t y) { return std::min(v.height, (y - 1) * w.stride_h - w.pad_h + read); };
           struct User;
           Scratch<User> scratch(LineRing::bytes(first.g, read, v.channels));
           LineRing ring(first, kernels_, image, 0, v.channels, read, std::max<std::int64_t>(0, top * w.stride_h - w.pad_h),
                         end_of(bottom), scratch.template take<float>(0));
           for (std::int64_t y = top; y < bottom; ++y) {
             ring.make(end_of(y + 1));
             line_of(lines, output, into, image * out_height + y, [&](std::int64_t line) { return ring.at(line); });
           }
         });
       }});
  steps_.push_back([=, this](const Run& run) {
    const std::vector<QuantizedTarget> into = targets(run, to, v.channels);
    const Input output = input(run, to.values);
    parallel(run.images * out_height, [&](std::int64_t line) {
      const float* const values = address(run, v) + line / out_height * v.strides.image;
      line_of(v, output, into, line, [&](std::int64_t y) { return values + y * v.strides.y; });
    });
  });
}

void Program::average(int from, int lanes, int to) {
  const FloatTensor v = float_tensor(from), made = float_tensor(to);
  require(v.dense() && made.strides.channel == 1 && made.channels == v.channels && made.pixels() == 1 && lanes > 0 &&
              lanes <= kMaxLanes,
          "average: expected dense tensors of the same channels, the second of one pixel, and 1 to 16 lanes");
  steps_.push_back([=, this](const Run& run) {
    constexpr std::int64_t kTogether = 4 * kMaxLanes;
    const std::int64_t parts = ceil_div(v.channels, kTogether);
    parallel(run.images * parts, [&](std::int64_t task) {
      const std::int64_t image = task / parts, first = task % parts * kTogether;
      AverageArgs a{};
      a.input = address(run, v) + image * v.strides.image + first, a.stride = v.strides.x;
      a.pixels = v.pixels(), a.channels = std::min(kTogether, v.channels - first), a.lanes = lanes;
      a.output = address(run, made) + image * made.strides.image + first;
      kernels_.vector.average(a);
    });
  });
}

void Program::moments(int from, std::int64_t groups, const float* weight, float epsilon, int mean, int scale) {
  const FloatTensor v = float_tensor(from), means = float_tensor(mean), scales = float_tensor(scale);
  const auto of_channels = [&](const FloatTensor& t) { return t.dense() && t.channels == v.channels && t.pixels() == 1; };
  require(v.dense() && of_channels(means) && of_channels(scales) && groups > 0 && v.channels % groups == 0,
          "moments: expected dense tensors of the same channels, the results of one pixel, and groups that divide them");
  const std::int64_t group = v.channels / groups;
  steps_.push_back([=, this](const Run& run) {
    const std::int64_t together = std::max<std::int64_t>(1, 4 * kMaxLanes / group) * group, parts = ceil_div(v.channels, together);
    parallel(run.images * parts, [&](std::int64_t task) {
      const std::int64_t image = task / parts, first = task % parts * together;
      MomentsArgs a{};
      a.input = address(run, v) + image * v.strides.image + first, a.stride = v.strides.x, a.pixels = v.pixels();
      a.channels = std::min(together, v.channels - first), a.group = group, a.epsilon = epsilon;
      a.weight = weight ? weight + first : nullptr;
      a.mean = address(run, means) + image * means.strides.image + first;
      a.scale = address(run, scales) + image * scales.strides.image + first;
      kernels_.vector.moments(a);
    });
  });
}

namespace {

// A loop, with strides in values.
struct Turns {
  std::int64_t size, read, written;
};

void copy_in(std::span<const Turns> loops, const float* from, float* to) {
  const auto [size, read, written] = loops.front();
  if (loops.size() > 1) {
    for (std::int64_t i = 0; i < size; ++i) copy_in(loops.subspan(1), from + i * read, to + i * written);
  } else if (read == 1 && written == 1) {
    std::copy_n(from, size, to);
  } else {
    for (std::int64_t i = 0; i < size; ++i) to[i * written] = from[i * read];
  }
}

// Whether loops with the strides `at` stay within a tensor.
bool within(const FloatTensor& v, const std::vector<Loop>& loops, std::array<std::int64_t, 3> Loop::* at) {
  const std::int64_t sizes[] = {v.channels, v.height, v.width};
  for (int dim = 0; dim < 3; ++dim) {
    std::int64_t last = 0;
    for (const Loop& loop : loops) {
      const std::int64_t turn = (loop.*at)[dim];
      if (turn && !is_size(turn)) return false;
      last += (loop.size - 1) * turn;
      if (last >= sizes[dim]) return false;
    }
  }
  return true;
}

// Whether loops write to a place at most once: a turn of each goes further than all that are shorter.
bool write_once(std::vector<Turns> loops) {
  std::sort(loops.begin(), loops.end(), [](const Turns& a, const Turns& b) { return a.written < b.written; });
  std::int64_t reach = 0;
  for (const Turns& loop : loops) {
    if (loop.size > 1 && loop.written <= reach) return false;
    reach += (loop.size - 1) * loop.written;
  }
  return true;
}

}  // namespace

void Program::rearrange(int from, const std::vector<Loop>& loops, int to) {
  const FloatTensor v = float_tensor(from), made = float_tensor(to);
  double values = 1;
  for (const Loop& loop : loops) {
    require(is_size(loop.size), "rearrange: expected loops of positive sizes");
    values *= static_cast<double>(loop.size);
  }
  const auto all_of = [&](const FloatTensor& t) {
    return static_cast<double>(t.channels) * static_cast<double>(t.height) * static_cast<double>(t.width) == values;
  };
  require(!loops.empty() && made.dense() && all_of(v) && all_of(made) && within(v, loops, &Loop::read) &&
              within(made, loops, &Loop::written),
          "rearrange: expected loops over the values of two tensors, the second of them dense");
  const auto turns = [&loops](const Strides& s, std::array<std::int64_t, 3> Loop::* at, std::size_t i) {
    const auto& turn = loops[i].*at;
    return loops[i].size == 1 ? 0 : turn[0] * s.channel + turn[1] * s.y + turn[2] * s.x;
  };
  std::vector<Turns> in_values;
  for (std::size_t i = 0; i < loops.size(); ++i)
    in_values.push_back({loops[i].size, turns(v.strides, &Loop::read, i), turns(made.strides, &Loop::written, i)});
  require(write_once(in_values), "rearrange: expected loops that write every value of the result");
  in_values.push_back({1, 1, 1});
  steps_.push_back([=, this](const Run& run) {
    const auto [tasks, read, written] = in_values.front();
    parallel(run.images * tasks, [&](std::int64_t task) {
      const std::int64_t image = task / tasks, i = task % tasks;
      copy_in(std::span(in_values).subspan(1), address(run, v) + image * v.strides.image + i * read,
              address(run, made) + image * made.strides.image + i * written);
    });
  });
}

void Program::pick(int from, const std::vector<std::int64_t>& rows, const std::vector<std::int64_t>& columns, float fill,
                   const StepOutputs& to) {
  const FloatTensor v = float_tensor(from);
  const auto of = [](const std::vector<std::int64_t>& all, std::int64_t size) {
    return !all.empty() && std::all_of(all.begin(), all.end(), [=](std::int64_t i) { return i >= -1 && i < size; });
  };
  require(of(rows, v.height) && of(columns, v.width), "pick: expected rows and columns of the input, or -1");
  const std::int64_t out_width = static_cast<std::int64_t>(columns.size());
  add_lines(v, static_cast<std::int64_t>(rows.size()), out_width, to,
            [=](const float* values, std::int64_t y, float* pixel, std::int64_t stride) {
              for (std::int64_t x = 0; x < out_width; ++x, pixel += stride) {
                const bool inside = rows[y] >= 0 && columns[x] >= 0;
                const float* const read = inside ? values + rows[y] * v.strides.y + columns[x] * v.strides.x : nullptr;
                if (!inside) std::fill_n(pixel, v.channels, fill);
                else if (v.strides.channel == 1) std::copy_n(read, v.channels, pixel);
                else
                  for (std::int64_t c = 0; c < v.channels; ++c) pixel[c] = read[c * v.strides.channel];
              }
            });
}

void Program::interpolate(int from, const std::vector<Between>& rows, const std::vector<Between>& columns, std::int64_t split,
                          Interpolation first, Interpolation rest, const StepOutputs& to) {
  const FloatTensor v = float_tensor(from);
  const auto of = [](const std::vector<Between>& all, std::int64_t size) {
    return !all.empty() && std::all_of(all.begin(), all.end(), [=](const Between& b) {
      return b.one >= 0 && b.one < size && b.other >= 0 && b.other < size;
    });
  };
  require(of(rows, v.height) && of(columns, v.width) && v.strides.channel == 1 && split >= 0 && split <= v.channels,
          "interpolate: expected rows and columns of an input whose channels lie side by side");
  const std::int64_t out_width = static_cast<std::int64_t>(columns.size());
  add_lines(v, static_cast<std::int64_t>(rows.size()), out_width, to,
            [=, this](const float* values, std::int64_t y, float* pixel, std::int64_t stride) {
              const Between& row = rows[y];
              const float *const above = values + row.one * v.strides.y, *const below = values + row.other * v.strides.y;
              for (std::int64_t x = 0; x < out_width; ++x, pixel += stride) {
                const Between& column = columns[x];
                const std::int64_t left = column.one * v.strides.x, right = column.other * v.strides.x;
                kernels_.vector.interpolate({{above + left, above + right, below + left, below + right},
                                             {row.weight, row.other_weight},
                                             {column.weight, column.other_weight},
                                             v.channels,
                                             split,
                                             first,
                                             rest,
                                             pixel});
              }
            });
}

void Program::average_windows(int from, const std::vector<Span>& rows, const std::vector<Span>& columns, bool at_once,
                              const StepOutputs& to) {
  const FloatTensor v = float_tensor(from);
  const auto of = [](const std::vector<Span>& all, std::int64_t size) {
    return !all.empty() &&
           std::all_of(all.begin(), all.end(), [=](const Span& s) { return s.begin >= 0 && s.begin < s.end && s.end <= size; });
  };
  const auto largest = [](const std::vector<Span>& all) {
    std::int64_t most = 0;
    for (const Span& s : all) most = std::max(most, s.end - s.begin);
    return most;
  };
  require(of(rows, v.height) && of(columns, v.width) && v.strides.channel == 1 && is_size(v.pixels()),
          "average_windows: expected rows and columns of an input whose channels lie side by side");
  const std::int64_t taps_of_largest = largest(rows) * largest(columns);
  const std::int64_t out_width = static_cast<std::int64_t>(columns.size());
  add_lines(v, static_cast<std::int64_t>(rows.size()), out_width, to,
            [=, this](const float* values, std::int64_t y, float* pixel, std::int64_t stride) {
              struct User;
              using Mine = Scratch<User>;
              Mine scratch(Mine::size<const float*>(taps_of_largest));
              const float** const tap = scratch.take<const float*>(taps_of_largest);
              for (std::int64_t x = 0; x < out_width; ++x, pixel += stride) {
                int taps = 0;
                for (std::int64_t in_y = rows[y].begin; in_y < rows[y].end; ++in_y)
                  for (std::int64_t in_x = columns[x].begin; in_x < columns[x].end; ++in_x)
                    tap[taps++] = values + in_y * v.strides.y + in_x * v.strides.x;
                const auto size = [](const Span& s) { return static_cast<float>(s.end - s.begin); };
                PoolArgs a{tap, taps, v.channels, static_cast<float>(taps), pixel};
                if (!at_once) a.divisor = size(rows[y]), a.second_divisor = size(columns[x]);
                kernels_.vector.pool(a);
              }
            });
}

// The step has no other operations.
void Program::add_lines(const FloatTensor& v, std::int64_t out_height, std::int64_t out_width, const StepOutputs& to, Line line) {
  require(to.residual < 0 && to.activation.kind == Activation::none, "outputs: expected nothing else to do");
  check(to, v.channels, out_height, out_width, true);
  steps_.push_back([=, this](const Run& run) {
    const std::vector<QuantizedTarget> into = targets(run, to, v.channels);
    const Input output = input(run, to.values);
    parallel(run.images * out_height, [&](std::int64_t i) {
      struct User;
      Scratch<User> scratch(output.values ? 0 : out_width * v.channels * 4);
      float* const made =
          output.values ? const_cast<float*>(output.values) + i * out_width * output.strides.x : scratch.take<float>(0);
      const std::int64_t stride = output.values ? output.strides.x : v.channels;
      line(address(run, v) + i / out_height * v.strides.image, i % out_height, made, stride);
      for (const QuantizedTarget& target : into)
        quantize_into(target, kernels_, made, stride, i * out_width, out_width, 0, v.channels);
    });
  });
}

void Program::flatten(int from, int to) {
  const FloatTensor v = float_tensor(from), made = float_tensor(to);
  const std::int64_t count = v.channels * v.pixels();
  require(v.dense() && made.dense() && made.channels == count && made.pixels() == 1, "expected dense tensors of as many values");
  require(made.strides.image == count, "expected a tensor of its own for the result");
  steps_.push_back([=, this](const Run& run) {
    to_nchw(address(run, v), v.strides.image, v.strides.x, run.images, v.channels, v.pixels(), address(run, made));
  });
}

std::int64_t Program::bytes(std::int64_t images) const {
  require(images >= 0 && static_cast<double>(images) * static_cast<double>(largest_) < kMaxRunBytes,
          "images: expected a number of images whose tensors fit into memory");
  return images * bytes_;
}

void Program::run(std::int64_t images, std::span<const std::uintptr_t> bases, int first, int last, double* seconds) const {
  bytes(images);
  require(static_cast<int>(bases.size()) >= bases_ && first >= 0 && last <= static_cast<int>(steps_.size()), "no such run");
  require(bases[0] % 64 == 0, "run: expected memory aligned to 64");
  if (!images) return;
  const Run run{images, bases};
  using Clock = std::chrono::steady_clock;
  for (int step = first; step < last; ++step) {
    const auto since = Clock::now();
    steps_[step](run);
    if (seconds) seconds[step] += std::chrono::duration<double>(Clock::now() - since).count();
  }
}

}  // namespace dsconv
