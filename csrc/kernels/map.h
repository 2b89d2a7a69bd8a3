// Elementwise operators.
#pragma once

#include "activation.h"

namespace dsconv {

template <class V, Activation A>
void map_activated(const MapArgs& m) {
  for (std::int64_t p = 0; p < m.pixels; ++p) {
    const float* from = m.input + p * m.input_stride;
    const float* gate = m.gate ? m.gate + p * m.gate_stride : nullptr;
    const float* addend = m.addend ? m.addend + p * m.addend_stride : nullptr;
    float* to = m.output + p * m.output_stride;
    for (std::int64_t c = 0; c < m.channels; c += V::kLanes) {
      const int count = m.channels - c < V::kLanes ? static_cast<int>(m.channels - c) : V::kLanes;
      const auto part = [&](const float* values) { return V::load(values + c, count); };
      auto v = part(from);
      if (m.scale) v = m.fma ? V::fma(v, part(m.scale), part(m.shift)) : v * part(m.scale) + part(m.shift);
      if (gate) v *= part(gate);
      if (addend) v += part(addend);
      V::store(to + c, activated<V, A>(v, m.slope), count);
    }
  }
}

template <class V>
void map(const MapArgs& m) {
  with_activation(m.activation, [&]<Activation A>() { map_activated<V, A>(m); });
}

}  // namespace dsconv
