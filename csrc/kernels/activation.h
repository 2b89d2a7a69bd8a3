// Activations of vectors.
#pragma once

#include "kernels.h"

namespace dsconv {

// e^v to about a unit in the last place, the same bits on every instruction set. NaN stays one.
template <class V>
inline typename V::Float exponential(typename V::Float v) {
  using Int = typename V::Int;
  constexpr auto all = [](float v) { return V::broadcast(v); };
  constexpr float kMagic = 12582912.0f;     // 1.5 * 2^23: adding it rounds to an integer, in the lowest bits
  v = v > all(89.0f) ? all(89.0f) : v;      // infinity
  v = v < all(-105.0f) ? all(-105.0f) : v;  // 0
  const auto shifted = V::fma(v, all(1.44269504f), all(kMagic)), n = shifted - kMagic;
  // v - n ln 2. The first part of ln 2 has so few bits that n times it is exact.
  const auto r = V::fma(n, all(-1.42860677e-6f), V::fma(n, all(-0.693145752f), v));
  // Taylor's series, whose next term is below 2^-27 for |r| <= ln 2 / 2.
  constexpr float kFactors[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  auto p = all(1.0f / 5040);
  for (const float factor : kFactors) p = V::fma(p, r, all(factor));
  // Times 2^n in two steps, either of which is a normal number.
  const Int whole = V::as_int(shifted) - 0x4b400000, half = whole >> 1;
  return p * V::as_float((half + 127) << 23) * V::as_float((whole - half + 127) << 23);
}

// Comparisons are such that a NaN stays one.
template <class V, Activation A>
inline typename V::Float activated(typename V::Float v, float slope) {
  const typename V::Float zero{};
  if constexpr (A == Activation::relu || A == Activation::relu6) v = v < zero ? zero : v;
  if constexpr (A == Activation::relu6) v = v > zero + 6.0f ? zero + 6.0f : v;
  if constexpr (A == Activation::leaky_relu) v = v > zero ? v : v * slope;  // a zero too: its sign follows the slope
  if constexpr (A == Activation::hardswish || A == Activation::hardsigmoid) {
    auto gate = v + 3.0f;
    gate = gate < zero ? zero : gate;
    gate = gate > zero + 6.0f ? zero + 6.0f : gate;
    v = (A == Activation::hardswish ? v * gate : gate) / 6.0f;
  }
  if constexpr (A == Activation::silu) v = v / (1.0f + exponential<V>(-v));
  if constexpr (A == Activation::sigmoid) v = 1.0f / (1.0f + exponential<V>(-v));
  return v;
}

// Calls function with the activation as a template argument.
template <class Function>
inline void with_activation(Activation activation, Function function) {
  switch (activation) {
    case Activation::none: return function.template operator()<Activation::none>();
    case Activation::relu: return function.template operator()<Activation::relu>();
    case Activation::relu6: return function.template operator()<Activation::relu6>();
    case Activation::leaky_relu: return function.template operator()<Activation::leaky_relu>();
    case Activation::hardswish: return function.template operator()<Activation::hardswish>();
    case Activation::hardsigmoid: return function.template operator()<Activation::hardsigmoid>();
    case Activation::silu: return function.template operator()<Activation::silu>();
    case Activation::sigmoid: return function.template operator()<Activation::sigmoid>();
  }
}

}  // namespace dsconv
