// Bilinear interpolation.
#pragma once

#include <utility>

#include "kernels.h"

namespace dsconv {

// Every product except the first is fused with its addition.
template <class V>
inline typename V::Float interpolated(const InterpolateArgs& a, Interpolation how, const typename V::Float (&v)[4]) {
  const auto weight = [&](int i) { return V::broadcast(a.weight_y[i / 2] * a.weight_x[i % 2]); };
  const auto chain = [&](int first, int second, int third, int fourth) {
    auto sum = v[first] * weight(first);
    for (const int i : {second, third, fourth}) sum = V::fma(v[i], weight(i), sum);
    return sum;
  };
  if (how == Interpolation::above_first) return chain(1, 0, 2, 3);
  if (how == Interpolation::below_first) return chain(2, 3, 1, 0);
  const auto line = [&](int i) { return V::fma(v[i], V::broadcast(a.weight_x[0]), v[i + 1] * V::broadcast(a.weight_x[1])); };
  return V::fma(line(0), V::broadcast(a.weight_y[0]), line(2) * V::broadcast(a.weight_y[1]));
}

template <class V>
void interpolate(const InterpolateArgs& a) {
  std::int64_t c = 0;
  for (const auto& [end, how] : {std::pair{a.split, a.first}, std::pair{a.channels, a.rest}})
    for (; c < end; c += V::kLanes) {
      const int count = end - c < V::kLanes ? static_cast<int>(end - c) : V::kLanes;
      const typename V::Float v[] = {V::load(a.tap[0] + c, count), V::load(a.tap[1] + c, count), V::load(a.tap[2] + c, count),
                                     V::load(a.tap[3] + c, count)};
      V::store(a.output + c, interpolated<V>(a, how, v), count);
      if (count < V::kLanes) {
        c = end;
        break;
      }
    }
}

}  // namespace dsconv
