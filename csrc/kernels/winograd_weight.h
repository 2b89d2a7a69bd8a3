// Rounds the transformed weights of Winograd to the integers that dsconv/numerics/winograd.py defines, with the same names.
// Every operation rounds as written, so that all bits agree.
#pragma once

#include "../rounding/winograd.h"
#include "../simd/lanes.h"

namespace dsconv {

// Processes an output, block by block, with a row of values for each position. Four of eight channels share a lane of 16
// bits. A row has a part for each of the four, so that these lanes are vector lanes.
template <class V>
class WinogradRounder {
  using Float = typename V::Float;
  using Int = typename V::Int;

 public:
  explicit WinogradRounder(const WinogradWeightArgs& a)
      : a_(a), part_(part_of(a.of)), u_(reinterpret_cast<float*>(a.memory)), q_(u_ + kWinogradPositions * 4 * part_) {}

  static std::int64_t bytes(const WinogradWeights& of) {
    return (kWinogradPositions + 1) * 4 * part_of(of) * static_cast<std::int64_t>(sizeof(float));
  }

  void round() const {
    const WinogradWeights& of = a_.of;
    for (std::int64_t block = 0; block < of.blocks(); ++block) {
      const std::int64_t first = block * of.block_size, left = of.channels - first;
      const std::int64_t channels = left < of.block_size ? left : of.block_size;
      transform(of.w + (a_.output * of.channels + first) * 9, channels);
      for (int product = 0; product < kWinogradProducts; ++product) {
        float* const u = row(product == kWinogradPositions ? kWinogradCentre : product);
        const float scale = round_for_lanes(u);
        const std::int64_t at = product * of.outputs + a_.output;
        a_.to.scale[at * of.blocks() + block] = scale;
        store(channels, a_.to.q + at * of.channels + first);
        if (product == kWinogradCentre)  // the last product compensates the residual of this one
          for (std::int64_t i = 0; i < 4 * part_; i += V::kLanes) V::store(u + i, V::load(u + i) - V::load(q_ + i) * scale);
      }
    }
  }

 private:
  static constexpr float kMost = 127.0f, kMostOfLane = 128.0f, kCoarser = 1.01f;
  static constexpr float kWhole =
      12582912.0f;  // 1.5 * 2^23: adding it removes the fraction, and leaves the integer in the lowest bits

  static std::int64_t part_of(const WinogradWeights& of) {
    return ((of.block_size + 7) / 8 * 2 + V::kLanes - 1) / V::kLanes * V::kLanes;
  }

  float* row(int position) const { return u_ + position * 4 * part_; }

  // Sums of the transform are float64 and rounded once. Zeros follow the channels.
  void transform(const float* w, std::int64_t channels) const {
    const auto side = [](double first, double middle, double last, double (&to)[4]) {
      const double outer = first + last;
      to[0] = first, to[1] = (outer + middle) * 0.5, to[2] = (outer - middle) * 0.5, to[3] = last;
    };
    for (std::int64_t c = 0; c < 4 * part_; ++c) {
      float* const to = u_ + ((c >> 1 & 2) | (c & 1)) * part_ + (c >> 3) * 2 + (c >> 1 & 1);
      double columns[3][4]{}, values[4];
      if (c < channels)
        for (int j = 0; j < 3; ++j) side(w[9 * c + j], w[9 * c + 3 + j], w[9 * c + 6 + j], columns[j]);
      for (int i = 0; i < 4; ++i) {
        side(columns[0][i], columns[1][i], columns[2][i], values);
        for (int j = 0; j < 4; ++j) to[(4 * i + j) * 4 * part_] = static_cast<float>(values[j]);
      }
    }
  }

  // Writes the integers of a row to q_, and returns their scale; zeros and a NaN if a value is not finite.
  float round_for_lanes(const float* u) const {
    Float least{};  // scale, lane by lane
    Int strange{};
    for (std::int64_t i = 0; i < part_; i += V::kLanes) {
      Float four[4], largest{};
      for (int k = 0; k < 4; ++k) {
        const Float v = V::load(u + k * part_ + i);
        strange |= v - v != Float{};
        largest = V::max(v < 0 ? -v : v, largest);
        four[k] = v / kMostOfLane;
      }
      least = V::max(V::max(largest / kMost, fullest(four)), least);
    }
    float scale = 0.0f;
    for (int i = 0; i < V::kLanes; ++i) scale = V::max(least[i], scale);
    if (V::any(V::as_word(strange))) {
      for (std::int64_t i = 0; i < 4 * part_; ++i) q_[i] = 0.0f;
      return __builtin_nanf("");
    }
    if (scale == 0) scale = 1.0f;
    while (too_full(u, scale)) {
      const float next = __builtin_bit_cast(float, __builtin_bit_cast(std::int32_t, scale) + 1);
      scale = V::max(scale * kCoarser, next);
    }
    return scale;
  }

  // Rounds a row to q_; returns whether the integers of a lane exceed its bound.
  bool too_full(const float* u, float scale) const {
    Float most{};
    for (std::int64_t i = 0; i < part_; i += V::kLanes) {
      Float four[4];
      for (int k = 0; k < 4; ++k) {
        const Float v = V::load(u + k * part_ + i) / scale;
        four[k] = (V::max(Float{} - kMost, V::min(Float{} + kMost, v)) + kWhole) - kWhole;
        V::store(q_ + k * part_ + i, four[k]);
      }
      most = V::max(fullest(four), most);
    }
    return V::any(V::as_word(most > kMostOfLane));
  }

  // Returns the larger of the sum of positive values and the magnitude of the sum of negative values.
  static Float fullest(const Float (&v)[4]) {
    const auto positive = [](const Float& a) { return V::max(a, Float{}); };
    const auto negative = [](const Float& a) { return V::max(-a, Float{}); };
    const auto sum = [&](auto side) { return (side(v[0]) + side(v[1])) + (side(v[2]) + side(v[3])); };
    return V::max(sum(positive), sum(negative));
  }

  // Stores the integers of `channels` channels in order.
  void store(std::int64_t channels, std::int8_t* to) const {
    for (std::int64_t i = 0; 4 * i < channels; i += V::kLanes) {
      const auto word = [&](int k) { return V::as_int(V::load(q_ + k * part_ + i) + kWhole); };
      // Two words hold channels 0, 1, 4, 5 and 2, 3, 6, 7: the middle four of the eight change places.
      const auto words = reinterpret_cast<typename V::Pairs>(V::low_bytes(word(0), word(1), word(2), word(3)));
      const typename V::Pairs middle = (words >> 16 & 0xffff0000) | (words & 0xffff0000) << 16;
      const typename V::Pairs eights = (words & ~0xffffffff0000) | middle;
      const std::int64_t left = channels - 4 * i;
      if (left >= static_cast<std::int64_t>(sizeof eights)) __builtin_memcpy(to + 4 * i, &eights, sizeof eights);
      else __builtin_memcpy(to + 4 * i, &eights, left);
    }
  }

  const WinogradWeightArgs& a_;
  std::int64_t part_;  // values in a part of a row
  float *u_, *q_;      // [positions][4][part_] and [4][part_]
};

template <class V>
std::int64_t winograd_weight_bytes(const WinogradWeights& of) {
  return WinogradRounder<V>::bytes(of);
}

template <class V>
void round_winograd_output(const WinogradWeightArgs& a) {
  WinogradRounder<V>(a).round();
}

}  // namespace dsconv
