// Epilogue of a convolution: post-ops and quantization of the sums of some pixels times some outputs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <span>

#include "../scratch.h"
#include "conv.h"

namespace dsconv {

// Base class of the tasks of a convolution, which compute the sums.
class OutputTasks {
 public:
  OutputTasks(const ConvSizes& g, const Layer& l, const Kernels& kernels, const Output& o)
      : units(ceil_div(g.group_outputs(), unit_of(g, o.targets))), g_(g), l_(l), kernels_(kernels), o_(o),
        unit_(unit_of(g, o.targets)) {}

  const std::int64_t units;  // of the outputs of a group

 protected:
  // The pixels of a task, and its scratch memory.
  struct Pixels {
    std::int64_t group;
    int count;
    std::int64_t place[kMaxTaskPixels];           // of its outputs
    std::int64_t residual_place[kMaxTaskPixels];  // of its residuals
    float *sums, *finished;                       // of a unit; outputs that are not stored as floats
    std::int64_t* target_row;                     // [targets][count]
  };
  // Outputs `begin` to `end` of a group, and their offset in the output tensor.
  struct Unit {
    std::int64_t begin, end;
    float* values;
  };

  template <class Mine>
  std::int64_t bytes(const Pixels& px) const {
    return Mine::template size<float>(px.count * sums_of_pixel()) + Mine::template size<float>(px.count * kept_of_pixel()) +
           Mine::template size<std::int64_t>(px.count * std::ssize(o_.targets));
  }
  template <class Mine>
  void take(Mine& scratch, Pixels& px) const {
    px.sums = scratch.template take<float>(px.count * sums_of_pixel());
    px.finished = scratch.template take<float>(px.count * kept_of_pixel());
    px.target_row = scratch.template take<std::int64_t>(px.count * std::ssize(o_.targets));
  }

  // Sets the offsets of `count` neighbouring pixels from `first` on, which are the pixels from `at` on of the task.
  void locate(std::int64_t first, std::int64_t count, int at, Pixels& px) const {
    const auto offsets = [&](const Strides& s, std::int64_t* to) {
      const auto of_line = [&s](std::int64_t image, std::int64_t y, std::int64_t x) { return image * s.image + y * s.y + x * s.x; };
      pixel_offsets(first, count, g_.out_height, g_.out_width, s.x, of_line, to + at);
    };
    for (std::int64_t i = 0; i < std::ssize(o_.targets); ++i) {
      const Lattice& l = o_.lattice;
      const auto row_of = [&](std::int64_t image, std::int64_t y, std::int64_t x) {
        return o_.targets[i].tensor.row(image * l.frames + l.frame, l.y + y * l.step_y, l.x + x * l.step_x);
      };
      pixel_offsets(first, count, g_.out_height, g_.out_width, l.step_x, row_of, px.target_row + i * px.count + at);
    }
    if (o_.residual.values) offsets(o_.residual.strides, px.residual_place);
    if (o_.values) return offsets(o_.strides, px.place);
    for (int p = at; p < at + count; ++p) px.place[p] = p * unit_;
  }

  std::int64_t channel_stride() const { return o_.values ? o_.strides.channel : 1; }
  std::int64_t pixel_stride() const { return o_.values ? o_.strides.x : unit_; }

  Unit unit_at(const Pixels& px, std::int64_t u) const {
    const std::int64_t begin = u * unit_, end = std::min(g_.group_outputs(), begin + unit_);
    return {begin, end, o_.values ? o_.values + (px.group * g_.group_outputs() + begin) * channel_stride() : px.finished};
  }

  void finish(const Pixels& px, const Unit& unit) const {
    std::optional<QuantizeArgs> block = block_of(px, unit);
    for (int p = 0, count; p < px.count; p += count) {
      count = together(px, p);
      const auto outputs = [&](std::int64_t from, std::int64_t end) {
        const std::int64_t output = px.group * g_.group_outputs() + from;
        EpilogueArgs a{};
        a.sums = px.sums + (from - unit.begin) * px.count + p * kNR, a.pixels = count, a.outputs = static_cast<int>(end - from);
        a.place = px.place + p, a.residual_place = px.residual_place + p, a.channel_stride = channel_stride();
        a.post = l_.post.from(output);
        if (o_.residual.values) a.residual = o_.residual.values + output * o_.residual.strides.channel;
        a.output = unit.values + (from - unit.begin) * channel_stride();
        return a;
      };
      if (block) {
        block->row = px.target_row + p, block->pixels = count;
        if (kernels_.vector.epilogue_quantize(outputs(unit.begin, unit.end), px.count * kNR, *block, pixel_stride())) continue;
      }
      for (std::int64_t from = unit.begin; from < unit.end; from += kNR)
        kernels_.vector.epilogue(outputs(from, std::min<std::int64_t>(from + kNR, unit.end)));
      const std::int64_t group_first = px.group * g_.group_outputs();
      for (std::size_t i = 0; i < o_.targets.size(); ++i)
        quantize_into(o_.targets[i], kernels_, unit.values + px.place[p], pixel_stride(), px.target_row + i * px.count + p, count,
                      group_first + unit.begin, group_first + unit.end);
    }
  }

 private:
  // Returns how many pixels from p on share an epilogue. Outputs with a large stride are quantized in small groups of
  // neighbours, while they are still in the L1 cache.
  int together(const Pixels& px, int p) const {
    if (!o_.values || o_.targets.empty()) return px.count - p;
    int count = 1;
    while (count < kMaxLanes && p + count < px.count && px.place[p + count] == px.place[p] + count * pixel_stride()) ++count;
    return count;
  }

  // Returns the block of the only target that a unit fills, if it fills one; its pixels are not set yet.
  std::optional<QuantizeArgs> block_of(const Pixels& px, const Unit& unit) const {
    if (o_.targets.size() != 1 || (o_.values && o_.strides.channel != 1)) return {};
    const QuantizedTarget& target = o_.targets.front();
    const BlockLayout& layout = target.tensor.format().layout;
    const std::int64_t channel = target.first + px.group * g_.group_outputs() + unit.begin;
    const std::int64_t block = channel % layout.depth / layout.block_size;
    if (layout.size(block) != unit.end - unit.begin) return {};
    return quantize_args(target.tensor, channel / layout.depth, block, px.target_row, 0);
  }

  // Returns how many outputs of a group are computed before they are quantized: a number that fills whole blocks of all
  // targets.
  static std::int64_t unit_of(const ConvSizes& g, std::span<const QuantizedTarget> targets) {
    std::int64_t unit = kNR;
    for (const QuantizedTarget& target : targets) unit = std::lcm(unit, target.tensor.format().layout.block_size);
    return std::min(unit, g.panel_pairs() * kNR);
  }
  std::int64_t sums_of_pixel() const { return ceil_div(unit_, kNR) * kNR; }
  std::int64_t kept_of_pixel() const { return o_.values ? 0 : unit_; }

 protected:
  const ConvSizes& g_;
  const Layer& l_;
  const Kernels& kernels_;
  const Output& o_;
  const std::int64_t unit_;
};

}  // namespace dsconv
