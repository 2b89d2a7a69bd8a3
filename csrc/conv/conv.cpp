#include "conv.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <vector>

#include "../parallel.h"

namespace dsconv {
namespace {

constexpr std::int64_t kLargest = std::int64_t{1} << 31;
constexpr double kMost = 1e15;  // values in a tensor
constexpr std::int64_t kMaxBlock = 512;
constexpr std::int64_t kTasks = 32;  // enough to share out evenly

// Memory that a thread keeps from call to call, since new pages cost more than the arithmetic of a small layer. What is
// large is given back. Every user has its own, named by a type.
template <class User>
class Scratch {
 public:
  explicit Scratch(std::int64_t bytes) {
    if (bytes <= kept_.bytes) return;
    kept_.release();
    kept_.bytes = (bytes + 63) / 64 * 64;
    kept_.data = static_cast<std::byte*>(::operator new(kept_.bytes, std::align_val_t{64}));
  }
  ~Scratch() {
    if (kept_.bytes > kKeepAtMost) kept_.release();
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // The next so many values.
  template <class T>
  T* take(std::int64_t count) {
    T* values = reinterpret_cast<T*>(kept_.data + taken_);
    taken_ += size<T>(count);
    return values;
  }
  template <class T>
  static std::int64_t size(std::int64_t count) {
    return (count * static_cast<std::int64_t>(sizeof(T)) + 63) / 64 * 64;
  }

 private:
  static constexpr std::int64_t kKeepAtMost = 32 << 20;
  struct Kept {
    std::byte* data = nullptr;
    std::int64_t bytes = 0;
    void release() {
      ::operator delete(data, std::align_val_t{64});
      data = nullptr, bytes = 0;
    }
    ~Kept() { release(); }
  };
  static thread_local Kept kept_;
  std::int64_t taken_ = 0;
};
template <class User>
thread_local typename Scratch<User>::Kept Scratch<User>::kept_;

// The quantized input. Rows of a group lie together; a row is a pixel of the bordered image, or for flattened blocks an
// output pixel with all that it reads.
class Quantized {
 public:
  Quantized(const Geometry& g, const Operands& o, const Kernels& kernels)
      : pad_h(g.flat ? 0 : g.pad_h),
        pad_w(g.flat ? 0 : g.pad_w),
        inner_h(g.flat ? g.out_height : g.height),
        inner_w(g.flat ? g.out_width : g.width),
        height(inner_h + 2 * pad_h),
        width(inner_w + 2 * pad_w),
        rows(g.images * height * width),
        row_bytes(g.row_octets() * 8),
        blocks(g.blocks()),
        scratch_(size<std::int8_t>(g.groups * rows * row_bytes + kSlack) + 3 * size<float>(g.groups * rows * blocks)),
        all_{scratch_.take<std::int8_t>(g.groups * rows * row_bytes + kSlack),
             scratch_.take<float>(g.groups * rows * blocks), scratch_.take<std::int32_t>(g.groups * rows * blocks),
             o.kds_shift ? scratch_.take<float>(g.groups * rows * blocks) : nullptr, row_bytes,
             static_cast<int>(blocks), o.wide ? 128 : 8} {
    std::memset(all_.mantissa + g.groups * rows * row_bytes, 0, kSlack);
    // Lines of some hundred pixels make a task.
    const std::int64_t lines = std::clamp<std::int64_t>(256 / std::max<std::int64_t>(1, width), 1, std::max<std::int64_t>(1, inner_h));
    const std::int64_t parts = std::max<std::int64_t>(1, (inner_h + lines - 1) / lines);
    parallel(g.groups * g.images * parts, [&](std::int64_t task) {
      const std::int64_t part = task % parts, image = task / parts % g.images, group = task / parts / g.images;
      quantize(g, o, kernels, group, image, part * lines, std::min(inner_h, (part + 1) * lines));
    });
  }

  Rows of_group(std::int64_t group) const {
    Rows r = all_;
    r.mantissa += group * rows * row_bytes;
    r.scale += group * rows * blocks;
    r.start += group * rows * blocks;
    if (r.shifted) r.shifted += group * rows * blocks;
    return r;
  }

  const std::int64_t pad_h, pad_w, inner_h, inner_w, height, width, rows, row_bytes, blocks;

 private:
  template <class T>
  static std::int64_t size(std::int64_t count) {
    return Scratch<Quantized>::size<T>(count);
  }

  void blank(const Rows& r, std::int64_t row, std::int64_t count) const {
    std::memset(r.mantissa + row * row_bytes, 0, count * row_bytes);
    std::fill_n(r.scale + row * blocks, count * blocks, 1.0f);
    std::fill_n(r.start + row * blocks, count * blocks, 0);
    if (r.shifted) std::fill_n(r.shifted + row * blocks, count * blocks, 0.0f);
  }

  // Lines from `top` to `bottom` of an image, and the border beside them.
  void quantize(const Geometry& g, const Operands& o, const Kernels& kernels, std::int64_t group, std::int64_t image,
                std::int64_t top, std::int64_t bottom) const;

  Scratch<Quantized> scratch_;
  Rows all_;
};

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

void Quantized::quantize(const Geometry& g, const Operands& o, const Kernels& kernels, std::int64_t group,
                         std::int64_t image, std::int64_t top, std::int64_t bottom) const {
  const Rows r = of_group(group);
  const std::int64_t image0 = image * height * width;
  if (top == 0) blank(r, image0, pad_h * width);
  if (bottom == inner_h) blank(r, image0 + (pad_h + inner_h) * width, pad_h * width);
  for (std::int64_t y = top; y < bottom && pad_w; ++y) {
    blank(r, image0 + (pad_h + y) * width, pad_w);
    blank(r, image0 + (pad_h + y) * width + pad_w + inner_w, pad_w);
  }

  const Strides& s = o.input_strides;
  const std::int64_t group_channels = g.channels / g.groups;
  const float* channels = o.input + image * s.image + group * group_channels * s.channel;
  const bool side_by_side = !g.flat && s.channel == 1;  // the channels of a pixel
  const bool direct = !g.flat && s.x == 1;              // neighbouring pixels
  const bool one_run = direct && s.y == g.width;        // over the ends of lines
  const std::int64_t run = one_run ? (bottom - top) * inner_w : inner_w, runs = one_run ? 1 : bottom - top;
  const std::int64_t step = side_by_side ? 1 : kernels.lanes;
  struct User;
  Scratch<User> scratch(g.flat ? Lines::bytes(g, group_channels) : 0);
  Lines lines(g, group_channels, scratch.take<float>(0));
  alignas(64) float copied[kMaxBlock * kMaxLanes];
  const float* channel[kMaxBlock];
  const float* copy[kMaxBlock];
  for (std::int64_t i = 0; i < kMaxBlock; ++i) copy[i] = copied + i * kMaxLanes;
  for (std::int64_t line = 0; line < runs; ++line) {
    if (g.flat) lines.read(channels, s, top + line);
    for (std::int64_t b = 0; b < blocks; ++b) {
      const std::int64_t first = b * g.block_size, count = b + 1 < blocks ? g.block_size : g.last();
      for (std::int64_t c = 0; c < count; ++c)
        channel[c] = g.flat ? lines.at(first + c) : channels + (first + c) * s.channel + (top + line) * s.y;
      for (std::int64_t done = 0; done < run; done += step) {
        // The last pixels of a run are quantized with those before them once more, where there are enough.
        const std::int64_t x0 = direct && run >= step ? std::min(done, run - step) : done;
        const std::int64_t pixels = std::min(step, run - x0);
        std::int64_t row[kMaxLanes];
        for (std::int64_t i = 0, y = top + line + x0 / inner_w, x = x0 % inner_w; i < pixels; ++i) {
          row[i] = image0 + (pad_h + y) * width + pad_w + x;
          if (++x == inner_w) x = 0, ++y;
        }
        Block block{channel, g.flat ? x0 : x0 * s.x, static_cast<int>(count), o.activation_bits, o.sign, row,
                    static_cast<int>(pixels), r, static_cast<int>(b), first};
        if (side_by_side) {
          kernels.quantize_channels(block);
          continue;
        }
        if (!g.flat && (!direct || pixels < step)) {
          for (std::int64_t c = 0; c < count; ++c) {
            float* to = copied + c * kMaxLanes;
            const float* from = channel[c] + x0 * s.x;
            std::memset(to, 0, kMaxLanes * sizeof(float));
            if (pixels == kMaxLanes && s.x == 2)
              for (int i = 0; i < kMaxLanes; ++i) to[i] = from[2 * i];
            else
              for (std::int64_t i = 0; i < pixels; ++i) to[i] = from[i * s.x];
          }
          block.channel = copy;
          block.at = 0;
        }
        kernels.quantize_pixels(block);
      }
    }
  }
}

void convolve_depthwise(const Geometry& g, const Operands& o, const Kernels& kernels) {
  const Strides& in = o.input_strides;
  const Strides& out = o.output_strides;
  const std::int64_t per_group = g.group_outputs(), taps = g.positions();
  // Lanes are channels where those lie side by side, and pixels of a line otherwise.
  const bool by_lane = in.channel == 1 && out.channel == 1 && per_group == 1;
  if (!by_lane && out.x != 1) throw std::invalid_argument("a depthwise convolution needs an output whose lines are dense");
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
    Mine scratch(Mine::size<const float*>(taps) + Mine::size<float>(zeros) + Mine::size<float>(ends) +
                 (by_lane ? 0 : Lines::bytes(g, 1)));
    const float** tap = scratch.take<const float*>(taps);
    float* zero = scratch.take<float>(zeros);
    float* end = scratch.take<float>(ends);
    Lines cut(g, 1, scratch.take<float>(0));
    std::fill_n(zero, zeros, 0.0f);
    std::fill_n(end, ends, 0.0f);
    float few_biases[kMaxLanes] = {};
    if (few && o.bias) std::copy_n(o.bias, g.channels, few_biases);

    // `lanes` outputs from `at` on, of filter `output` or of the filters from there on, which read from tap[k][first].
    const auto run = [&](std::int64_t output, std::int64_t first, std::int64_t lanes, std::int64_t at) {
      const auto from = [&](const float* p) { return p ? p + output : nullptr; };
      const Store store{nullptr, 0, 0, nullptr, 1, few && o.bias ? few_biases : from(o.bias),
                        o.residual ? o.residual + at : nullptr, o.output + at, o.activation, o.slope};
      kernels.depthwise({tap, first, static_cast<int>(lanes), by_lane, static_cast<int>(taps),
                         static_cast<int>(g.block_size), o.activation_bits, o.sign,
                         reinterpret_cast<const std::int32_t*>(o.weight) + output, o.kds + output, from(o.kds_shift),
                         g.outputs, store});
    };
    for (std::int64_t y = stripe * lines; y < std::min(g.out_height, (stripe + 1) * lines); ++y) {
      const float* input = o.input + image * in.image + (by_lane ? 0 : part * in.channel);
      if (!by_lane) {
        cut.read(input, in, y);
        for (std::int64_t k = 0; k < taps; ++k) tap[k] = cut.at(k);
        for (std::int64_t output = part * per_group; output < (part + 1) * per_group; ++output)
          run(output, 0, g.out_width, image * out.image + output * out.channel + y * out.y);
        continue;
      }
      for (std::int64_t x = 0; x < g.out_width; ++x) {
        for (std::int64_t k = 0; k < taps; ++k) {
          const std::int64_t in_y = y * g.stride_h - g.pad_h + k / g.kernel_w * g.dilation_h;
          const std::int64_t in_x = x * g.stride_w - g.pad_w + k % g.kernel_w * g.dilation_w;
          const bool inside = in_y >= 0 && in_y < g.height && in_x >= 0 && in_x < g.width;
          tap[k] = inside ? input + in_y * in.y + in_x * in.x : zero;
          if (few) tap[k] = std::copy_n(tap[k], g.channels, end + k * kMaxLanes) - g.channels;
        }
        const std::int64_t at = image * out.image + y * out.y + x * out.x;
        const std::int64_t whole = few ? g.channels : g.channels / kMaxLanes * kMaxLanes;
        run(0, 0, whole, at);
        // The last channels once more with some before them, so that nothing behind them is read.
        if (whole < g.channels) run(g.channels - kMaxLanes, g.channels - kMaxLanes, kMaxLanes, at + g.channels - kMaxLanes);
      }
    }
  });
}

}  // namespace

bool Geometry::valid() const {
  for (const std::int64_t size : {images, channels, height, width, outputs, out_height, out_width, pad_h, pad_w})
    if (size < 0 || size > kLargest) return false;
  for (const std::int64_t size :
       {kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, groups, block_size, channels, outputs})
    if (size < 1 || size > kLargest) return false;
  const auto out = [](std::int64_t n, std::int64_t pad, std::int64_t dilation, std::int64_t kernel, std::int64_t stride) {
    const std::int64_t room = n + 2 * pad - dilation * (kernel - 1) - 1;
    return room < 0 ? -1 : room / stride + 1;
  };
  // No size in bytes comes near the end of 64 bits.
  const auto size = [](auto... factors) { return (1.0 * ... * static_cast<double>(factors)); };
  const double padded = size(height + 2 * pad_h, width + 2 * pad_w), taps_read = size(kernel_h, kernel_w, dilation_h, dilation_w);
  if (size(images, channels, padded) > kMost || size(images, out_height, out_width, outputs) > kMost ||
      size(images, out_height, out_width, channels, kernel_h, kernel_w) > kMost || padded * taps_read > kMost ||
      size(outputs + kPair * groups, channels + block_size * groups, kernel_h, kernel_w) > kMost)
    return false;
  // |S| stays within 24 bits, and with it every sum within 32, up to this block size.
  return channels % groups == 0 && outputs % groups == 0 && (block_size % 8 == 0 || depthwise()) && block_size <= kMaxBlock &&
         out(height, pad_h, dilation_h, kernel_h, stride_h) == out_height &&
         out(width, pad_w, dilation_w, kernel_w, stride_w) == out_width;
}

void pack_weight(const Geometry& g, const std::int8_t* vqk, int bits, std::uint8_t* packed) {
  const bool wide = bits > 4;
  const int zero = 1 << (wide ? 7 : 3);
  const std::int64_t taps = g.taps(), depth = g.depth(), per_group = g.group_outputs();
  if (g.depthwise()) {
    std::memset(packed, 0, g.packed_bytes(wide));
    for (std::int64_t n = 0; n < g.outputs; ++n)
      for (std::int64_t k = 0; k < depth; ++k) {
        const std::int32_t q = vqk[n * depth + k];
        std::memcpy(packed + (k * g.outputs + n) * sizeof q, &q, sizeof q);
      }
    return;
  }
  parallel(g.groups * 2 * g.pairs(), [&](std::int64_t all_panels) {
    const std::int64_t group = all_panels / (2 * g.pairs()), panel = all_panels % (2 * g.pairs());
    for (std::int64_t tap = 0; tap < taps; ++tap)
      for (std::int64_t octet = 0; octet < g.row_octets(); ++octet)
        for (int n = 0; n < kPanel; ++n) {
          const std::int64_t output = panel * kPanel + n;
          std::uint8_t eight[8];
          for (int i = 0; i < 8; ++i) {
            const std::int64_t k = octet * 8 + i;
            const bool inside = output < per_group && k < depth;
            eight[i] = static_cast<std::uint8_t>(
                zero + (inside ? vqk[((group * per_group + output) * depth + k) * taps + tap] : 0));
          }
          const std::int64_t row = (all_panels * taps + tap) * g.row_octets() + octet;
          if (wide) {
            std::memcpy(packed + row * 128 + 4 * n, eight, 4);
            std::memcpy(packed + row * 128 + 64 + 4 * n, eight + 4, 4);
          } else {
            for (int i = 0; i < 4; ++i) packed[row * 64 + 4 * n + i] = eight[i] | eight[i + 4] << 4;
          }
        }
  });
}

void pack_kds(const Geometry& g, const float* kds, float* packed) {
  const std::int64_t taps = g.taps(), blocks = g.blocks(), per_group = g.group_outputs();
  if (g.depthwise()) {
    std::fill_n(packed, g.kds_count(), 0.0f);
    for (std::int64_t n = 0; n < g.outputs; ++n)
      for (std::int64_t b = 0; b < blocks; ++b) packed[b * g.outputs + n] = kds[n * blocks + b];
    return;
  }
  for (std::int64_t group = 0; group < g.groups; ++group)
    for (std::int64_t pair = 0; pair < g.pairs(); ++pair)
      for (std::int64_t tap = 0; tap < taps; ++tap)
        for (std::int64_t b = 0; b < blocks; ++b)
          for (std::int64_t n = pair * kPair; n < (pair + 1) * kPair; ++n)
            *packed++ = n < per_group ? kds[((group * per_group + n) * blocks + b) * taps + tap] : 0.0f;
}

void convolve(const Geometry& whole, const Operands& operands, const Kernels& kernels) {
  Geometry g = whole;
  Operands o = operands;
  if (g.depthwise()) return convolve_depthwise(g, o, kernels);
  if (!g.flat && g.positions() == 1 && !g.pad_h && !g.pad_w) {
    // What a strided 1x1 convolution skips need not be quantized.
    o.input_strides.y *= g.stride_h, o.input_strides.x *= g.stride_w;
    g.height = g.out_height, g.width = g.out_width;
    g.stride_h = g.stride_w = 1;
  }
  const Quantized q(g, o, kernels);
  const std::int64_t out_pixels = g.out_height * g.out_width, pixels = g.images * out_pixels, taps = g.taps();
  std::vector<std::int64_t> tap(taps, 0);
  for (std::int64_t k = 0; k < taps && !g.flat; ++k)
    tap[k] = k / g.kernel_w * g.dilation_h * q.width + k % g.kernel_w * g.dilation_w;
  const std::int64_t panel = g.panel_bytes(o.wide), per_group = g.group_outputs();
  // Chunks of about the same size, of whole vectors. A task keeps its pixels in cache and goes through the weights; with
  // few pixels there are more tasks, of some weights.
  const std::int64_t chunks = (pixels + kernels.task - 1) / kernels.task;
  const std::int64_t even = (pixels + chunks - 1) / std::max<std::int64_t>(1, chunks);
  const std::int64_t chunk = std::min<std::int64_t>(kernels.task, (even + kMaxLanes - 1) / kMaxLanes * kMaxLanes);
  const std::int64_t split = std::clamp<std::int64_t>(kTasks / std::max<std::int64_t>(1, g.groups * chunks), 1, g.pairs());

  parallel(g.groups * chunks * split, [&](std::int64_t task) {
    const std::int64_t part = task % split, group = task / split / chunks, first = task / split % chunks * chunk;
    const std::int64_t end = std::min(pixels, first + chunk);
    if (first >= end) return;
    std::int64_t row[kMaxTask], place[kMaxTask];
    std::int64_t image = first / out_pixels, y = first % out_pixels / g.out_width, x = first % g.out_width;
    for (std::int64_t p = first; p < end; ++p) {
      place[p - first] = image * o.output_strides.image + y * o.output_strides.y + x * o.output_strides.x;
      row[p - first] = g.flat ? p : (image * q.height + y * g.stride_h) * q.width + x * g.stride_w;
      if (++x == g.out_width) x = 0, ++y;
      if (y == g.out_height) y = 0, ++image;
    }
    alignas(64) float sums[kMaxTask * kPair];
    Sums t{};
    t.rows = q.of_group(group);
    t.octets = static_cast<int>(g.octets());
    t.last_octets = static_cast<int>(g.last_octets());
    t.panel_bytes = panel;
    t.panels = 2;
    t.wide = o.wide;
    t.largest = o.activation_bits == 8 ? 128 : (1 << o.activation_bits) - 1;
    t.tap = tap.data();
    t.taps = static_cast<int>(taps);
    t.pixel = row;
    t.pixels = static_cast<int>(end - first);
    t.output = sums;
    struct User;
    Scratch<User> scratch(kernels.workspace ? kernels.workspace(t) : 0);
    t.workspace = scratch.take<std::uint8_t>(0);
    for (std::int64_t pair = part * g.pairs() / split; pair < (part + 1) * g.pairs() / split; ++pair) {
      t.weight = o.weight + (group * g.pairs() + pair) * 2 * panel;
      const std::int64_t scales = (group * g.pairs() + pair) * taps * q.blocks * kPair;
      t.kds = o.kds + scales;
      t.kds_shift = o.kds_shift ? o.kds_shift + scales : nullptr;
      const std::int64_t from = group * per_group + pair * kPair;
      const std::int64_t outputs = std::min<std::int64_t>(kPair, (group + 1) * per_group - from);
      t.panels = outputs > kPanel ? 2 : 1;
      kernels.sum(t);
      const std::int64_t at = from * o.output_strides.channel;
      kernels.store({sums, t.pixels, static_cast<int>(outputs), place, o.output_strides.channel,
                     o.bias ? o.bias + from : nullptr, o.residual ? o.residual + at : nullptr, o.output + at,
                     o.activation, o.slope});
    }
  });
}

void quantize_activation(const Geometry& g, const Operands& o, const Kernels& kernels, std::int8_t* mantissa,
                         std::int8_t* exponent) {
  const Quantized q(g, o, kernels);
  const std::int64_t pixels = g.height * g.width, depth = g.depth();
  parallel(g.images * g.groups, [&](std::int64_t task) {
    const std::int64_t image = task / g.groups, group = task % g.groups;
    const Rows r = q.of_group(group);
    for (std::int64_t p = 0; p < pixels; ++p) {
      const std::int64_t row = image * pixels + p;
      for (std::int64_t c = 0; c < depth; ++c) mantissa[(task * depth + c) * pixels + p] = r.mantissa[row * q.row_bytes + c];
      for (std::int64_t b = 0; b < q.blocks; ++b) {
        std::uint32_t word;
        std::memcpy(&word, r.scale + row * q.blocks + b, 4);
        exponent[(task * q.blocks + b) * pixels + p] = static_cast<std::int8_t>(static_cast<int>(word >> 23 & 255) - 127);
      }
    }
  });
}

}  // namespace dsconv
