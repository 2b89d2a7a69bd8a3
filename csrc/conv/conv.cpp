#include "conv.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <optional>
#include <vector>

#include "../parallel.h"
#include "../scratch.h"
#include "kernels.h"
#include "lines.h"

namespace dsconv {
namespace {

constexpr std::int64_t kLargest = std::int64_t{1} << 31;
constexpr double kMost = 1e15;           // values in a tensor
constexpr std::int64_t kTasks = 32;      // enough to share out evenly
constexpr std::int64_t kWindows = 1024;  // outputs of a task that quantizes what they read

// Outputs of a group that are finished before any is quantized: such that they are whole blocks of all targets.
std::int64_t unit_of(const Geometry& g, std::span<const Target> targets) {
  std::int64_t unit = kPair;
  for (const Target& target : targets) unit = std::lcm(unit, target.quantized.format().cut.block_size);
  return std::min(unit, g.pairs() * kPair);
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
  const int zero = wide ? kWideZero : kZero;
  const std::int64_t taps = g.taps(), depth = g.cut().depth, per_group = g.group_outputs();
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
      for (std::int64_t octet = 0; octet < g.cut().row_octets(); ++octet)
        for (int n = 0; n < kPanel; ++n) {
          const std::int64_t output = panel * kPanel + n;
          std::uint8_t eight[8];
          for (int i = 0; i < 8; ++i) {
            const std::int64_t k = octet * 8 + i;
            const bool inside = output < per_group && k < depth;
            eight[i] =
                static_cast<std::uint8_t>(zero + (inside ? vqk[((group * per_group + output) * depth + k) * taps + tap] : 0));
          }
          const std::int64_t row = (all_panels * taps + tap) * g.cut().row_octets() + octet;
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
  const std::int64_t taps = g.taps(), blocks = g.cut().blocks(), per_group = g.group_outputs();
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

namespace {

// What the tasks of a convolution have in common.
class Tasks {
 public:
  Tasks(const Geometry& g, const Layer& l, const Kernels& kernels, const Output& o, std::int64_t line)
      : units((g.group_outputs() + unit_of(g, o.targets) - 1) / unit_of(g, o.targets)), g_(g), l_(l), kernels_(kernels), o_(o),
        unit_(unit_of(g, o.targets)), tap_(g.taps(), 0) {
    for (std::int64_t k = 0; k < g.taps() && !g.flat; ++k)
      tap_[k] = k / g.kernel_w * g.dilation_h * line + k % g.kernel_w * g.dilation_w;
  }

  const std::int64_t units;  // of the outputs of a group

  // Outputs of some units of a group at pixels `first` to `end`, kMaxTask at most. At the first tap, these read rows `step`
  // apart in a line, from row_of(image, y, x) on.
  template <class RowOf>
  void run(const Rows& rows, RowOf row_of, std::int64_t step, std::int64_t group, std::int64_t first, std::int64_t end,
           std::int64_t begin_unit, std::int64_t end_unit) const {
    const std::int64_t per_group = g_.group_outputs(), panel = g_.panel_bytes(l_.wide), blocks = g_.cut().blocks();
    const Strides& to = o_.strides;
    const Strides& add = o_.residual.strides;
    const int pixels = static_cast<int>(end - first);
    std::int64_t row[kMaxTask], place[kMaxTask], residual_place[kMaxTask];
    const auto by_line = [&](std::int64_t* to, std::int64_t apart, auto of_line) {
      places_of(first, pixels, g_.out_height, g_.out_width, apart, of_line, to);
    };
    const auto in = [](const Strides& s) {
      return [&s](std::int64_t image, std::int64_t y, std::int64_t x) { return image * s.image + y * s.y + x * s.x; };
    };
    by_line(row, step, row_of);
    if (o_.values) by_line(place, to.x, in(to));
    if (o_.residual.values) by_line(residual_place, add.x, in(add));
    Sums t{};
    t.rows = rows;
    const bool beyond = std::find(rows.beyond, rows.beyond + blocks, 1) != rows.beyond + blocks;
    const auto sum = beyond ? scalar::kernels.sum : kernels_.sum;
    t.octets = static_cast<int>(g_.cut().octets());
    t.last_octets = static_cast<int>(g_.cut().last_octets());
    t.panel_bytes = panel;
    t.panels = 2;
    t.largest = largest_mantissa(l_.bits);
    t.tap = tap_.data();
    t.taps = static_cast<int>(g_.taps());
    t.pixel = row;
    t.pixels = pixels;
    t.next_place = o_.residual.values ? residual_place : place;
    // What is written far apart is quantized some pixels at a time, while it is still in the nearest cache.
    const int together = o_.values && !o_.targets.empty() ? kMaxLanes : pixels;
    const std::int64_t summed = pixels * ((unit_ + kPair - 1) / kPair * kPair), kept = o_.values ? 0 : pixels * unit_;
    const std::int64_t targets = o_.targets.size();
    struct User;
    using Mine = Scratch<User>;
    const std::int64_t needed = kernels_.workspace ? kernels_.workspace(t) : 0;
    Mine scratch(Mine::template size<std::uint8_t>(needed) + Mine::template size<float>(summed) + Mine::template size<float>(kept) +
                 Mine::template size<std::int64_t>(targets * pixels));
    t.workspace = scratch.template take<std::uint8_t>(needed);
    float* const sums = scratch.template take<float>(summed);
    float* const finished = scratch.template take<float>(kept);
    std::int64_t* const target_rows = scratch.template take<std::int64_t>(targets * pixels);
    if (!o_.values)
      for (int p = 0; p < pixels; ++p) place[p] = p * unit_;
    for (std::int64_t i = 0; i < targets; ++i) o_.targets[i].quantized.rows_of(first, pixels, target_rows + i * pixels);
    const std::int64_t channel = o_.values ? to.channel : 1, apart = o_.values ? to.x : unit_;
    for (std::int64_t u = begin_unit; u < end_unit; ++u) {
      const std::int64_t begin = u * unit_, stop = std::min(per_group, begin + unit_);  // outputs of the group
      float* const values = o_.values ? o_.values + (group * per_group + begin) * channel : finished;
      t.output = sums;
      for (std::int64_t from = begin; from < stop; from += kPair, t.output += pixels * kPair) {
        const std::int64_t output = group * per_group + from, pair = group * g_.pairs() + from / kPair;
        const std::int64_t scales = pair * t.taps * blocks * kPair;
        t.weight = l_.weight + pair * 2 * panel;
        t.kds = l_.kds + scales;
        t.kds_shift = l_.kds_shift ? l_.kds_shift + scales : nullptr;
        t.panels = stop - from > kPanel ? 2 : 1;
        if (o_.values && channel == 1) t.next = o_.residual.values ? o_.residual.values + output : o_.values + output;
        sum(t);
      }
      std::optional<Block> block = block_made(group * per_group + begin, stop - begin, target_rows);
      for (int p = 0; p < pixels; p += together) {
        const int now = std::min(together, pixels - p);
        const auto outputs_from = [&](std::int64_t from, std::int64_t end) -> Store {
          const std::int64_t output = group * per_group + from;
          return {sums + (from - begin) * pixels + p * kPair,
                  now,
                  static_cast<int>(end - from),
                  place + p,
                  residual_place + p,
                  channel,
                  l_.terms.from(output),
                  o_.residual.values ? o_.residual.values + output * add.channel : nullptr,
                  values + (from - begin) * channel,
                  l_.activation,
                  l_.slope};
        };
        if (block) {
          block->row = target_rows + p, block->pixels = now;
          if (kernels_.store_block(outputs_from(begin, stop), pixels * kPair, *block, apart)) continue;
        }
        for (std::int64_t from = begin; from < stop; from += kPair)
          kernels_.store(outputs_from(from, std::min<std::int64_t>(from + kPair, stop)));
        for (std::int64_t i = 0; i < targets; ++i)
          quantize_into(o_.targets[i], kernels_, values + place[p], apart, target_rows + i * pixels + p, now,
                        group * per_group + begin, group * per_group + stop);
      }
    }
  }

 private:
  // The block of the only target that these outputs are, if they are one; of no pixels yet.
  std::optional<Block> block_made(std::int64_t first, std::int64_t outputs, const std::int64_t* row) const {
    if (o_.targets.size() != 1 || (o_.values && o_.strides.channel != 1)) return {};
    const Target& target = o_.targets.front();
    const Cut& cut = target.quantized.format().cut;
    const std::int64_t channel = target.first + first, index = channel % cut.depth / cut.block_size;
    if (cut.size(index) != outputs) return {};
    return block_of(target.quantized, channel / cut.depth, index, row, 0);
  }

  const Geometry& g_;
  const Layer& l_;
  const Kernels& kernels_;
  const Output& o_;
  const std::int64_t unit_;
  std::vector<std::int64_t> tap_;
};

// Flattened blocks: what some lines of outputs from line `top` on read, quantized to rows one after another.
void quantize_windows(const Geometry& g, const Quantized& to, const Kernels& kernels, const Input& input, std::int64_t group,
                      std::int64_t image, std::int64_t top, std::int64_t count) {
  const Cut cut = g.cut();
  const std::int64_t channels = g.channels / g.groups;
  struct User;
  using Mine = Scratch<User>;
  Mine scratch(Mine::size<const float*>(cut.depth) + Mine::size<std::int64_t>(count * g.out_width) +
               Lines::bytes(g, channels, count));
  const float** const channel = scratch.take<const float*>(cut.depth);
  std::int64_t* const row = scratch.take<std::int64_t>(count * g.out_width);
  std::iota(row, row + count * g.out_width, 0);
  Lines lines(g, channels, count, scratch.take<float>(0));
  lines.read(input.values + image * input.strides.image + group * channels * input.strides.channel, input.strides, top);
  for (std::int64_t c = 0; c < cut.depth; ++c) channel[c] = lines.at(c);
  for (std::int64_t y = 0; y < count; ++y)
    for (std::int64_t b = 0; b < cut.blocks(); ++b)
      kernels.quantize_pixels(block_of(to, 0, b, row + y * g.out_width, g.out_width), channel + b * cut.block_size,
                              y * lines.next_line());
}

// A task quantizes what it reads, and sums over it while that is in cache.
void convolve_windows(const Geometry& g, const Layer& l, const Kernels& kernels, const Input& input, const Output& o) {
  const Tasks tasks(g, l, kernels, o, 0);
  // Lines of some hundred outputs, so that what they read is cut up once; fewer where there are not enough to share out.
  const std::int64_t width = std::max<std::int64_t>(1, g.out_width), lines = std::max<std::int64_t>(1, g.out_height);
  const std::int64_t most = std::max<std::int64_t>(1, kWindows / width), shared = g.groups * g.images * lines / (kTasks / 2);
  const std::int64_t least = std::min(most, (kernels.task + width - 1) / width);
  const std::int64_t together = std::min(lines, std::clamp(shared, least, most)), parts = (lines + together - 1) / together;
  Format format = l.format(g);
  format.groups = 1;
  parallel(g.groups * g.images * parts, [&](std::int64_t task) {
    const std::int64_t part = task % parts, image = task / parts % g.images, group = task / parts / g.images;
    const std::int64_t top = part * together, count = std::min(together, g.out_height - top);
    const Grid grid{1, count, g.out_width, 0, 0};
    struct User;
    Scratch<User> scratch(Quantized::bytes(format, grid));
    const Quantized q(format, grid, scratch.template take<std::byte>(0));
    q.begin(0, format.cut.depth);
    quantize_windows(g, q, kernels, input, group, image, top, count);
    const std::int64_t begin = (image * g.out_height + top) * g.out_width, end = begin + count * g.out_width;
    const auto row_of = [&](std::int64_t i, std::int64_t y, std::int64_t x) {
      return (i * g.out_height + y) * g.out_width + x - begin;
    };
    for (std::int64_t first = begin; first < end; first += kernels.task)
      tasks.run(q.of_group(0), row_of, 1, group, first, std::min(end, first + kernels.task), 0, tasks.units);
  });
}

}  // namespace

void convolve(const Geometry& g, const Layer& l, const Kernels& kernels, const Quantized& q, const Output& o) {
  const Tasks tasks(g, l, kernels, o, q.grid().line());
  // Chunks of about the same size, of whole tiles. A task keeps its pixels in cache and goes through the weights; with
  // few pixels there are more tasks, of some weights.
  const std::int64_t pixels = g.pixels(), chunks = (pixels + kernels.task - 1) / kernels.task;
  const std::int64_t even = (pixels + chunks - 1) / std::max<std::int64_t>(1, chunks);
  const std::int64_t chunk = std::min<std::int64_t>(kernels.task, (even + kernels.tile - 1) / kernels.tile * kernels.tile);
  const std::int64_t split = std::clamp<std::int64_t>(kTasks / std::max<std::int64_t>(1, g.groups * chunks), 1, tasks.units);
  const auto row_of = [&](std::int64_t image, std::int64_t y, std::int64_t x) {
    return q.row(image, y * g.stride_h - g.pad_h, x * g.stride_w - g.pad_w);
  };
  parallel(g.groups * chunks * split, [&](std::int64_t task) {
    const std::int64_t part = task % split, group = task / split / chunks, first = task / split % chunks * chunk;
    const std::int64_t end = std::min(pixels, first + chunk);
    if (first < end)
      tasks.run(q.of_group(group), row_of, g.stride_w, group, first, end, part * tasks.units / split,
                (part + 1) * tasks.units / split);
  });
}

void convolve(const Geometry& whole, const Layer& l, const Kernels& kernels, const Input& whole_input, const Output& o) {
  Geometry g = whole;
  Input input = whole_input;
  if (g.depthwise()) return convolve_depthwise(g, l, kernels, input, o);
  if (g.flat) return convolve_windows(g, l, kernels, input, o);
  if (g.positions() == 1 && !g.pad_h && !g.pad_w) {
    // What a strided 1x1 convolution skips need not be quantized.
    input.strides.y *= g.stride_h, input.strides.x *= g.stride_w;
    g.height = g.out_height, g.width = g.out_width;
    g.stride_h = g.stride_w = 1;
  }
  const Format format = l.format(g);
  struct User;
  Scratch<User> scratch(Quantized::bytes(format, g.grid()));
  const Quantized q(format, g.grid(), scratch.take<std::byte>(0));
  quantize(q, kernels, input.values, input.strides);
  convolve(g, l, kernels, q, o);
}

void quantize_activation(const Geometry& g, const Layer& l, const Kernels& kernels, const Input& input, std::int8_t* mantissa,
                         std::int8_t* exponent) {
  const Format format = l.format(g);
  struct User;
  Scratch<User> scratch(Quantized::bytes(format, g.grid()));
  const Quantized q(format, g.grid(), scratch.take<std::byte>(0));
  quantize(q, kernels, input.values, input.strides);
  const std::int64_t pixels = g.height * g.width, depth = g.cut().depth, blocks = g.cut().blocks();
  parallel(g.images * g.groups, [&](std::int64_t task) {
    const std::int64_t image = task / g.groups, group = task % g.groups;
    const Rows r = q.of_group(group);
    for (std::int64_t p = 0; p < pixels; ++p) {
      const std::int64_t row = image * pixels + p;
      for (std::int64_t c = 0; c < depth; ++c) mantissa[(task * depth + c) * pixels + p] = r.mantissa[row * r.row_bytes + c];
      for (std::int64_t b = 0; b < blocks; ++b) {
        const std::uint32_t word = std::bit_cast<std::uint32_t>(scale_of(r.ends[row * blocks + b], r.factors));
        exponent[(task * blocks + b) * pixels + p] = static_cast<std::int8_t>(static_cast<int>(word >> 23 & 255) - 127);
      }
    }
  });
}

}  // namespace dsconv
