// Elementwise operators.
#pragma once

#include "activation.h"
#include "moments.h"

namespace dsconv {

template <class V, bool OneOperand, class Function>
void map_values(const MapArgs& args, Function function) {
  const MapArgs a = args;  // a local copy, which no store of outputs can alias
  for (std::int64_t p = 0; p < a.pixels; ++p) {
    const float *from = a.input + p * a.input_stride, *operand = a.operand + p * a.operand_stride;
    float* to = a.output + p * a.output_stride;
    const auto part = [&](std::int64_t c, int count) {
      const auto other = OneOperand ? V::broadcast(*operand) : V::load(operand + c, count);
      V::store(to + c, function(V::load(from + c, count), other, c, count), count);
    };
    std::int64_t c = 0;
    for (; c + V::kLanes <= a.channels; c += V::kLanes) part(c, V::kLanes);
    if (c < a.channels) part(c, static_cast<int>(a.channels - c));
  }
}

template <class V>
void normalize(const MapArgs& a) {
  for (std::int64_t p = 0; p < a.pixels; ++p) {
    float* to = a.output + p * a.output_stride;
    const float scale = centre<V>(a.input + p * a.input_stride, a.channels, a.activation.alpha, to);
    for (std::int64_t c = 0; c < a.channels; c += V::kLanes) {
      const int count = a.channels - c < V::kLanes ? static_cast<int>(a.channels - c) : V::kLanes;
      const auto v = V::load(to + c, count) * scale;
      V::store(to + c, V::fma(v, V::load(a.operand + c, count), V::load(a.offset + c, count)), count);
    }
  }
}

template <class V>
void softmax(const MapArgs& a) {
  for (std::int64_t p = 0; p < a.pixels; ++p) {
    const float* from = a.input + p * a.input_stride;
    float* to = a.output + p * a.output_stride;
    float largest = from[0];
    for (std::int64_t c = 1; c < a.channels; ++c) largest = V::max(from[c], largest);
    LaneSums<V> sum;
    sum.add(a.channels, [&](std::int64_t c, int count) {
      V::store(to + c, exponential<V>(V::load(from + c, count) - largest), count);
      return V::load(to + c, count);
    });
    const float total = sum.total();
    for (std::int64_t c = 0; c < a.channels; c += V::kLanes) {
      const int count = a.channels - c < V::kLanes ? static_cast<int>(a.channels - c) : V::kLanes;
      V::store(to + c, V::load(to + c, count) / total, count);
    }
  }
}

template <class V>
void map(const MapArgs& a) {
  using Float = typename V::Float;
  const auto each = [&](auto function) { a.one_operand ? map_values<V, true>(a, function) : map_values<V, false>(a, function); };
  switch (a.operation) {
    case Operation::activate: {
      static constexpr float kNothing = 0.0f;
      MapArgs alone = a;
      alone.operand = &kNothing, alone.operand_stride = 0;
      return with_activation(a.activation, [&]<Activation A>() {
        map_values<V, true>(alone, [&](Float v, Float, std::int64_t, int) { return activated<V, A>(v, a.activation); });
      });
    }
    case Operation::add: return each([](Float v, Float b, std::int64_t, int) { return v + b; });
    case Operation::subtract: return each([](Float v, Float b, std::int64_t, int) { return v - b; });
    case Operation::subtract_from: return each([](Float v, Float b, std::int64_t, int) { return b - v; });
    case Operation::multiply: return each([](Float v, Float b, std::int64_t, int) { return v * b; });
    case Operation::divide: return each([](Float v, Float b, std::int64_t, int) { return v / b; });
    case Operation::divide_by: return each([](Float v, Float b, std::int64_t, int) { return b / v; });
    case Operation::scale:
      return each([&](Float v, Float b, std::int64_t c, int count) { return V::fma(v, b, V::load(a.offset + c, count)); });
    case Operation::slope: return each([](Float v, Float b, std::int64_t, int) { return v > Float{} ? v : v * b; });
    case Operation::normalize: return normalize<V>(a);
    case Operation::softmax: return softmax<V>(a);
  }
}

}  // namespace dsconv
