// Depthwise convolutions. Filters share no inputs: activations stay float, or windows are quantized when they are used.
#pragma once

#include "epilogue.h"

namespace dsconv {

// Unless Taps is 0, a filter is one block of that many taps, and its inputs stay in registers.
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
                   a.lanes - lane < V::kLanes ? a.lanes - lane : V::kLanes, a.post.activation);
    });
  }
}

// One filter and float activations: products are added tap by tap, starting from 0, with one rounding each.
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
                   a.lanes - lane < V::kLanes ? a.lanes - lane : V::kLanes, a.post.activation);
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

// The sums of some neighbouring outputs of a vector of channels. Outside the image all read zeros, which changes nothing: a
// sum that starts with 0 is never -0. If Width, the kernel's, and the stride are known, an input is loaded once for all taps.
template <class V, int Width, int Stride, bool Whole>
inline void depthwise_sums(const DepthwiseLineArgs& a, const float* const* pixel, std::int64_t c, typename V::Float* sums) {
  constexpr int kOutputs = DepthwiseLineArgs::kOutputs;
  const std::int64_t columns = a.columns(), channels = a.channels;
  const auto load = [&](const float* from) {
    return Whole ? V::load(from + c) : V::load_some(from + c, static_cast<int>(channels - c));
  };
  typename V::Float sum[kOutputs]{};
  const float* factor = a.weight;
  for (std::int64_t ky = 0; ky < a.kernel_h; ++ky, pixel += columns) {
    if (!a.line[ky]) {
      factor += a.kernel_w * channels;
    } else if constexpr (Width > 0) {
      typename V::Float q[Width];
#pragma GCC unroll 8
      for (int kx = 0; kx < Width; ++kx, factor += channels) q[kx] = load(factor);
#pragma GCC unroll 32
      for (int column = 0; column < (kOutputs - 1) * Stride + Width; ++column) {
        const auto v = load(pixel[column]);
#pragma GCC unroll 8
        for (int kx = 0; kx < Width; ++kx) {
          const int i = (column - kx) / Stride;
          if (column >= kx && (column - kx) % Stride == 0 && i < kOutputs) sum[i] = V::fma(v, q[kx], sum[i]);
        }
      }
    } else {
      for (std::int64_t kx = 0; kx < a.kernel_w; ++kx, factor += channels) {
        const auto q = load(factor);
#pragma GCC unroll 8
        for (int i = 0; i < kOutputs; ++i) sum[i] = V::fma(load(pixel[i * a.stride + kx * a.dilation]), q, sum[i]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kOutputs; ++i) sums[i] = sum[i];
}

// Sums all channels of some neighbouring outputs, and applies the epilogue to the first `count` of them.
template <class V, Activation A, int Width, int Stride>
inline void depthwise_outputs(const DepthwiseLineArgs& args, std::int64_t x, int count) {
  constexpr int kOutputs = DepthwiseLineArgs::kOutputs;
  const DepthwiseLineArgs a = args;  // a local copy, which no store of outputs can alias
  // Columns `begin` to `end` are those inside the image.
  const std::int64_t columns = a.columns(), left = a.first + x * a.stride;
  const std::int64_t begin = left < 0 ? V::min(-left, columns) : 0, end = V::max(begin, V::min(a.width - left, columns));
  const float** pixel = a.pixel;
  for (std::int64_t ky = 0; ky < a.kernel_h; ++ky, pixel += columns) {
    if (!a.line[ky]) continue;
    std::int64_t i = 0;
    for (; i < begin; ++i) pixel[i] = a.zeros;
    for (const float* from = a.line[ky] + (left + i) * a.pixel_stride; i < end; ++i, from += a.pixel_stride) pixel[i] = from;
    for (; i < columns; ++i) pixel[i] = a.zeros;
  }
  const auto vector = [&]<bool Whole>(std::int64_t c, int lanes) {
    typename V::Float sums[kOutputs];
    depthwise_sums<V, Width, Stride, Whole>(a, a.pixel, c, sums);
    const auto each = [&](const float* from) { return V::load(from + c, lanes); };
    const PostOpVectors<V> post(a.post, each);
    const auto kds = each(a.kds);
    float* const to = a.output + x * a.output_stride + c;
    const float* const residual = a.residual ? a.residual + x * a.residual_stride + c : nullptr;
#pragma GCC unroll 8
    for (int i = 0; i < kOutputs; ++i)
      if (i < count)
        finish<V, A>(sums[i] * kds, post, to + i * a.output_stride, residual ? residual + i * a.residual_stride : nullptr, lanes,
                     a.post.activation);
  };
  std::int64_t c = 0;
  for (; c + V::kLanes <= a.channels; c += V::kLanes) vector.template operator()<true>(c, V::kLanes);
  if (c < a.channels) vector.template operator()<false>(c, static_cast<int>(a.channels - c));
}

template <class V>
void depthwise_line(const DepthwiseLineArgs& a) {
  constexpr int kOutputs = DepthwiseLineArgs::kOutputs;
  const auto with_size = [&]<int Width, int Stride>() {
    with_activation(a.post.activation, [&]<Activation A>() {
      for (std::int64_t x = 0; x < a.outputs; x += kOutputs)
        depthwise_outputs<V, A, Width, Stride>(a, x, a.outputs - x < kOutputs ? static_cast<int>(a.outputs - x) : kOutputs);
    });
  };
  if (a.dilation == 1 && a.kernel_w == 3 && a.stride == 1) return with_size.template operator()<3, 1>();
  if (a.dilation == 1 && a.kernel_w == 3 && a.stride == 2) return with_size.template operator()<3, 2>();
  if (a.dilation == 1 && a.kernel_w == 5 && a.stride == 1) return with_size.template operator()<5, 1>();
  if (a.dilation == 1 && a.kernel_w == 5 && a.stride == 2) return with_size.template operator()<5, 2>();
  with_size.template operator()<0, 0>();
}

}  // namespace dsconv
