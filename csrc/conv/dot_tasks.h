// Dot products of some pixels times some outputs, and their epilogue.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "../isa/list.h"
#include "../scratch.h"
#include "outputs.h"

namespace dsconv {

// The tasks of a direct convolution: dot products of some pixels times some outputs.
class DotTasks : OutputTasks {
 public:
  // The distances in rows of the taps, from `first_tap` on, to a pixel's row.
  DotTasks(const ConvSizes& g, const Layer& l, const Kernels& kernels, const Output& o, std::span<const std::int64_t> tap_row,
           std::int64_t first_tap = 0)
      : OutputTasks(g, l, kernels, o), tap_row_(tap_row), first_tap_(first_tap) {}
  using OutputTasks::units;

  // Computes outputs of some units of a group at pixels `first` to `end`, at most kMaxTaskPixels. Their rows begin at
  // row_of(image, y, x), with stride `row_stride` within a line.
  template <class RowOf>
  void run(const QuantizedRows& rows, RowOf row_of, std::int64_t row_stride, std::int64_t group, std::int64_t first,
           std::int64_t end, std::int64_t begin_unit, std::int64_t end_unit) const {
    Pixels px;
    px.group = group, px.count = static_cast<int>(end - first);
    std::int64_t row[kMaxTaskPixels];
    pixel_offsets(first, px.count, g_.out_height, g_.out_width, row_stride, row_of, row);
    DotArgs dot = dot_args(rows, px, row);
    const bool at_once = finishes_at_once(rows);
    const std::int64_t needed = kernels_.workspace_bytes ? kernels_.workspace_bytes(dot) : 0;
    struct User;
    using Mine = Scratch<User>;
    Mine scratch(Mine::template size<std::uint8_t>(needed) + (at_once ? 0 : bytes<Mine>(px)));
    dot.workspace = scratch.template take<std::uint8_t>(needed);
    if (!at_once) take(scratch, px);
    locate(first, px.count, 0, px);
    if (at_once) return finish_at_once(px, dot, begin_unit, end_unit);
    for (std::int64_t u = begin_unit; u < end_unit; ++u) {
      const Unit unit = unit_at(px, u);
      sum(px, unit, dot);
      finish(px, unit);
    }
  }

 private:
  // Returns the arguments that all units share.
  DotArgs dot_args(const QuantizedRows& rows, const Pixels& px, const std::int64_t* row) const {
    DotArgs a{};
    a.rows = rows;
    a.octets = static_cast<int>(g_.layout().octets()), a.last_octets = static_cast<int>(g_.layout().last_octets());
    a.panel_bytes = g_.panel_bytes(l_.wide), a.panels = 2;
    a.octets_together = octets_together(l_.activation_bits);
    a.row = row, a.pixels = px.count;
    a.tap_row = tap_row_.data(), a.taps = static_cast<int>(tap_row_.size());
    a.prefetch_place = o_.residual.values ? px.residual_place : px.place;
    return a;
  }

  // Whether the kernels apply the epilogue while the sums are in registers.
  bool finishes_at_once(const QuantizedRows& rows) const {
    return kernels_.dot_one_block && g_.taps() == 1 && tap_row_.size() == 1 && rows.blocks == 1 && !rows.overflow[0] &&
           !rows.int_acc && o_.values && channel_stride() == 1 && o_.targets.empty() && !o_.residual.values &&
           g_.group_outputs() % kPanel == 0;
  }
  void finish_at_once(const Pixels& px, DotArgs& a, std::int64_t begin_unit, std::int64_t end_unit) const {
    const std::int64_t begin = begin_unit * unit_, end = std::min(g_.group_outputs(), end_unit * unit_);
    const std::int64_t output = px.group * g_.group_outputs() + begin, pair = px.group * g_.panel_pairs() + begin / kNR;
    a.weight = l_.weight + pair * 2 * a.panel_bytes;
    a.kds = l_.kds + pair * kNR, a.kds_shift = l_.kds_shift ? l_.kds_shift + pair * kNR : nullptr;
    EpilogueArgs to{};
    to.outputs = static_cast<int>(end - begin), to.post = l_.post.from(output), to.output = o_.values + output;
    const ActivationSettings activation = l_.post.activation;
    const bool bounds = has_bounds(activation.kind);
    if (!bounds) to.post.activation.kind = Activation::none;
    // Other activations are applied to some outputs at a time, while they are in the L1 cache.
    constexpr int kCachedValues = 4096;
    const int together = bounds ? px.count : std::max(1, kCachedValues / to.outputs);
    const std::int64_t* const row = a.row;
    for (int p = 0; p < px.count; p += together) {
      a.row = row + p, a.pixels = std::min(together, px.count - p), to.place = px.place + p;
      kernels_.dot_one_block(a, to);
      if (!bounds) activate(to.output, to.place, a.pixels, to.outputs, activation);
    }
  }

  // Applies the activation to outputs in place, pixel by pixel.
  void activate(float* outputs, const std::int64_t* place, int pixels, int channels, const ActivationSettings& activation) const {
    MapArgs m{};
    m.operation = Operation::activate, m.activation = activation, m.channels = channels;
    m.input_stride = m.output_stride = pixel_stride();
    for (int p = 0; p < pixels; p += static_cast<int>(m.pixels)) {
      for (m.pixels = 1; p + m.pixels < pixels && place[p + m.pixels] == place[p] + m.pixels * pixel_stride();) ++m.pixels;
      m.input = m.output = outputs + place[p];
      kernels_.vector.map(m);
    }
  }

  void sum(const Pixels& px, const Unit& unit, DotArgs& a) const {
    const std::int64_t blocks = a.rows.blocks;
    const bool overflow = std::find(a.rows.overflow, a.rows.overflow + blocks, 1) != a.rows.overflow + blocks;
    const auto dot = overflow ? scalar::kernels.dot : kernels_.dot;
    const std::int64_t first_byte = first_tap_ * (a.panel_bytes / g_.taps());
    a.sums = px.sums;
    if (!a.taps) return void(std::fill_n(px.sums, ceil_div(unit.end - unit.begin, kNR) * px.count * kNR, 0.0f));
    for (std::int64_t from = unit.begin; from < unit.end; from += kNR, a.sums += px.count * kNR) {
      const std::int64_t output = px.group * g_.group_outputs() + from, pair = px.group * g_.panel_pairs() + from / kNR;
      const std::int64_t scales = (pair * g_.taps() + first_tap_) * blocks * kNR;
      a.weight = l_.weight + pair * 2 * a.panel_bytes + first_byte;
      a.kds = l_.kds + scales;
      a.kds_shift = l_.kds_shift ? l_.kds_shift + scales : nullptr;
      a.panels = unit.end - from > kPanel ? 2 : 1;
      if (o_.values && channel_stride() == 1) a.prefetch = o_.residual.values ? o_.residual.values + output : o_.values + output;
      dot(a);
    }
  }

  const std::span<const std::int64_t> tap_row_;
  const std::int64_t first_tap_;
};

}  // namespace dsconv
