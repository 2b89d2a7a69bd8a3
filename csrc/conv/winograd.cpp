#include <algorithm>
#include <vector>

#include "../isa/list.h"
#include "../parallel.h"
#include "outputs.h"

namespace dsconv {
namespace {

constexpr int kTile = 2;                                              // output pixels in height and width
constexpr std::int64_t kMaxTiles = kMaxTaskPixels / (kTile * kTile);  // of a strip
constexpr std::int64_t kStripBytes = 384 << 10;                       // of transformed input, which fits in the L2 cache
constexpr std::int64_t kMinTiles = 32;                                // with fewer, reading the weights dominates
constexpr std::int64_t kTasks = 32;                                   // enough to balance the threads

// The tiles of all images, in row-major order.
struct Tiles {
  const ConvSizes& g;
  std::int64_t down = ceil_div(g.out_height, kTile), across = ceil_div(g.out_width, kTile);

  std::int64_t count() const { return g.images * down * across; }
};

// The tasks of a convolution: some strips of tiles times some outputs.
class WinogradTasks : OutputTasks {
 public:
  WinogradTasks(const ConvSizes& g, const Layer& l, const Kernels& kernels, const Input& from, const Output& o)
      : OutputTasks(g, l, kernels, o), tiles_{g}, from_(from), zeros_(g.layout().block_size + kMaxLanes, 0.0f),
        format_{g.layout(), 1, 8, Sign::adaptive, true, true} {}
  using OutputTasks::units;

  // The transformed input of a strip: a position is an image of one line, whose pixels are tiles.
  PaddedGrid grid(std::int64_t tiles) const { return {kWinogradPositions, 1, tiles, 0, 0}; }
  std::int64_t bytes(std::int64_t tiles) const { return QuantizedTensor::bytes(format_, grid(tiles)); }
  QuantizedTensor transformed(std::int64_t tiles, std::byte* memory) const {
    const QuantizedTensor made(format_, grid(tiles), memory);
    made.begin(0, g_.channels);
    return made;
  }

  // Transforms and quantizes tiles, from `first` on.
  void transform(std::int64_t first, const QuantizedTensor& to, std::int64_t begin, std::int64_t end) const {
    const BlockLayout& layout = format_.layout;
    struct User;
    using Mine = Scratch<User>;
    Mine scratch(Mine::template size<float>(kWinogradPositions * layout.block_size));
    const float* pixel[kWinogradPositions];
    WinogradInputArgs a{};
    a.pixel = pixel, a.rows = to.of_group(0), a.rows.flipped = kernels_.flip_winograd;
    a.apart = to.grid().image(), a.values = scratch.template take<float>(0);
    for (std::int64_t t = begin; t < end; ++t) {
      const bool inside = pixels_of(first + t, pixel);
      a.row = to.row(0, 0, t), a.first_byte = 0;
      for (a.block = 0; a.block < layout.blocks(); ++a.block, a.first_byte += layout.block_size) {
        a.channels = static_cast<int>(layout.size(a.block));
        kernels_.vector.winograd_input(a);
        for (const float*& p : pixel)
          if (inside || p != zeros_.data()) p += layout.block_size;
      }
    }
  }

  // Computes outputs of some units at the transformed tiles of a strip.
  void run(std::int64_t first, std::int64_t tiles, const QuantizedTensor& q, std::int64_t begin_unit, std::int64_t end_unit) const {
    Pixels px;
    px.group = 0, px.count = 0;
    int pixel[kMaxTiles * kTile * kTile];
    std::vector<Run> runs;
    number_pixels(first, tiles, px, pixel, runs);
    std::int64_t row[kWinogradPositions * kMaxTiles];
    for (std::int64_t i = 0; i < kWinogradPositions * tiles; ++i) row[i] = i;
    DotArgs dot = dot_args(q.of_group(0), tiles, row);
    const std::int64_t needed = kernels_.workspace_bytes ? kernels_.workspace_bytes(dot) : 0;
    struct User;
    using Mine = Scratch<User>;
    Mine scratch(Mine::template size<std::uint8_t>(needed) + Mine::template size<float>(kWinogradProducts * tiles * kNR) +
                 OutputTasks::bytes<Mine>(px));
    dot.workspace = scratch.template take<std::uint8_t>(needed);
    float* const sums = scratch.template take<float>(kWinogradProducts * tiles * kNR);
    take(scratch, px);
    for (const Run& r : runs) locate(r.first, r.count, r.at, px);
    for (std::int64_t u = begin_unit; u < end_unit; ++u) {
      const Unit unit = unit_at(px, u);
      for (std::int64_t from = unit.begin; from < unit.end; from += kNR) {
        sum(from, unit.end, dot, row, sums);
        kernels_.vector.winograd_output({sums, static_cast<int>(tiles), pixel, px.sums + (from - unit.begin) * px.count});
      }
      finish(px, unit);
    }
  }

 private:
  struct Run {  // of neighbouring pixels of a line
    std::int64_t first, count;
    int at;
  };

  // Finds the pixels that a tile reads; returns whether all are inside the image. Those outside are zeros.
  bool pixels_of(std::int64_t tile, const float** pixel) const {
    const std::int64_t image = tile / tiles_.across / tiles_.down, top = tile / tiles_.across % tiles_.down * kTile - g_.pad_h,
                       left = tile % tiles_.across * kTile - g_.pad_w;
    const float* const values = from_.values + image * from_.strides.image;
    bool inside = true;
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j) {
        const std::int64_t y = top + i, x = left + j;
        const bool in = y >= 0 && y < g_.height && x >= 0 && x < g_.width;
        pixel[4 * i + j] = in ? values + y * from_.strides.y + x * from_.strides.x : zeros_.data();
        inside &= in;
      }
    return inside;
  }

  // Numbers the pixels of a strip, line by line within a line of tiles, as runs of consecutive pixels.
  void number_pixels(std::int64_t first, std::int64_t tiles, Pixels& px, int* pixel, std::vector<Run>& runs) const {
    for (std::int64_t t = first; t < first + tiles;) {
      const std::int64_t x = t % tiles_.across, line = t / tiles_.across, image = line / tiles_.down;
      const std::int64_t stop = std::min(first + tiles, t + tiles_.across - x), y = line % tiles_.down * kTile;
      const std::int64_t wide = std::min(g_.out_width, (x + stop - t) * kTile) - x * kTile;
      const std::int64_t high = std::min<std::int64_t>(kTile, g_.out_height - y);
      int* const to = pixel + (t - first) * kTile * kTile;
      std::fill_n(to, (stop - t) * kTile * kTile, -1);
      for (std::int64_t i = 0; i < high; ++i) {
        runs.push_back({(image * g_.out_height + y + i) * g_.out_width + x * kTile, wide, px.count});
        for (std::int64_t j = 0; j < wide; ++j) to[(j / kTile * kTile + i) * kTile + j % kTile] = px.count++;
      }
      t = stop;
    }
  }

  const std::int32_t* flip_sums() const { return reinterpret_cast<const std::int32_t*>(l_.weight + g_.panels_bytes(true)); }

  DotArgs dot_args(const QuantizedRows& rows, std::int64_t tiles, const std::int64_t* row) const {
    static constexpr std::int64_t kTap = 0;
    DotArgs a{};
    a.rows = rows, a.rows.flipped = kernels_.flip_winograd;
    a.octets = static_cast<int>(g_.layout().octets()), a.last_octets = static_cast<int>(g_.layout().last_octets());
    a.panel_bytes = g_.panel_bytes(true) / kWinogradProducts, a.panels = 2;
    a.flip_sums = flip_sums();
    a.row = row, a.pixels = static_cast<int>(tiles);
    a.tap_row = &kTap, a.taps = 1;
    return a;
  }

  // Sums all products for kNR outputs, from `from` on.
  void sum(std::int64_t from, std::int64_t end, DotArgs& a, const std::int64_t* row, float* sums) const {
    const std::int64_t blocks = a.rows.blocks, pair = from / kNR;
    const bool overflow = std::find(a.rows.overflow, a.rows.overflow + blocks, 1) != a.rows.overflow + blocks;
    const auto dot = overflow ? scalar::kernels.dot : kernels_.dot;
    a.panels = end - from > kPanel ? 2 : 1;
    for (int p = 0; p < kWinogradProducts; ++p) {
      a.weight = l_.weight + (pair * kWinogradProducts + p) * 2 * a.panel_bytes;
      a.kds = l_.kds + (pair * kWinogradProducts + p) * blocks * kNR;
      a.flip_sums = flip_sums() + (pair * kWinogradProducts + p) * blocks * kNR;
      a.kds_shift = p == kWinogradCentre ? l_.kds_shift + pair * blocks * kNR : nullptr;
      a.row = row + (p < kWinogradPositions ? p : kWinogradCentre) * a.pixels;
      a.sums = sums + std::int64_t{p} * a.pixels * kNR;
      dot(a);
    }
  }

  const Tiles tiles_;
  const Input& from_;
  const std::vector<float> zeros_;
  const ActivationFormat format_;
};

// Copies an input whose channels are not contiguous to NHWC.
Input channels_last(const ConvSizes& g, const Input& from, float* to) {
  parallel(g.images * g.height, [&](std::int64_t line) {
    const std::int64_t image = line / g.height, y = line % g.height;
    const float* const values = from.values + image * from.strides.image + y * from.strides.y;
    for (std::int64_t first = 0; first < g.channels; first += kMaxLanes)
      for (std::int64_t x = 0; x < g.width; ++x)
        for (std::int64_t c = first; c < std::min(g.channels, first + kMaxLanes); ++c)
          to[(line * g.width + x) * g.channels + c] = values[c * from.strides.channel + x * from.strides.x];
  });
  return {to, {g.height * g.width * g.channels, 1, g.width * g.channels, g.channels}};
}

}  // namespace

void convolve_winograd(const ConvSizes& g, const Layer& l, const Kernels& kernels, const Input& input, const Output& o) {
  struct Copied;
  const bool apart = input.strides.channel != 1;
  Scratch<Copied> copied(apart ? g.images * g.height * g.width * g.channels * 4 : 0);
  const Input from = apart ? channels_last(g, input, copied.template take<float>(0)) : input;
  const WinogradTasks tasks(g, l, kernels, from, o);
  const std::int64_t tiles = Tiles{g}.count();
  const std::int64_t most =
      std::clamp(kStripBytes / (kWinogradPositions * g.channels), kMinTiles, kMaxTiles) / kernels.mr * kernels.mr;
  const std::int64_t strips = ceil_div(tiles, std::max<std::int64_t>(1, most));
  const std::int64_t even = ceil_div(ceil_div(tiles, std::max<std::int64_t>(1, strips)), kernels.mr) * kernels.mr;
  const auto count = [&](std::int64_t strip) { return std::min(even, tiles - strip * even); };
  const std::int64_t split = std::clamp<std::int64_t>(kTasks / std::max<std::int64_t>(1, strips), 1, tasks.units);
  struct User;
  if (split == 1)
    return parallel(strips, [&](std::int64_t strip) {
      if (count(strip) <= 0) return;
      Scratch<User> scratch(tasks.bytes(even));
      const QuantizedTensor q = tasks.transformed(count(strip), scratch.template take<std::byte>(0));
      tasks.transform(strip * even, q, 0, count(strip));
      tasks.run(strip * even, count(strip), q, 0, tasks.units);
    });
  // Few strips: all are transformed first, so that tasks for different outputs share them.
  const std::int64_t bytes = (tasks.bytes(even) + 63) / 64 * 64, parts = ceil_div(kTasks, std::max<std::int64_t>(1, strips));
  struct Shared;
  Scratch<Shared> scratch(strips * bytes);
  std::byte* const memory = scratch.template take<std::byte>(0);
  std::vector<QuantizedTensor> q(strips);
  for (std::int64_t i = 0; i < strips; ++i)
    if (count(i) > 0) q[i] = tasks.transformed(count(i), memory + i * bytes);
  parallel(strips * parts, [&](std::int64_t task) {
    const std::int64_t strip = task / parts, part = task % parts, n = std::max<std::int64_t>(0, count(strip));
    tasks.transform(strip * even, q[strip], part * n / parts, (part + 1) * n / parts);
  });
  parallel(strips * split, [&](std::int64_t task) {
    const std::int64_t strip = task / split, part = task % split;
    if (count(strip) > 0)
      tasks.run(strip * even, count(strip), q[strip], part * tasks.units / split, (part + 1) * tasks.units / split);
  });
}

}  // namespace dsconv
