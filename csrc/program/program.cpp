#include "program.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>

#include "../parallel.h"
#include "../scratch.h"

namespace dsconv {
namespace {

constexpr std::int64_t kMost = std::int64_t{1} << 40;  // bytes an image
constexpr int kMostBases = 1 << 20;
constexpr double kMostBytes = 1e18;   // of a run
constexpr std::int64_t kPixels = 96;  // that a task takes at a time

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

bool is_size(std::int64_t n) { return n > 0 && n < (std::int64_t{1} << 31); }

// To (images, channels, pixels), from pixels and images that are so many values apart.
void to_lines(const float* from, std::int64_t image_stride, std::int64_t pixel_stride, std::int64_t images, std::int64_t channels,
              std::int64_t pixels, float* to) {
  // A few cache lines of every pixel, so that what is written stays in the first cache.
  constexpr std::int64_t kTogether = 64;
  const std::int64_t parts = (channels + kTogether - 1) / kTogether;
  parallel(images * parts, [&](std::int64_t task) {
    const std::int64_t first = task % parts * kTogether, end = std::min(channels, first + kTogether);
    const float* read = from + task / parts * image_stride;
    float* written = to + task / parts * channels * pixels;
    for (std::int64_t p = 0; p < pixels; ++p)
      for (std::int64_t c = first; c < end; ++c) written[c * pixels + p] = read[p * pixel_stride + c];
  });
}

}  // namespace

int Program::values(const Values& v) {
  require(v.base >= 0 && v.base < kMostBases && v.offset >= 0 && v.offset < kMost && v.offset % 64 == 0 && v.first >= 0 &&
              is_size(v.channels) && is_size(v.height) && is_size(v.width),
          "values: sizes and places are not negative");
  const Strides& s = v.strides;
  require(s.image >= 0 && s.channel >= 0 && s.y >= 0 && s.x >= 0, "values: strides are not negative");
  // In floating point, where no product overflows; what passes is small enough to be exact.
  const auto far = [](std::int64_t size, std::int64_t stride) {
    return static_cast<double>(size - 1) * static_cast<double>(stride);
  };
  const double last = static_cast<double>(v.first) + far(v.channels, s.channel) + far(v.height, s.y) + far(v.width, s.x);
  require(s.image < kMost / 4 && last < static_cast<double>(std::max<std::int64_t>(s.image, 1)),
          "values: a tensor goes beyond its memory");
  const std::int64_t end = v.offset + (s.image * 4 + 63) / 64 * 64;
  if (v.base == 0) bytes_ = std::max(bytes_, end);
  most_ = std::max(most_, end);
  bases_ = std::max(bases_, v.base + 1);
  values_.push_back(v);
  return static_cast<int>(values_.size()) - 1;
}

std::int64_t Program::quantized_bytes(const Format& format, const Grid& grid) {
  const Cut& cut = format.cut;
  require(is_size(cut.depth) && cut.block_size > 0 && cut.block_size <= kMaxBlock && cut.block_size % 8 == 0 &&
              is_size(format.groups) && is_size(grid.height) && is_size(grid.width) && grid.pad_h >= 0 && grid.pad_w >= 0 &&
              1.0 * format.groups * cut.depth * (grid.height + 2.0 * grid.pad_h) * (grid.width + 2.0 * grid.pad_w) < kMost,
          "quantized: sizes are not negative");
  return Quantized::bytes(format, grid);
}

int Program::quantized(const Format& format, const Grid& grid, std::int64_t offset) {
  Grid one = grid;
  one.images = 1;
  const std::int64_t bytes = quantized_bytes(format, one);
  require(offset >= 0 && offset < kMost && offset % 64 == 0, "quantized: expected an offset of a multiple of 64");
  tensors_.push_back({format, one, offset});
  bytes_ = std::max(bytes_, offset + bytes);
  most_ = std::max(most_, bytes_);
  return static_cast<int>(tensors_.size()) - 1;
}

const Values& Program::values_of(int id) const {
  require(id >= 0 && id < static_cast<int>(values_.size()), "no such float tensor");
  return values_[id];
}

const Program::Tensor& Program::tensor_of(int id) const {
  require(id >= 0 && id < static_cast<int>(tensors_.size()), "no such quantized tensor");
  return tensors_[id];
}

std::uintptr_t Program::base(const Run& run, int number) const {
  require(run.bases[number], "run: expected the address of every tensor that its steps use");
  return run.bases[number];
}

float* Program::address(const Run& run, const Values& v) const {
  return reinterpret_cast<float*>(base(run, v.base) + v.offset * run.images) + v.first;
}

Input Program::input(const Run& run, int id) const {
  if (id < 0) return {};
  const Values& v = values_[id];
  return {address(run, v), v.strides};
}

Quantized Program::quantized(const Run& run, int id) const {
  const Tensor& t = tensors_[id];
  Grid grid = t.grid;
  grid.images = run.images;
  return {t.format, grid, reinterpret_cast<std::byte*>(base(run, 0) + t.offset * run.images)};
}

// Of so many channels, which may be quantized now.
std::vector<Target> Program::targets(const Run& run, const Use& use, std::int64_t channels) const {
  std::vector<Target> all;
  for (const auto& [id, first] : use.targets) {
    all.push_back({quantized(run, id), first});
    all.back().quantized.begin(first, channels);
  }
  return all;
}

// `whole`: all channels are there before any is quantized.
void Program::check(const Use& use, std::int64_t channels, std::int64_t height, std::int64_t width, bool whole) const {
  const auto alike = [&](const Values& v) { return v.channels == channels && v.height == height && v.width == width; };
  if (use.values >= 0)
    require(alike(values_of(use.values)) && values_of(use.values).dense(), "outputs: expected a dense tensor of their shape");
  if (use.residual >= 0)
    require(alike(values_of(use.residual)) && values_of(use.residual).dense(),
            "residual: expected a dense tensor of the outputs' shape");
  for (const auto& [id, first] : use.targets) {
    const Tensor& t = tensor_of(id);
    const Cut& cut = t.format.cut;
    const auto at_block = [&](std::int64_t channel) { return channel % cut.depth % cut.block_size == 0; };
    require(t.grid.height == height && t.grid.width == width && first >= 0 && first <= cut.depth * t.format.groups - channels &&
                at_block(first) && at_block(first + channels) && (whole || t.format.groups == 1),
            "targets: expected whole blocks of a tensor of the outputs' size");
  }
}

void Program::convolve(const Geometry& one, const Layer& layer, int from, int input_id, const Use& use) {
  Geometry g = one;
  g.images = 1;
  require(g.valid(), "the sizes of the convolution do not agree");
  require(g.groups == 1 || g.depthwise() || use.targets.empty(), "a grouped convolution cannot quantize its outputs");
  check(use, g.outputs, g.out_height, g.out_width, g.depthwise());
  if (from >= 0) {
    const Values& v = values_of(from);
    require(v.channels == g.channels && v.height == g.height && v.width == g.width, "expected an input of the layer's sizes");
  } else {
    require(!g.flat, "flattened blocks need a float input");
  }
  if (!g.flat) {
    const Tensor& t = tensor_of(input_id);
    const Grid needed = g.grid();
    require(t.format == layer.format(g), "expected an input quantized as the layer wants it");
    require(t.grid.height == needed.height && t.grid.width == needed.width && t.grid.pad_h >= needed.pad_h &&
                t.grid.pad_w >= needed.pad_w,
            "expected a quantized input of the layer's sizes");
  }
  require(use.values >= 0 || !use.targets.empty(), "a step without an output");
  steps_.push_back([=, this](const Run& run) {
    Geometry now = g;
    now.images = run.images;
    const std::vector<Target> into = targets(run, use, g.outputs);
    Layer l = layer;
    l.activation = use.activation, l.slope = use.slope;
    const Input output = input(run, use.values);
    const Output o{const_cast<float*>(output.values), output.strides, input(run, use.residual), into};
    if (now.flat) return dsconv::convolve(now, l, kernels_, input(run, from), o);
    dsconv::convolve(now, l, kernels_, quantized(run, input_id), o);
  });
}

void Program::map(int from, const float* scale, const float* shift, bool once, int gate_id, const Use& use) {
  const Values v = values_of(from);
  require(!scale == !shift, "scale and shift come together");
  const bool one_gate = gate_id >= 0 && values_of(gate_id).height * values_of(gate_id).width == 1;
  if (gate_id >= 0) {
    const Values& gate = values_of(gate_id);
    require(gate.dense() && gate.channels == v.channels && (one_gate || (gate.height == v.height && gate.width == v.width)),
            "gate: expected a dense tensor of the input's channels, of its size or of one pixel");
  }
  check(use, v.channels, v.height, v.width, true);
  require(use.values >= 0 || !use.targets.empty(), "a step without an output");
  const bool plain = !scale && gate_id < 0 && use.residual < 0 && use.activation == Activation::none && use.values < 0;
  if (!v.dense()) {  // an input as it comes, channel by channel
    require(plain && std::all_of(use.targets.begin(), use.targets.end(),
                                 [&](const auto& target) {
                                   const Format& format = tensor_of(target.first).format;
                                   return target.second == 0 && format.cut.depth * format.groups == v.channels;
                                 }),
            "expected a dense tensor, or nothing to do but to quantize it whole");
    steps_.push_back([=, this](const Run& run) {
      for (const auto& [id, first] : use.targets) quantize(quantized(run, id), kernels_, address(run, v), v.strides);
    });
    return;
  }
  steps_.push_back([=, this](const Run& run) {
    const std::vector<Target> into = targets(run, use, v.channels);
    const float* values = address(run, v);
    const Input other = input(run, use.residual), output = input(run, use.values), gate = input(run, gate_id);
    // What has a gate for each image is cut where an image ends.
    const std::int64_t of_image = v.height * v.width, pixels = one_gate ? of_image : run.images * of_image;
    const std::int64_t tasks = (pixels + kPixels - 1) / kPixels;
    parallel((one_gate ? run.images : 1) * tasks, [&](std::int64_t task) {
      const std::int64_t image = task / tasks, begin = task % tasks * kPixels;
      const std::int64_t first = image * of_image + begin, count = std::min(kPixels, pixels - begin);
      struct User;
      Scratch<User> scratch(plain || output.values ? 0 : count * v.channels * 4);
      const float* made = values + first * v.strides.x;
      std::int64_t stride = v.strides.x;
      if (!plain) {
        float* to = output.values ? const_cast<float*>(output.values) + first * output.strides.x : scratch.take<float>(0);
        stride = output.values ? output.strides.x : v.channels;
        const float* gates = gate.values ? gate.values + (one_gate ? image * gate.strides.image : first * gate.strides.x) : nullptr;
        kernels_.map({made, v.strides.x, scale, shift, once, gates, one_gate ? 0 : gate.strides.x,
                      other.values ? other.values + first * other.strides.x : nullptr, other.strides.x, to, stride, count,
                      v.channels, use.activation, use.slope});
        made = to;
      }
      for (const Target& target : into) quantize_into(target, kernels_, made, stride, first, count, 0, v.channels);
    });
  });
}

void Program::pool(int from, const Window& w, std::int64_t out_height, std::int64_t out_width, const Use& use) {
  const Values v = values_of(from);
  require(v.strides.channel == 1, "expected a tensor whose channels lie side by side");
  for (const std::int64_t n : {w.kernel_h, w.kernel_w, w.stride_h, w.stride_w, w.dilation_h, w.dilation_w, out_height, out_width})
    require(is_size(n), "pool: expected positive sizes");
  require(w.pad_h >= 0 && w.pad_w >= 0 && w.pad_h < w.kernel_h * w.dilation_h && w.pad_w < w.kernel_w * w.dilation_w &&
              is_size(w.kernel_h * w.kernel_w) && (out_height - 1) * w.stride_h < v.height + w.pad_h &&
              (out_width - 1) * w.stride_w < v.width + w.pad_w && w.divisor >= 0 && use.residual < 0 &&
              use.activation == Activation::none,
          "pool: expected a padding smaller than the kernel, windows that begin within the image, and nothing else to do");
  check(use, v.channels, out_height, out_width, true);
  require(use.values >= 0 || !use.targets.empty(), "a step without an output");
  // Windows that overlap share the maxima over the lines that they cover.
  const bool by_line = !w.average && w.kernel_h > 1 && w.kernel_w > w.stride_w && v.strides.x == v.channels;
  steps_.push_back([=, this](const Run& run) {
    const std::vector<Target> into = targets(run, use, v.channels);
    const Input output = input(run, use.values);
    parallel(run.images * out_height, [&](std::int64_t line) {
      const std::int64_t image = line / out_height, y = line % out_height;
      const float* values = address(run, v) + image * v.strides.image;
      struct User;
      using Mine = Scratch<User>;
      const std::int64_t kept = output.values ? 0 : out_width * v.channels, merged = by_line ? v.width * v.channels : 0;
      Mine scratch(Mine::size<const float*>(w.kernel_h * w.kernel_w) + Mine::size<float>(kept) + Mine::size<float>(merged));
      const float** tap = scratch.take<const float*>(w.kernel_h * w.kernel_w);
      float* made = scratch.take<float>(kept);
      float* const maxima = scratch.take<float>(merged);
      if (output.values) made = const_cast<float*>(output.values) + line * out_width * output.strides.x;
      const std::int64_t stride = output.values ? output.strides.x : v.channels;
      const std::int64_t top = y * w.stride_h - w.pad_h;
      const auto line_of = [&](std::int64_t ky) -> const float* {
        const std::int64_t in_y = top + ky * w.dilation_h;
        return in_y >= 0 && in_y < v.height ? values + in_y * v.strides.y : nullptr;
      };
      if (by_line) {
        int lines = 0;
        for (std::int64_t ky = 0; ky < w.kernel_h; ++ky)
          if (const float* from = line_of(ky)) tap[lines++] = from;
        kernels_.pool({tap, lines, merged, 0.0f, maxima});
      }
      for (std::int64_t x = 0; x < out_width; ++x) {
        int taps = 0;
        const std::int64_t left = x * w.stride_w - w.pad_w;
        for (std::int64_t ky = 0; ky < (by_line ? 1 : w.kernel_h); ++ky) {
          const float* from = by_line ? maxima : line_of(ky);
          for (std::int64_t kx = 0; from && kx < w.kernel_w; ++kx) {
            const std::int64_t in_x = left + kx * w.dilation_w;
            if (in_x >= 0 && in_x < v.width) tap[taps++] = from + in_x * v.strides.x;
          }
        }
        // The padding counts as far as the window would go without the rounding up of the output's size.
        const std::int64_t counted =
            (std::min(top + w.kernel_h, v.height + w.pad_h) - top) * (std::min(left + w.kernel_w, v.width + w.pad_w) - left);
        const std::int64_t divisor = w.divisor ? w.divisor : w.count_zeros ? counted : taps;
        kernels_.pool({tap, taps, v.channels, w.average ? static_cast<float>(divisor) : 0.0f, made + x * stride});
      }
      for (const Target& target : into) quantize_into(target, kernels_, made, stride, line * out_width, out_width, 0, v.channels);
    });
  });
}

void Program::average(int from, int lanes, int to) {
  const Values v = values_of(from), made = values_of(to);
  require(v.dense() && made.strides.channel == 1 && made.channels == v.channels && made.height * made.width == 1 && lanes > 0 &&
              lanes <= kMaxLanes,
          "average: expected dense tensors of the same channels, the second of one pixel, and 1 to 16 lanes");
  steps_.push_back([=, this](const Run& run) {
    constexpr std::int64_t kTogether = 4 * kMaxLanes;
    const std::int64_t parts = (v.channels + kTogether - 1) / kTogether;
    parallel(run.images * parts, [&](std::int64_t task) {
      const std::int64_t image = task / parts, first = task % parts * kTogether;
      kernels_.average({address(run, v) + image * v.strides.image + first, v.strides.x, v.height * v.width,
                        std::min(kTogether, v.channels - first), lanes, address(run, made) + image * made.strides.image + first});
    });
  });
}

void Program::flatten(int from, int to) {
  const Values v = values_of(from), made = values_of(to);
  const std::int64_t count = v.channels * v.height * v.width;
  require(v.dense() && made.dense() && made.channels == count && made.height * made.width == 1,
          "expected dense tensors of as many values");
  require(made.strides.image == count, "expected a tensor of its own for the result");
  steps_.push_back([=, this](const Run& run) {
    to_lines(address(run, v), v.strides.image, v.strides.x, run.images, v.channels, v.height * v.width, address(run, made));
  });
}

std::int64_t Program::bytes(std::int64_t images) const {
  require(images >= 0 && static_cast<double>(images) * static_cast<double>(most_) < kMostBytes,
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
