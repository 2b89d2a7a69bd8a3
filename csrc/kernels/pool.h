// Pooling over windows, and global averages.
#pragma once

#include "kernels.h"

namespace dsconv {

enum class Pooling { average, maximum, maximum_or_nan };

// Pools vectors of channels from c on, the last one with `count` lanes; several vectors hide the latency of the maximum. A
// maximum sets lanes of `doubt` to NaN if a value is infinite or NaN, since it may have dropped a NaN.
template <class V, int Vectors, Pooling P>
inline void pool_channels(const PoolArgs& a, std::int64_t c, int count, typename V::Float& doubt) {
  using Float = typename V::Float;
  const auto part = [&](int k, int i) {
    const float* from = a.tap[k] + c + i * V::kLanes;
    return Vectors > 1 || count == V::kLanes ? V::load(from) : V::load_some(from, count);
  };
  Float v[Vectors];
  Float doubts[Vectors];
  for (int i = 0; i < Vectors; ++i) v[i] = a.taps ? part(0, i) : Float{}, doubts[i] = v[i] * 0.0f;
  for (int k = 1; k < a.taps; ++k)
#pragma GCC unroll 4
    for (int i = 0; i < Vectors; ++i) {
      const Float next = part(k, i);
      if constexpr (P == Pooling::average) v[i] += next;
      if constexpr (P == Pooling::maximum) v[i] = next > v[i] ? next : v[i], doubts[i] = V::fma(next, Float{}, doubts[i]);
      if constexpr (P == Pooling::maximum_or_nan) v[i] = ((next > v[i]) | (next != next)) ? next : v[i];
    }
  for (int i = 0; i < Vectors; ++i) {
    if constexpr (P == Pooling::average) v[i] = v[i] / a.divisor / a.second_divisor;
    if constexpr (P == Pooling::maximum) doubt += doubts[i];
    float* to = a.output + c + i * V::kLanes;
    Vectors > 1 || count == V::kLanes ? V::store(to, v[i]) : V::store_some(to, v[i], count);
  }
}

template <class V, Pooling P>
inline typename V::Float pool_pixel(const PoolArgs& a) {
  typename V::Float doubt{};
  std::int64_t c = 0;
  for (; c + 4 * V::kLanes <= a.channels; c += 4 * V::kLanes) pool_channels<V, 4, P>(a, c, V::kLanes, doubt);
  for (; c < a.channels; c += V::kLanes)
    pool_channels<V, 1, P>(a, c, a.channels - c < V::kLanes ? static_cast<int>(a.channels - c) : V::kLanes, doubt);
  return doubt;
}

template <class V>
void pool(const PoolArgs& a) {
  if (a.divisor) {
    pool_pixel<V, Pooling::average>(a);
    return;
  }
  const auto doubt = pool_pixel<V, Pooling::maximum>(a);
  float sum = 0.0f;
  for (int i = 0; i < V::kLanes; ++i) sum += doubt[i];
  if (sum != sum) pool_pixel<V, Pooling::maximum_or_nan>(a);
}

// Follows "cascade_sum" of PyTorch's aten/src/ATen/native/cpu/SumKernel.cpp.
template <class V>
void average(const AverageArgs& a) {
  using Float = typename V::Float;
  constexpr int kTurns = 4, kLevels = 4;
  const int lanes = a.pixels < a.lanes ? 1 : a.lanes, sums = kTurns * lanes;
  const std::int64_t vectors = a.pixels / lanes, count = vectors / kTurns;
  int bits = 0;
  while (std::int64_t{1} << bits < count) ++bits;
  const int power = V::max(4, bits / kLevels);  // a level holds sums of 2^power of the level below
  for (std::int64_t c = 0; c < a.channels; c += V::kLanes) {
    const int left = a.channels - c < V::kLanes ? static_cast<int>(a.channels - c) : V::kLanes;
    const float* from = a.input + c;
    const auto next = [&] {
      const Float v = V::load(from, left);
      from += a.stride;
      return v;
    };
    Float level[kLevels][kTurns * kMaxLanes];
    for (int l = 0; l < kLevels; ++l)
      for (int i = 0; i < sums; ++i) level[l][i] = Float{};
    for (std::int64_t done = 1; done <= count; ++done) {
      for (int i = 0; i < sums; ++i) level[0][i] += next();
      for (int l = 1; l < kLevels && done % (std::int64_t{1} << l * power) == 0; ++l)
        for (int i = 0; i < sums; ++i) level[l][i] += level[l - 1][i], level[l - 1][i] = Float{};
    }
    for (int l = 1; l < kLevels; ++l)
      for (int i = 0; i < sums; ++i) level[0][i] += level[l][i];
    for (std::int64_t v = kTurns * count; v < vectors; ++v)
      for (int i = 0; i < lanes; ++i) level[0][i] += next();
    for (int i = lanes; i < sums; ++i) level[0][i % lanes] += level[0][i];
    Float total{};
    for (std::int64_t p = vectors * lanes; p < a.pixels; ++p) total += next();
    for (int i = 0; i < lanes; ++i) total += level[0][i];
    V::store(a.output + c, total / static_cast<float>(a.pixels), left);
  }
}

}  // namespace dsconv
