// Activations of vectors. They use only operations that round identically everywhere, so that every instruction set gives
// the same bits. Comparisons propagate NaN.
#pragma once

#include "kernels.h"

namespace dsconv {

// The exponential of v as (1 + p * r) * 2^n, with v clamped to `least` .. 89.
template <class V>
struct Exponential {
  typename V::Float r, p;
  typename V::Int n;

  explicit Exponential(typename V::Float v, float least = -105.0f) {
    constexpr auto all = [](float v) { return V::broadcast(v); };
    constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the lowest bits
    v = v > all(89.0f) ? all(89.0f) : v;   // infinity
    v = v < all(least) ? all(least) : v;   // 0
    const auto shifted = V::fma(v, all(1.44269504f), all(kMagic)), whole = shifted - kMagic;
    // v - n ln 2. The first part of ln 2 has few enough bits that its product with n is exact.
    r = V::fma(whole, all(-1.42860677e-6f), V::fma(whole, all(-0.693145752f), v));
    // The minimax polynomial for |r| <= ln 2 / 2: 1 + p * r is within 2^-28 of the exponential of r.
    constexpr float kFactors[] = {0.008368686f, 0.041668274f, 0.16666521f, 0.49999994f, 1.0f};
    p = all(0.0013820138f);
    for (const float factor : kFactors) p = V::fma(p, r, all(factor));
    n = V::as_int(shifted) - 0x4b400000;
  }

  typename V::Float value() const {
    // Multiplies by 2^n in two factors, both of which are normal numbers.
    const typename V::Int half = n >> 1;
    return V::fma(p, r, V::broadcast(1.0f)) * V::as_float((half + 127) << 23) * V::as_float((n - half + 127) << 23);
  }
};

template <class V>
inline typename V::Float exponential(typename V::Float v) {
  return Exponential<V>(v).value();
}

// e^v - 1 for v <= 0, without cancellation near 0.
template <class V>
inline typename V::Float exponential_minus_one(typename V::Float v) {
  v = v < V::broadcast(-30.0f) ? V::broadcast(-30.0f) : v;  // -1
  const Exponential<V> e(v);
  const auto power = V::as_float((e.n + 127) << 23);
  return V::fma(e.p * e.r, power, power - 1.0f);
}

// v / (1 + e^-u). The power of two is a normal number or infinite.
template <class V>
inline typename V::Float gated(typename V::Float v, typename V::Float u) {
  const auto one = V::broadcast(1.0f);
  const Exponential<V> e(-u, -87.0f);
  return v / V::fma(V::fma(e.p, e.r, one), V::as_float((e.n + 127) << 23), one);
}

template <class V>
inline typename V::Float magnitude(typename V::Float v) {
  return V::as_float(V::as_int(v) & 0x7fffffff);
}

template <class V>
inline typename V::Float hyperbolic_tangent(typename V::Float v) {
  const auto less = exponential_minus_one<V>(magnitude<V>(v) * -2.0f);
  return V::as_float(V::as_int(magnitude<V>(less / (2.0f + less))) | (V::as_int(v) & INT32_MIN));
}

// v times the cumulative normal distribution at v. The logit of the latter is v times an even function, which this
// polynomial approximates with the least error of the product.
template <class V>
inline typename V::Float gelu(typename V::Float v) {
  constexpr float kFactors[] = {-2.674956e-7f, 7.94975e-6f, -1.1058257e-4f, -6.582739e-5f, 0.07266777f, 1.5957689f};
  auto square = v * v;
  square = square > V::broadcast(30.25f) ? V::broadcast(30.25f) : square;
  auto p = V::broadcast(3.622851e-9f);
  for (const float factor : kFactors) p = V::fma(p, square, V::broadcast(factor));
  return gated<V>(v, v * p);
}

// ln(1 + e^v), by the series of the area tangent, with minimax factors.
template <class V>
inline typename V::Float softplus(typename V::Float v) {
  constexpr float kFactors[] = {0.27998665f, 0.40021735f, 0.6666641f, 2.0f};
  const typename V::Float zero{};
  const auto t = exponential<V>(-magnitude<V>(v)), s = t / (2.0f + t), square = s * s;
  auto p = V::broadcast(0.28026363f);
  for (const float factor : kFactors) p = V::fma(p, square, V::broadcast(factor));
  return V::fma(s, p, v < zero ? zero : v);
}

// Rare activations: one function for all epilogues.
template <class V>
[[gnu::noinline]] typename V::Float rarely_activated(typename V::Float v, const ActivationSettings& settings) {
  const typename V::Float zero{};
  switch (settings.kind) {
    case Activation::hardsigmoid: {
      auto gate = v + 3.0f;
      gate = gate < zero ? zero : gate;
      return (gate > zero + 6.0f ? zero + 6.0f : gate) / 6.0f;
    }
    case Activation::sigmoid: return gated<V>(zero + 1.0f, v);
    case Activation::elu: return v < zero ? exponential_minus_one<V>(v) * settings.alpha : v;
    case Activation::exp: return exponential<V>(v);
    case Activation::gelu: return gelu<V>(v);
    // 2 sqrt(2 / pi) (v + 0.044715 v^3)
    case Activation::gelu_tanh: return gated<V>(v, v * V::fma(v * v, zero + 0.07135481f, zero + 1.5957691f));
    case Activation::mish: {  // v tanh(ln(1 + e^v))
      const auto e = exponential<V>(v > zero + 20.0f ? zero + 20.0f : v), n = e * (e + 2.0f);
      return v * (n / (n + 2.0f));
    }
    case Activation::softplus: return softplus<V>(v);
    case Activation::tanh: return hyperbolic_tangent<V>(v);
    default: return v;
  }
}

template <class V, Activation A>
inline typename V::Float activated(typename V::Float v, const ActivationSettings& settings) {
  const typename V::Float zero{};
  if constexpr (A == Activation::relu) v = v < zero ? zero : v;
  if constexpr (A == Activation::clamp) {
    const auto low = V::broadcast(settings.alpha), high = V::broadcast(settings.beta);
    v = v < low ? low : v;
    v = v > high ? high : v;
  }
  if constexpr (A == Activation::leaky_relu) v = v > zero ? v : v * settings.alpha;  // also for zeros: their sign follows the slope
  if constexpr (A == Activation::hardswish) {
    auto gate = v + 3.0f;
    gate = gate < zero ? zero : gate;
    v = v * (gate > zero + 6.0f ? zero + 6.0f : gate) / 6.0f;
  }
  if constexpr (A == Activation::silu) v = gated<V>(v, v);
  if constexpr (A == kRareActivation) v = rarely_activated<V>(v, settings);
  return v;
}

// Calls function with the activation as a template argument; kRareActivation stands for all rare ones.
template <class Function>
inline void with_activation(const ActivationSettings& settings, Function function) {
  switch (settings.kind) {
    case Activation::none: return function.template operator()<Activation::none>();
    case Activation::relu: return function.template operator()<Activation::relu>();
    case Activation::clamp: return function.template operator()<Activation::clamp>();
    case Activation::leaky_relu: return function.template operator()<Activation::leaky_relu>();
    case Activation::hardswish: return function.template operator()<Activation::hardswish>();
    case Activation::silu: return function.template operator()<Activation::silu>();
    default: return function.template operator()<kRareActivation>();
  }
}

}  // namespace dsconv
