// The transforms of Winograd's F(2x2, 3x3): of input tiles, which are quantized at each of 16 positions, and of the sums
// at these positions. dsconv/numerics/winograd.py has the formulas.
#pragma once

#include "quantize.h"

namespace dsconv {

// Transforms the rows of a tile, then its columns: each of four values becomes a sum or a difference of two.
template <class V>
[[gnu::always_inline]] inline void winograd_input_side(typename V::Float& a, typename V::Float& b, typename V::Float& c,
                                                       typename V::Float& d) {
  const auto first = a - c, second = b + c, third = c - b, fourth = b - d;
  a = first, b = second, c = third, d = fourth;
}

// Transforms a vector of channels of a block, from channel c on.
template <class V>
[[gnu::always_inline]] inline void winograd_transform_input(const float* const* pixel, int c, auto load, auto take) {
  typename V::Float d[4][4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) d[i][j] = load(pixel[4 * i + j] + c);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) winograd_input_side<V>(d[0][j], d[1][j], d[2][j], d[3][j]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    winograd_input_side<V>(d[i][0], d[i][1], d[i][2], d[i][3]);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) take(4 * i + j, d[i][j]);
  }
}

// Quantization of the values of each position. Lanes are positions from `first` on.
template <class V>
struct WinogradQuantizer {
  typename V::Float factor, scale;  // 2^(1 - e) and 2^e
  typename V::Int zero;             // the word of mantissa 0 before narrowing to a byte
  typename V::Int nonzero;          // mask of lanes with mantissas other than 0
  bool shifted;                     // whether mantissas of the centre are stored minus kWinogradShift

  WinogradQuantizer(typename V::Int magnitude, int first, bool negative_centre) {
    using Int = typename V::Int;
    const Int finite = magnitude < 0x7f800000;  // true is -1
    nonzero = finite & (magnitude >= (127 - 100) << 23);
    Int shift{};
    const int centre = kWinogradCentre - first;
    const bool here = centre >= 0 && centre < V::kLanes;
    shifted = here && !negative_centre && nonzero[here ? centre : 0];
    if (shifted) shift[centre] = -1;
    const Int e = nonzero & ((magnitude >> 23) - 127 - 6 + shift);
    factor = V::as_float((128 - e) << 23);
    scale = V::as_float(finite ? (e + 127) << 23 : V::broadcast(static_cast<std::int32_t>(kNanBits)));
    zero = BlockQuantizer<V>::kMagicWord + (shift & kWinogradShift);
  }
};

struct WinogradByteMask {
  std::int8_t bytes[8 * kMaxLanes] = {};  // ones, then the same number of zeros

  constexpr WinogradByteMask() {
    for (int i = 0; i < 4 * kMaxLanes; ++i) bytes[i] = -1;
  }
};

// Returns a vector with ones in the bytes that are left.
template <class V>
inline typename V::Int winograd_bytes_left(int left) {
  static constexpr WinogradByteMask kMask;
  typename V::Int ones;
  __builtin_memcpy(&ones, kMask.bytes + 4 * kMaxLanes - left, sizeof ones);
  return ones;
}

// Quantizes blocks of `Vectors` whole vectors, or of any size if that is 0.
template <class V, int Vectors>
void winograd_input_block(const WinogradInputArgs& args) {
  using Int = typename V::Int;
  using Float = typename V::Float;
  constexpr int kLanes = V::kLanes, kBytes = 4 * kLanes;
  const WinogradInputArgs a = args;  // a local copy, which no store of mantissas can alias
  const QuantizedRows& rows = a.rows;
  const int channels = Vectors ? Vectors * kLanes : a.channels;
  const auto some = [&](int c, auto load, auto store) __attribute__((always_inline)) {
    winograd_transform_input<V>(a.pixel, c, load,
                                [&](int p, Float v) __attribute__((always_inline)) { store(a.values + p * channels + c, v); });
  };
  int whole = 0;
  for (; whole + kLanes <= channels; whole += kLanes)
    some(whole, [](const float* from) { return V::load(from); }, [](float* to, Float v) { V::store(to, v); });
  if (const int left = channels - whole; !Vectors && left)
    some(
        whole, [=](const float* from) { return V::load_some(from, left); },
        [=](float* to, Float v) { V::store_some(to, v, left); });
  const auto vector = [&](int p, int c) __attribute__((always_inline)) {
    const float* const from = a.values + p * channels + c;
    return Vectors || c + kLanes <= channels ? V::load(from) : c < channels ? V::load_some(from, channels - c) : Float{};
  };
  typename V::Word centre{};
  for (int c = 0; c < channels; c += kLanes) centre = V::max(centre, V::as_word(vector(kWinogradCentre, c)));
  const bool negative_centre = V::any(V::as_word(centre > 0x80000000u));  // -0 is not
  for (int first = 0; first < kWinogradPositions; first += kLanes) {
    const auto largest = [&](int i) __attribute__((always_inline)) {
      Int most{};
#pragma GCC unroll 8
      for (int c = 0; c < channels; c += kLanes) most = V::max(most, V::as_int(vector(first + i, c)) & 0x7fffffff);
      return most;
    };
    const WinogradQuantizer<V> quantizer(V::reduce(largest, V::max), first, negative_centre);
#pragma GCC unroll 4
    for (int i = 0; i < kLanes; ++i) {
      std::int8_t* const row = rows.mantissa + (a.row + (first + i) * a.apart) * rows.row_bytes + a.first_byte;
      const auto factor = V::broadcast(quantizer.factor[i]);
      const auto zero = V::as_word(V::broadcast(quantizer.zero[i]));
      const Int nonzero = V::broadcast(quantizer.nonzero[i]);
#pragma GCC unroll 2
      for (int c = 0; c < channels; c += kBytes) {
        const auto integer = [&](int k) __attribute__((always_inline)) {
          if (c + k * kLanes >= channels) return Int{};
          const auto v = vector(first + i, c + k * kLanes);
          return V::as_int(V::as_word(V::fma(v, factor, Float{} + BlockQuantizer<V>::kMagic)) - zero);
        };
        Int four = V::saturate_to_bytes(integer(0), integer(1), integer(2), integer(3)) & nonzero;
        if (!Vectors && c + kBytes > channels) four &= winograd_bytes_left<V>(channels - c);
        if (rows.flipped) four ^= static_cast<std::int32_t>(0x80808080);
        if constexpr (Vectors > 0) __builtin_memcpy(row + c, &four, V::min(kBytes, Vectors * kLanes));
        else store_octets<V>(row + c, four, V::min((channels - c + 7) / 8, kLanes / 2));
      }
    }
    const PairedScales<V> paired(rows, a.block, quantizer.scale, Int{});
    const auto at = [&](int p) { return (a.row + p * a.apart) * rows.blocks + a.block; };
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) paired.store(i, rows.scale + at(first + i));
    if (const int i = kWinogradCentre - first; i >= 0 && i < kLanes)
      rows.shift_term[at(kWinogradCentre)] = quantizer.shifted ? static_cast<float>(quantizer.scale[i]) : 0.0f;
  }
}

template <class V>
void winograd_input(const WinogradInputArgs& a) {
  a.channels == 64   ? winograd_input_block<V, 64 / V::kLanes>(a)
  : a.channels == 32 ? winograd_input_block<V, 32 / V::kLanes>(a)
                     : winograd_input_block<V, 0>(a);
}

template <class V>
void winograd_output(const WinogradOutputArgs& args) {
  const WinogradOutputArgs a = args;  // a local copy, which no store of outputs can alias
  const std::int64_t apart = std::int64_t{a.tiles} * kNR;
  for (int t = 0; t < a.tiles; ++t) {
    const int* const pixel = a.pixel + 4 * t;
    for (int n = 0; n < kNR; n += V::kLanes) {
      const float* const from = a.sums + t * kNR + n;
      typename V::Float upper[4], lower[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const auto at = [&](int i) {
          const auto v = V::load(from + (4 * i + j) * apart);
          return 4 * i + j == kWinogradCentre ? v + V::load(from + kWinogradPositions * apart) : v;
        };
        upper[j] = at(0) + (at(1) + at(2));
        lower[j] = (at(1) - at(2)) - at(3);
      }
      const auto put = [&](int i, typename V::Float v) {
        if (pixel[i] >= 0) V::store(a.outputs + std::int64_t{pixel[i]} * kNR + n, v);
      };
      put(0, upper[0] + (upper[1] + upper[2]));
      put(1, (upper[1] - upper[2]) - upper[3]);
      put(2, lower[0] + (lower[1] + lower[2]));
      put(3, (lower[1] - lower[2]) - lower[3]);
    }
  }
}

}  // namespace dsconv
