// Depthwise convolutions. Filters share nothing, so windows are quantized where they are used.
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
                   a.lanes - lane < V::kLanes ? a.lanes - lane : V::kLanes, a.post.activation);
    });
  }
}

template <class V>
void depthwise(const DepthwiseArgs& a) {
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

// Goes along the line for a vector of channels. Outputs share the ranges of the columns of taps that both read.
template <class V, int Size, int Stride, bool Shift>
inline void depthwise_line_vector(const DepthwiseLineArgs& args, std::int64_t lane) {
  using Float = typename V::Float;
  using Int = typename V::Int;
  const DepthwiseLineArgs a = args;  // a local copy, which no store of outputs can alias
  Int weight[Size][Size];
  for (int k = 0; k < Size * Size; ++k) weight[k / Size][k % Size] = V::load(a.weight + k * a.channels + lane) & 0xffff;
  const Float kds = V::load(a.kds + lane), kds_shift = Shift ? V::load(a.kds_shift + lane) : Float{};
  const PostOpVectors<V> post(a.post, [&](const float* from) { return V::load(from + lane); });
  const float* line[Size];  // at the first tap
  std::int64_t step[Size];
  for (int ky = 0; ky < Size; ++ky) step[ky] = a.pixel_stride[ky], line[ky] = a.line[ky] + a.first * step[ky] + lane;
  const auto value = [&](int ky, int kx) { return V::load(line[ky] + kx * step[ky]); };
  std::int64_t x = a.first;
  const auto inside = [&](int kx) { return x + kx >= 0 && x + kx < a.width; };
  const auto range_of = [&](int kx) {
    BlockRange<V> range;
    if (inside(kx))
#pragma GCC unroll 8
      for (int ky = 0; ky < Size; ++ky) range.add(value(ky, kx));
    return range;
  };
  BlockRange<V> column[Size];
  for (int kx = 0; kx < Size - Stride; ++kx) column[kx + Stride] = range_of(kx);
  for (std::int64_t i = 0; i < a.outputs; ++i) {
#pragma GCC unroll 8
    for (int kx = 0; kx < Size - Stride; ++kx) column[kx] = column[kx + Stride];
#pragma GCC unroll 8
    for (int kx = Size - Stride; kx < Size; ++kx) column[kx] = range_of(kx);
    BlockRange<V> range = column[0];
#pragma GCC unroll 8
    for (int kx = 1; kx < Size; ++kx) range.add(column[kx]);
    const BlockQuantizer<V> quantizer(range, a.bits, a.sign);
    Int sums[Size]{}, totals[Size]{};  // of each line, so that one does not wait for the other
    const auto add = [&](int kx) {
#pragma GCC unroll 8
      for (int ky = 0; ky < Size; ++ky) {
        const Int n = quantizer.template quantize<true>(value(ky, kx));  // its low 16 bits are the mantissa
        sums[ky] = V::add_product(sums[ky], n, weight[ky][kx]);
        if constexpr (Shift) totals[ky] = V::add_product(totals[ky], n, Int{} + 1);
      }
    };
    if (inside(0) && inside(Size - 1)) {
#pragma GCC unroll 8
      for (int kx = 0; kx < Size; ++kx) add(kx);
    } else {
      for (int kx = 0; kx < Size; ++kx)
        if (inside(kx)) add(kx);
    }
    const auto scaled = [&](Int(&parts)[Size]) {
#pragma GCC unroll 8
      for (int ky = 1; ky < Size; ++ky) parts[0] += parts[ky];
      return V::to_float(parts[0] & quantizer.nonzero) * quantizer.scale;
    };
    Float y = V::fma(kds, scaled(sums), Float{});
    if constexpr (Shift) y = V::fma(kds_shift, scaled(totals), y);
    with_activation(a.post.activation, [&]<Activation A>() {
      finish<V, A>(y, post, a.output + i * a.output_stride + lane, a.residual ? a.residual + i * a.residual_stride + lane : nullptr,
                   V::kLanes, a.post.activation);
    });
    x += Stride;
    for (int ky = 0; ky < Size; ++ky) line[ky] += Stride * step[ky];
  }
}

template <class V, int Size, int Stride, bool Shift>
void depthwise_line_vectors(const DepthwiseLineArgs& a) {
  // The last vector overlaps the one before.
  for (std::int64_t c = 0; c < a.channels; c += V::kLanes)
    depthwise_line_vector<V, Size, Stride, Shift>(a, c + V::kLanes <= a.channels ? c : a.channels - V::kLanes);
}

template <class V>
void depthwise_line(const DepthwiseLineArgs& a) {
  const auto with_size = [&]<int Size, bool Shift>() {
    a.stride == 1 ? depthwise_line_vectors<V, Size, 1, Shift>(a) : depthwise_line_vectors<V, Size, 2, Shift>(a);
  };
  const auto with_shift = [&]<bool Shift>() {
    a.size == 3 ? with_size.template operator()<3, Shift>() : with_size.template operator()<5, Shift>();
  };
  a.kds_shift ? with_shift.template operator()<true>() : with_shift.template operator()<false>();
}

}  // namespace dsconv
