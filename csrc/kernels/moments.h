// Sums, means and standard deviations.
#pragma once

#include <cmath>

#include "kernels.h"

namespace dsconv {

// Sums in kMaxLanes parts for any vector width, so that every instruction set adds in the same order.
template <class V>
class LaneSums {
 public:
  using Float = typename V::Float;

  // Adds the results of function(c, count) for `count` values from c on, padded with zeros, over all values.
  template <class Function>
  void add(std::int64_t values, Function function) {
    for (std::int64_t first = 0; first < values; first += kMaxLanes)
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) {
        const std::int64_t c = first + i * V::kLanes;
        if (c < values) parts_[i] += function(c, values - c < V::kLanes ? static_cast<int>(values - c) : V::kLanes);
      }
  }

  float total() const {
    float lanes[kMaxLanes];
    for (int i = 0; i < kVectors; ++i) V::store(lanes + i * V::kLanes, parts_[i]);
    for (int apart = kMaxLanes / 2; apart; apart /= 2)
      for (int i = 0; i < apart; ++i) lanes[i] += lanes[i + apart];
    return lanes[0];
  }

 private:
  static constexpr int kVectors = kMaxLanes / V::kLanes;
  Float parts_[kVectors]{};
};

// Writes the differences from the mean, and returns the reciprocal of the standard deviation.
template <class V>
inline float centre(const float* from, std::int64_t channels, float epsilon, float* to) {
  LaneSums<V> sum, squares;
  sum.add(channels, [&](std::int64_t c, int count) { return V::load(from + c, count); });
  const float mean = sum.total() / static_cast<float>(channels);
  squares.add(channels, [&](std::int64_t c, int count) {
    V::store(to + c, V::load(from + c, count) - mean, count);
    const auto v = V::load(to + c, count);
    return v * v;
  });
  return 1.0f / std::sqrt(squares.total() / static_cast<float>(channels) + epsilon);
}

// Pixels are summed per channel, with long sums as sums of shorter ones; the channels of a group are summed in double.
template <class V>
void moments(const MomentsArgs& a) {
  using Float = typename V::Float;
  constexpr std::int64_t kTogether = 64;  // pixels
  const auto sum_over_pixels = [&](auto term, float* sums) {
    for (std::int64_t c = 0; c < a.channels; c += V::kLanes) {
      const int count = a.channels - c < V::kLanes ? static_cast<int>(a.channels - c) : V::kLanes;
      Float total{};
      for (std::int64_t first = 0; first < a.pixels; first += kTogether) {
        Float sum{};
        for (std::int64_t p = first; p < a.pixels && p < first + kTogether; ++p)
          sum += term(V::load(a.input + p * a.stride + c, count), c, count);
        total += sum;
      }
      V::store(sums + c, total, count);
    }
  };
  const auto of_groups = [&](float* of_channels, auto result) {
    for (std::int64_t first = 0; first < a.channels; first += a.group) {
      double sum = 0;
      for (std::int64_t c = first; c < first + a.group; ++c) sum += of_channels[c];
      const float made = result(static_cast<float>(sum / static_cast<double>(a.group * a.pixels)));
      for (std::int64_t c = first; c < first + a.group; ++c) of_channels[c] = made;
    }
  };
  sum_over_pixels([](Float v, std::int64_t, int) { return v; }, a.mean);
  of_groups(a.mean, [](float mean) { return mean; });
  sum_over_pixels(
      [&](Float v, std::int64_t c, int count) {
        v -= V::load(a.mean + c, count);
        return v * v;
      },
      a.scale);
  of_groups(a.scale, [&](float variance) { return 1.0f / std::sqrt(variance + a.epsilon); });
  for (std::int64_t c = 0; a.weight && c < a.channels; ++c) a.scale[c] *= a.weight[c];
}

}  // namespace dsconv
