// The epilogue: turns sums into outputs, and quantizes these if the next layer reads them quantized.
#pragma once

#include "activation.h"
#include "quantize.h"

namespace dsconv {

// The post-ops of a vector of outputs. Absent ones are replaced by neutral values: adding -0 keeps every value.
template <class V>
struct PostOpVectors {
  typename V::Float bias, gain, offset;

  PostOpVectors() = default;
  template <class Load>
  PostOpVectors(const PostOps& p, Load load)
      : bias(p.bias ? load(p.bias) : V::broadcast(-0.0f)), gain(p.gain ? load(p.gain) : V::broadcast(1.0f)),
        offset(p.offset ? load(p.offset) : V::broadcast(-0.0f)) {}
};

// Applies the epilogue to the first `count` of a vector of contiguous outputs, stores and returns them.
template <class V, Activation A>
inline typename V::Float finish(typename V::Float v, const PostOpVectors<V>& post, float* output, const float* residual, int count,
                                const ActivationSettings& activation) {
  const bool whole = count == V::kLanes;
  v = V::fma(v + post.bias, post.gain, post.offset);
  if (residual) v += whole ? V::load(residual) : V::load_some(residual, count);
  v = activated<V, A>(v, activation);
  whole ? V::store(output, v) : V::store_some(output, v, count);
  return v;
}

// Whole vectors of contiguous outputs of each pixel.
template <class V, Activation A, int Vectors, bool Residual>
inline void epilogue_nhwc_vectors(const EpilogueArgs& args, int first) {
  const EpilogueArgs a = args;  // a local copy, which no store of outputs can alias
  PostOpVectors<V> post[Vectors];
  for (int i = 0; i < Vectors; ++i)
    post[i] = PostOpVectors<V>(a.post, [&](const float* from) { return V::load(from + first + i * V::kLanes); });
  for (int p = 0; p < a.pixels; ++p)
#pragma GCC unroll 8
    for (int i = 0; i < Vectors; ++i) {
      const int n = first + i * V::kLanes;
      finish<V, A>(V::load(a.sums + p * kNR + n), post[i], a.output + a.place[p] + n,
                   Residual ? a.residual + a.residual_place[p] + n : nullptr, V::kLanes, a.post.activation);
    }
}

template <class V, Activation A>
void epilogue_nhwc(const EpilogueArgs& a) {
  const auto whole = [&]<int Vectors>(int first) {
    a.residual ? epilogue_nhwc_vectors<V, A, Vectors, true>(a, first) : epilogue_nhwc_vectors<V, A, Vectors, false>(a, first);
  };
  if (a.outputs == kNR) return whole.template operator()<kNR / V::kLanes>(0);
  int n = 0;
  for (; n + V::kLanes <= a.outputs; n += V::kLanes) whole.template operator()<1>(n);
  const int left = a.outputs - n;
  if (!left) return;
  const PostOpVectors<V> post(a.post, [&](const float* from) { return V::load_some(from + n, left); });
  for (int p = 0; p < a.pixels; ++p)
    finish<V, A>(V::load(a.sums + p * kNR + n), post, a.output + a.place[p] + n,
                 a.residual ? a.residual + a.residual_place[p] + n : nullptr, left, a.post.activation);
}

// Outputs in NCHW: neighbouring pixels of a channel are contiguous.
template <class V, Activation A>
void epilogue_nchw(const EpilogueArgs& args) {
  constexpr int kLanes = V::kLanes;
  const EpilogueArgs a = args;  // a local copy, which no store of outputs can alias
  for (int p = 0; p < a.pixels;) {
    int run = 1;
    while (run < kLanes && p + run < a.pixels && a.place[p + run] == a.place[p] + run) ++run;
    for (int n = 0; n < a.outputs; n += kLanes) {
      typename V::Float v[kLanes];
      for (int i = 0; i < kLanes; ++i) v[i] = V::load(a.sums + (p + (i < run ? i : 0)) * kNR + n);
      V::transpose(v);
      const int count = a.outputs - n < kLanes ? a.outputs - n : kLanes;
      const auto each = [&](int pixels) {
        for (int i = 0; i < count; ++i) {
          const PostOpVectors<V> post(a.post, [&](const float* from) { return V::broadcast(from[n + i]); });
          const std::int64_t channel = (n + i) * a.channel_stride;
          finish<V, A>(v[i], post, a.output + a.place[p] + channel,
                       a.residual ? a.residual + a.residual_place[p] + channel : nullptr, pixels, a.post.activation);
        }
      };
      run == kLanes ? each(kLanes) : each(run);
    }
    p += run;
  }
}

template <class V>
void epilogue(const EpilogueArgs& a) {
  with_activation(a.post.activation,
                  [&]<Activation A>() { a.channel_stride == 1 ? epilogue_nhwc<V, A>(a) : epilogue_nchw<V, A>(a); });
}

// Applies the epilogue to blocks of whole vectors while it determines their ranges.
template <class V, Activation A, bool Residual, int Vectors>
void epilogue_quantize_block(const EpilogueArgs& args, std::int64_t sums_stride, const QuantizeArgs& block, std::int64_t stride) {
  const EpilogueArgs a = args;  // a local copy, which no store of outputs can alias
  PostOpVectors<V> post[Vectors];
  for (int i = 0; i < Vectors; ++i)
    post[i] = PostOpVectors<V>(a.post, [&](const float* from) { return V::load(from + i * V::kLanes); });
  quantize_nhwc_block<V, false, Vectors>(
      block, a.output + a.place[0], stride, [&](int p, int n, auto) __attribute__((always_inline)) {
        return finish<V, A>(V::load(a.sums + n / kNR * sums_stride + p * kNR + n % kNR), post[n / V::kLanes],
                            a.output + a.place[p] + n, Residual ? a.residual + a.residual_place[p] + n : nullptr, V::kLanes,
                            a.post.activation);
      });
}

// Covers the settings of most networks only, since each combination is a function of its own.
template <class V>
bool epilogue_quantize(const EpilogueArgs& a, std::int64_t sums_stride, const QuantizeArgs& block, std::int64_t stride) {
  const auto finish_block = [&]<Activation A, int Channels>() {
    constexpr int kVectors = Channels / V::kLanes;
    a.residual ? epilogue_quantize_block<V, A, true, kVectors>(a, sums_stride, block, stride)
               : epilogue_quantize_block<V, A, false, kVectors>(a, sums_stride, block, stride);
    return true;
  };
  const auto with_size = [&]<Activation A>() {
    return block.channels == 64    ? finish_block.template operator()<A, 64>()
           : block.channels == 128 ? finish_block.template operator()<A, 128>()
                                   : false;
  };
  if (block.sign == Sign::extra) return false;
  return a.post.activation.kind == Activation::relu   ? with_size.template operator()<Activation::relu>()
         : a.post.activation.kind == Activation::none ? with_size.template operator()<Activation::none>()
                                                      : false;
}

}  // namespace dsconv
