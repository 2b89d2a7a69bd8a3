#include "conv.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "../parallel.h"

namespace dsconv {
namespace {

constexpr std::int64_t kTilesInTask = 16;
constexpr std::int64_t kLargest = std::int64_t{1} << 31;
constexpr std::int64_t kTasks = 32;  // enough to share out evenly

template <class T>
std::unique_ptr<T[]> scratch(std::int64_t count) {
  return std::unique_ptr<T[]>(new T[static_cast<std::size_t>(std::max<std::int64_t>(count, 1))]);
}

// The quantized input. Rows of a group lie together; a row is a pixel of the bordered image, or for flattened blocks an
// output pixel with all that it reads.
struct Quantized {
  std::int64_t height, width, rows;  // of rows in an image, and of all images
  std::int64_t row_bytes, blocks;
  std::unique_ptr<std::int8_t[]> mantissa;
  std::unique_ptr<float[]> scale;
  std::unique_ptr<std::int32_t[]> sum;
};

// Values [count][kLanes] of a run of rows, channels from `first` on; rows behind `lanes` are zero.
void gather_channels(const Geometry&, const Strides& s, const float* group, std::int64_t first, std::int64_t count,
                     std::int64_t y, std::int64_t x, int lanes, float* values) {
  const float* from = group + first * s.channel + y * s.y + x * s.x;
  for (std::int64_t c = 0; c < count; ++c, from += s.channel, values += kLanes) {
    if (lanes == kLanes && s.x == 1)
      for (int i = 0; i < kLanes; ++i) values[i] = from[i];
    else
      for (int i = 0; i < kLanes; ++i) values[i] = i < lanes ? from[i * s.x] : 0.0f;
  }
}

void gather_patches(const Geometry& g, const Strides& s, const float* group, std::int64_t first, std::int64_t count,
                    std::int64_t y, std::int64_t x, int lanes, float* values) {
  const std::int64_t taps = g.kernel_h * g.kernel_w;
  std::int64_t channel = first / taps, ky = first % taps / g.kernel_w, kx = first % g.kernel_w;
  for (std::int64_t k = 0; k < count; ++k, values += kLanes) {
    const std::int64_t in_y = y * g.stride_h - g.pad_h + ky * g.dilation_h;
    const std::int64_t in_x = x * g.stride_w - g.pad_w + kx * g.dilation_w;
    const bool inside = in_y >= 0 && in_y < g.height;
    const float* line = group + channel * s.channel + (inside ? in_y * s.y : 0);
    // Lanes from which on, and up to which, the image is there to be read.
    const std::int64_t begin = inside ? std::clamp<std::int64_t>((g.stride_w - 1 - in_x) / g.stride_w, 0, lanes) : lanes;
    const std::int64_t end = std::clamp<std::int64_t>((g.width - in_x + g.stride_w - 1) / g.stride_w, begin, lanes);
    for (std::int64_t i = 0; i < begin; ++i) values[i] = 0.0f;
    for (std::int64_t i = begin; i < end; ++i) values[i] = line[(in_x + i * g.stride_w) * s.x];
    for (std::int64_t i = end; i < kLanes; ++i) values[i] = 0.0f;
    if (++kx == g.kernel_w) {
      kx = 0;
      if (++ky == g.kernel_h) ky = 0, ++channel;
    }
  }
}

Quantized quantize_input(const Geometry& g, const Operands& o, const Kernels& kernels) {
  Quantized q;
  const std::int64_t pad_h = g.flat ? 0 : g.pad_h, pad_w = g.flat ? 0 : g.pad_w;
  const std::int64_t inner_h = g.flat ? g.out_height : g.height, inner_w = g.flat ? g.out_width : g.width;
  q.height = inner_h + 2 * pad_h;
  q.width = inner_w + 2 * pad_w;
  q.rows = g.images * q.height * q.width;
  q.blocks = g.blocks();
  q.row_bytes = g.row_octets() * 8;
  q.mantissa = scratch<std::int8_t>(g.groups * q.rows * q.row_bytes);
  q.scale = scratch<float>(g.groups * q.rows * q.blocks);
  q.sum = scratch<std::int32_t>(g.groups * q.rows * q.blocks);
  const std::int64_t group_channels = g.channels / g.groups;

  parallel(g.groups * g.images * q.height, [&](std::int64_t line) {
    const std::int64_t y = line % q.height - pad_h, image = line / q.height % g.images, group = line / q.height / g.images;
    const std::int64_t row0 = line * q.width;
    const auto blank = [&](std::int64_t from, std::int64_t count) {
      std::memset(q.mantissa.get() + (row0 + from) * q.row_bytes, 0, count * q.row_bytes);
      std::fill_n(q.scale.get() + (row0 + from) * q.blocks, count * q.blocks, 1.0f);
      std::fill_n(q.sum.get() + (row0 + from) * q.blocks, count * q.blocks, 0);
    };
    if (y < 0 || y >= inner_h) return blank(0, q.width);
    blank(0, pad_w);
    blank(pad_w + inner_w, pad_w);
    const Strides& s = o.input_strides;
    const float* channels = o.input + image * s.image + group * group_channels * s.channel;
    const auto values = scratch<float>(g.block_size * kLanes);
    for (std::int64_t x = 0; x < inner_w; x += kLanes) {
      const int lanes = static_cast<int>(std::min<std::int64_t>(kLanes, inner_w - x));
      const std::int64_t row = row0 + pad_w + x;
      for (std::int64_t b = 0; b < q.blocks; ++b) {
        const std::int64_t first = b * g.block_size, count = b + 1 < q.blocks ? g.block_size : g.last();
        (g.flat ? gather_patches : gather_channels)(g, s, channels, first, count, y, x, lanes, values.get());
        std::int8_t* output = q.mantissa.get() + row * q.row_bytes + first;
        // Four values are written at a time: clear what lies behind a short block first.
        if (const std::int64_t tail = (count + 7) / 8 * 8; tail != count)
          for (int i = 0; i < lanes; ++i) std::memset(output + i * q.row_bytes + count / 4 * 4, 0, tail - count / 4 * 4);
        kernels.quantize({values.get(), static_cast<int>(count), o.activation_bits, o.sign, output, q.row_bytes, lanes,
                          q.scale.get() + row * q.blocks + b, q.sum.get() + row * q.blocks + b, q.blocks});
      }
    }
  });
  return q;
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
  // |S| stays within 24 bits, and with it every sum within 32, up to this block size.
  return channels % groups == 0 && outputs % groups == 0 && block_size % 8 == 0 && block_size <= 512 &&
         out(height, pad_h, dilation_h, kernel_h, stride_h) == out_height &&
         out(width, pad_w, dilation_w, kernel_w, stride_w) == out_width;
}

void pack_weight(const Geometry& g, const std::int8_t* vqk, int bits, std::uint8_t* packed) {
  const bool wide = bits > 4;
  const int zero = 1 << (wide ? 7 : 3);
  const std::int64_t taps = g.taps(), depth = g.depth(), per_group = g.group_outputs();
  for (std::int64_t group = 0; group < g.groups; ++group)
    for (std::int64_t panel = 0; panel < 2 * g.pairs(); ++panel)
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
            const std::int64_t row = ((group * 2 * g.pairs() + panel) * taps + tap) * g.row_octets() + octet;
            if (wide) {
              std::memcpy(packed + row * 128 + 4 * n, eight, 4);
              std::memcpy(packed + row * 128 + 64 + 4 * n, eight + 4, 4);
            } else {
              for (int i = 0; i < 4; ++i) packed[row * 64 + 4 * n + i] = eight[i] | eight[i + 4] << 4;
            }
          }
}

void pack_kds(const Geometry& g, const float* kds, float* packed) {
  const std::int64_t taps = g.taps(), blocks = g.blocks(), per_group = g.group_outputs(), stride = g.kds_stride();
  for (std::int64_t group = 0; group < g.groups; ++group)
    for (std::int64_t tap = 0; tap < taps; ++tap)
      for (std::int64_t b = 0; b < blocks; ++b)
        for (std::int64_t n = 0; n < stride; ++n)
          packed[((group * taps + tap) * blocks + b) * stride + n] =
              n < per_group ? kds[((group * per_group + n) * blocks + b) * taps + tap] : 0.0f;
}

void convolve(const Geometry& g, const Operands& o, const Kernels& kernels) {
  const Quantized q = quantize_input(g, o, kernels);
  const std::int64_t out_pixels = g.out_height * g.out_width, pixels = g.images * out_pixels, taps = g.taps();
  std::vector<std::int64_t> tap(taps, 0);
  for (std::int64_t k = 0; k < taps && !g.flat; ++k)
    tap[k] = k / g.kernel_w * g.dilation_h * q.width + k % g.kernel_w * g.dilation_w;
  const std::int64_t panel = g.panel_bytes(o.wide), stride = g.kds_stride(), per_group = g.group_outputs();
  const std::int64_t chunk = kTilesInTask * kPixels, chunks = (pixels + chunk - 1) / chunk;
  // A task keeps its pixels in cache and goes through the weights; with few pixels there are more tasks, of some weights.
  const std::int64_t split = std::clamp<std::int64_t>(kTasks / std::max<std::int64_t>(1, g.groups * chunks), 1, g.pairs());

  parallel(g.groups * chunks * split, [&](std::int64_t task) {
    const std::int64_t part = task % split, group = task / split / chunks, first = task / split % chunks * chunk;
    const std::int64_t end = std::min(pixels, first + chunk);
    std::int64_t row[kTilesInTask * kPixels], place[kTilesInTask * kPixels];
    for (std::int64_t p = first; p < end; ++p) {
      const std::int64_t image = p / out_pixels, y = p % out_pixels / g.out_width, x = p % g.out_width;
      place[p - first] = image * o.output_strides.image + y * o.output_strides.y + x * o.output_strides.x;
      row[p - first] = g.flat ? p : (image * q.height + y * g.stride_h) * q.width + x * g.stride_w;
    }
    alignas(64) float sums[kPixels * 2 * kPanel];
    Tile t{};
    t.mantissa = q.mantissa.get() + group * q.rows * q.row_bytes;
    t.scale = q.scale.get() + group * q.rows * q.blocks;
    t.sum = q.sum.get() + group * q.rows * q.blocks;
    t.row_bytes = q.row_bytes;
    t.blocks = static_cast<int>(q.blocks);
    t.octets = static_cast<int>(g.octets());
    t.last_octets = static_cast<int>(g.last_octets());
    t.panel_bytes = panel;
    t.zero = o.zero;
    t.wide = o.wide;
    t.kds_stride = stride;
    t.tap = tap.data();
    t.taps = static_cast<int>(taps);
    t.output = sums;
    for (std::int64_t pair = part * g.pairs() / split; pair < (part + 1) * g.pairs() / split; ++pair) {
      t.weight = o.weight + (group * g.pairs() + pair) * 2 * panel;
      const std::int64_t scales = group * taps * q.blocks * stride + pair * 2 * kPanel;
      t.kds = o.kds + scales;
      t.kds_shift = o.kds_shift ? o.kds_shift + scales : nullptr;
      const std::int64_t from = group * per_group + pair * 2 * kPanel;
      const std::int64_t count = std::min<std::int64_t>(2 * kPanel, (group + 1) * per_group - from);
      for (std::int64_t p = first; p < end; p += kPixels) {
        const int height = static_cast<int>(std::min<std::int64_t>(kPixels, end - p));
        t.pixel = row + (p - first);
        kernels.tile(t, height);
        float* output = o.output + from * o.output_strides.channel;
        for (std::int64_t n = 0; n < count; ++n, output += o.output_strides.channel) {
          const float bias = o.bias ? o.bias[from + n] : -0.0f;  // the number that changes no other when added
          for (int m = 0; m < height; ++m) output[place[p - first + m]] = sums[m * 2 * kPanel + n] + bias;
        }
      }
    }
  });
}

}  // namespace dsconv
