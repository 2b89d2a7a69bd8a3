// Depthwise convolutions. Filters share nothing: activations stay float, or windows are quantized where they are used.
#pragma once

#include "epilogue.h"

namespace dsconv {

// Unless Taps is 0, a filter is one block of so many, and its inputs stay in registers.
template <class V, int Taps, bool ByChannel, bool Shift>
void depthwise_taps(const DepthwiseArgs& args) {
  using Float = typename V::Float;
  using Int = typename V::Int;
  const DepthwiseArgs a = args;  // a local copy, which no store of outputs can alias
  const int taps = Taps ? Taps : a.taps, size = Taps ? Taps : a.block_size;
  for (int lane = 0; lane < a.lanes; lane += V::kLanes) {
    const auto each = [&](const auto* from) { return ByChannel ? V::load(from + lane) : V::broadcast(*from); };
    const auto input = [&](int k) { return V::load(a.tap[k] + a.first + lane); };
    Float y{};
    for (int first = 0, block = 0; first < taps; first += size, ++block) {
      const int end = taps - first < size ? taps : first + size;
      Float kept[Taps ? Taps : 1];
      const auto value = [&](int k) { return Taps ? kept[k] : input(k); };
#pragma GCC unroll 32
      for (int k = 0; k < Taps; ++k) kept[k] = input(k);
      BlockRange<V> range;
#pragma GCC unroll 32
      for (int k = first; k < end; ++k) range.add(value(k));
      const BlockQuantizer<V> quantizer(range, a.bits, a.sign);
      Int s{}, total{};
#pragma GCC unroll 32
      for (int k = first; k < end; ++k) {
        const Int n = quantizer.template quantize<true>(value(k)) - quantizer.kMagicWord;
        s += n * each(a.weight + k * a.filters);
        if constexpr (Shift) total += n;
      }
      y = V::fma(each(a.kds + block * a.filters), V::to_float(s & quantizer.nonzero) * quantizer.scale, y);
      if constexpr (Shift)
        y = V::fma(each(a.kds_shift + block * a.filters), V::to_float(total & quantizer.nonzero) * quantizer.scale, y);
    }
    const PostOpVectors<V> post(a.post, each);
    with_activation(a.post.activation, [&]<Activation A>() {
      finish<V, A>(y, post, a.output + lane, a.residual ? a.residual + lane : nullptr,
                   a.lanes - lane < V::kLanes ? a.lanes - lane : V::kLanes, a.post.slope);
    });
  }
}

// Of one filter and float activations: products are added tap by tap, from 0 on, each rounded once.
template <class V>
void depthwise_floats(const DepthwiseArgs& args) {
  const DepthwiseArgs a = args;  // a local copy, which no store of outputs can alias
  const PostOpVectors<V> post(a.post, [](const float* from) { return V::broadcast(*from); });
  for (int lane = 0; lane < a.lanes; lane += V::kLanes) {
    typename V::Float sum{};
    for (int k = 0; k < a.taps; ++k)
      sum = V::fma(V::load(a.tap[k] + a.first + lane), V::broadcast(static_cast<float>(a.weight[k * a.filters])), sum);
    with_activation(a.post.activation, [&]<Activation A>() {
      finish<V, A>(sum * V::broadcast(*a.kds), post, a.output + lane, a.residual ? a.residual + lane : nullptr,
                   a.lanes - lane < V::kLanes ? a.lanes - lane : V::kLanes, a.post.slope);
    });
  }
}

template <class V>
void depthwise(const DepthwiseArgs& a) {
  if (a.bits == kFloatBits) return depthwise_floats<V>(a);
  const auto with_settings = [&]<bool ByChannel, bool Shift>() {
    const int taps = a.taps <= a.block_size ? a.taps : 0;
    taps == 9    ? depthwise_taps<V, 9, ByChannel, Shift>(a)
    : taps == 25 ? depthwise_taps<V, 25, ByChannel, Shift>(a)
                 : depthwise_taps<V, 0, ByChannel, Shift>(a);
  };
  const auto with_shift = [&]<bool ByChannel>() {
    a.kds_shift ? with_settings.template operator()<ByChannel, true>() : with_settings.template operator()<ByChannel, false>();
  };
  a.by_channel ? with_shift.template operator()<true>() : with_shift.template operator()<false>();
}

// What some neighbouring outputs read of a vector of channels: pixels `step` apart, from line[ky] on.
struct DepthwiseWindow {
  const float* const* line;  // null in the padding
  std::int64_t first, step;
};

// Copies a window that leaves the image, or whose channels do not fill a vector.
template <class V>
inline void copy_window(const DepthwiseLineArgs& a, std::int64_t left, std::int64_t channel, int lanes, const float** line) {
  const std::int64_t columns = a.columns();
  for (std::int64_t ky = 0; ky < a.kernel_h; ++ky) {
    float* const to = a.window + ky * columns * V::kLanes;
    line[ky] = a.line[ky] ? to : nullptr;
    if (!a.line[ky]) continue;
    for (std::int64_t i = 0; i < columns; ++i) {
      const std::int64_t x = left + i;
      const bool inside = x >= 0 && x < a.width;
      V::store(to + i * V::kLanes, inside ? V::load(a.line[ky] + x * a.pixel_stride + channel, lanes) : typename V::Float{});
    }
  }
}

// Taps in the padding are left out, which changes nothing: a sum that starts with 0 is never -0.
template <class V>
inline void depthwise_sums(const DepthwiseLineArgs& a, const DepthwiseWindow& w, const float* weight, int lanes,
                           typename V::Float (&sums)[DepthwiseLineArgs::kOutputs]) {
  constexpr int kOutputs = DepthwiseLineArgs::kOutputs;
  const std::int64_t step = w.step * a.stride;
  typename V::Float sum[kOutputs]{};
  for (std::int64_t ky = 0; ky < a.kernel_h; ++ky) {
    if (!w.line[ky]) continue;
    const float* from = w.line[ky] + w.first;
    const float* factor = weight + ky * a.kernel_w * a.channels;
    for (std::int64_t kx = 0; kx < a.kernel_w; ++kx, from += a.dilation * w.step, factor += a.channels) {
      const auto q = V::load(factor, lanes);
#pragma GCC unroll 8
      for (int i = 0; i < kOutputs; ++i) sum[i] = V::fma(V::load(from + i * step), q, sum[i]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kOutputs; ++i) sums[i] = sum[i];
}

template <class V, Activation A>
void depthwise_line_activated(const DepthwiseLineArgs& args) {
  constexpr int kOutputs = DepthwiseLineArgs::kOutputs, kMaxLines = kMaxBlockSize;
  const DepthwiseLineArgs a = args;  // a local copy, which no store of outputs can alias
  const float* copied[kMaxLines];
  for (std::int64_t x = 0; x < a.outputs; x += kOutputs) {
    const std::int64_t left = a.first + x * a.stride;
    const int count = a.outputs - x < kOutputs ? static_cast<int>(a.outputs - x) : kOutputs;
    const bool inside = left >= 0 && left + a.columns() <= a.width;
    for (std::int64_t c = 0; c < a.channels; c += V::kLanes) {
      const int lanes = a.channels - c < V::kLanes ? static_cast<int>(a.channels - c) : V::kLanes;
      DepthwiseWindow window{a.line, left * a.pixel_stride + c, a.pixel_stride};
      if (!inside || lanes < V::kLanes) copy_window<V>(a, left, c, lanes, copied), window = {copied, 0, V::kLanes};
      typename V::Float sums[kOutputs];
      depthwise_sums<V>(a, window, a.weight + c, lanes, sums);
      const auto each = [&](const float* from) { return V::load(from + c, lanes); };
      const PostOpVectors<V> post(a.post, each);
      const auto kds = each(a.kds);
      float* const to = a.output + x * a.output_stride + c;
      const float* const residual = a.residual ? a.residual + x * a.residual_stride + c : nullptr;
#pragma GCC unroll 8
      for (int i = 0; i < kOutputs; ++i)
        if (i < count)
          finish<V, A>(sums[i] * kds, post, to + i * a.output_stride, residual ? residual + i * a.residual_stride : nullptr, lanes,
                       a.post.slope);
    }
  }
}

template <class V>
void depthwise_line(const DepthwiseLineArgs& a) {
  with_activation(a.post.activation, [&]<Activation A>() { depthwise_line_activated<V, A>(a); });
}

}  // namespace dsconv
