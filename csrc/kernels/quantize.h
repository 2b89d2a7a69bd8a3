// Quantization of blocks of activations: mantissas share the power of two of the largest magnitude.
#pragma once

#include "kernels.h"

namespace dsconv {

// The largest bit pattern among a block's values, per lane. Magnitudes are ordered like their bits, with infinity and
// NaN at the top. As unsigned words, negative values are above all others; as signed integers, below.
template <class V>
struct BlockRange {
  typename V::Word words{};
  typename V::Int ints{};

  void add(typename V::Float v) { add({V::as_word(v), V::as_int(v)}); }
  void add(const BlockRange& other) { words = V::max(words, other.words), ints = V::max(ints, other.ints); }
  typename V::Word magnitude() const { return V::max(words & 0x7fffffffu, V::as_word(ints)); }
  typename V::Int any_negative() const { return words > 0x80000000u; }  // -0 is not
};

template <class V>
struct BlockQuantizer {
  using Float = typename V::Float;
  using Int = typename V::Int;
  using Word = typename V::Word;
  using Bytes = typename V::Bytes;

  // 2 q + 1.5 * 2^24 has the integer nearest to q, ties to even, in the lowest bits of its word, which is kMagicWord
  // for 0.
  static constexpr float kMagic = 25165824.0f;
  static constexpr std::int32_t kMagicWord = 0x4bc00000;

  Float factor, scale;  // 2^(1 - e) and 2^e; 2^-e could be subnormal
  Int least, most;      // mantissas, plus kMagicWord
  Int limits;           // the largest mantissa in each of four bytes
  Int nonzero;          // mask of lanes with mantissas other than 0

  BlockQuantizer() = default;
  BlockQuantizer(const BlockRange<V>& range, int bits, Sign sign) {
    const Word magnitude = range.magnitude();
    const Int finite = magnitude < 0x7f800000u;  // true is -1
    nonzero = finite & (magnitude >= (127u - 100u) << 23);
    Int m = V::broadcast(bits - ((bits == 8) | (sign == Sign::included)));
    if (bits != 8 && sign == Sign::adaptive) m += range.any_negative();
    const Int e = nonzero & (V::as_int(magnitude >> 23) - 127 - m + 1);
    factor = V::as_float((128 - e) << 23);
    scale = V::as_float(finite ? (e + 127) << 23 : V::broadcast(static_cast<std::int32_t>(kNanBits)));
    const Int limit = ((Int{} + 1) << m) - 1;
    most = kMagicWord + limit;
    least = kMagicWord - limit - (sign != Sign::extra);
    limits = limit * 0x01010101;
  }

  // The quantizers of single lanes, broadcast, for pixels in NHWC. They support clamp_bytes and integer.
  struct Broadcasts {
    float factor[V::kLanes];
    std::int32_t limits[V::kLanes], nonzero[V::kLanes];

    explicit Broadcasts(const BlockQuantizer& q) {
      __builtin_memcpy(factor, &q.factor, sizeof factor);
      __builtin_memcpy(limits, &q.limits, sizeof limits);
      __builtin_memcpy(nonzero, &q.nonzero, sizeof nonzero);
    }
    BlockQuantizer of(int lane) const {
      BlockQuantizer one;
      one.factor = V::broadcast(factor[lane]);
      one.limits = V::broadcast(limits[lane]), one.nonzero = V::broadcast(nonzero[lane]);
      return one;
    }
  };

  // The nearest integer plus kMagicWord. It may exceed the mantissas by one.
  Int round(Float v) const { return V::as_int(V::fma(v, factor, Float{} + kMagic)); }
  // The nearest integer; undefined if the block is not finite.
  Int integer(Float v) const { return V::as_int(V::as_word(round(v)) - static_cast<std::uint32_t>(kMagicWord)); }
  // A mantissa plus kMagicWord, in lanes that are nonzero. Rounding can go below the least mantissa only if the sign is
  // `extra`.
  template <bool Extra>
  Int quantize(Float v) const {
    const Int n = V::min(round(v), most);
    return Extra ? V::max(n, least) : n;
  }
  // Mantissas of integers that are signed bytes.
  template <bool Extra>
  Int clamp_bytes(Int bytes) const {
    Bytes n = V::min(reinterpret_cast<Bytes>(bytes), reinterpret_cast<Bytes>(limits));
    if constexpr (Extra) n = V::max(n, -reinterpret_cast<Bytes>(limits));
    return V::as_int(n) & nonzero;
  }
};

// Scales of blocks and initial accumulators, in their memory layout; `total` holds the sums of mantissas.
template <class V>
class PairedScales {
 public:
  PairedScales(const QuantizedRows& rows, int block, typename V::Float scale, typename V::Int total) {
    using Word = typename V::Word;
    Word scales = V::as_word(scale), inits = V::as_word(total) * (rows.wide ? -kWideZeroPoint : -kZeroPoint);
    if (!rows.int_acc) {
      const Word finite = V::as_word(scales != kNanBits);
      if (V::any(finite & V::as_word(scales > kOneBits + (static_cast<std::uint32_t>(kMaxMagicExponent) << 23))))
        __atomic_store_n(rows.overflow + block, 1, __ATOMIC_RELAXED);  // other threads may store it concurrently
      scales += finite & (kMagicBits - kOneBits);
      inits += scales;
    }
    pairs_[0] = V::template interleave_values<0>(inits, scales);
    pairs_[1] = V::template interleave_values<1>(inits, scales);
    asm("" : "+m"(pairs_));  // copied through memory: extracting lanes from a register is slower
  }

  void store(int lane, BlockScale* to) const {
    // Pairs of the first two of every four lanes, then of the last two.
    __builtin_memcpy(to, reinterpret_cast<const char*>(&pairs_[lane / 2 % 2]) + 8 * (lane / 4 * 2 + lane % 2), sizeof *to);
  }

 private:
  typename V::Word pairs_[2];
};

// Stores scales and initial accumulators. Lanes are pixels from `first` on; `total` holds the sums of their mantissas.
template <class V>
inline void store_scales(const QuantizeArgs& a, int first, int pixels, typename V::Float scale, typename V::Int total) {
  const QuantizedRows& rows = a.rows;
  const std::int64_t* row = a.row + first;
  const PairedScales<V> paired(rows, a.block, scale, total);
#pragma GCC unroll 16
  for (int i = 0; i < V::kLanes; ++i) {
    if (i >= pixels) break;
    paired.store(i, rows.scale + row[i] * rows.blocks + a.block);
  }
  if (rows.shift_term) {
    const auto shifts = V::to_float(total) * scale;
    for (int i = 0; i < pixels; ++i) rows.shift_term[row[i] * rows.blocks + a.block] = shifts[i];
  }
}

// Stores octets of mantissas: a whole vector, or pieces of 32, 16 and 8 bytes.
template <class V>
inline void store_octets(std::int8_t* to, const typename V::Int& from, int octets) {
  constexpr int kAll = sizeof from / 8;
  if (octets >= kAll) return static_cast<void>(__builtin_memcpy(to, &from, sizeof from));
  const char* bytes = reinterpret_cast<const char*>(&from);
  const auto piece = [&]<int Octets>() {
    if constexpr (Octets < kAll)
      if (octets & Octets) __builtin_memcpy(to, bytes, 8 * Octets), to += 8 * Octets, bytes += 8 * Octets;
  };
  piece.template operator()<4>();
  piece.template operator()<2>();
  piece.template operator()<1>();
}

// Quantizes a vector of pixels. Narrow: a mantissa has so few bits that it is a signed byte even before clamping.
template <class V, bool Extra, bool Narrow>
inline void quantize_nchw_vector(const QuantizeArgs& args, int first, int pixels, const float* const* channel, std::int64_t at) {
  constexpr int kLanes = V::kLanes;
  using Int = typename V::Int;
  const QuantizeArgs a = args;  // a local copy, which no store of mantissas can alias
  const std::int64_t* row = a.row + first;
  BlockRange<V> range, other;  // used alternately, to break the dependency chain
  const auto add = [&](BlockRange<V>& range, int c) { range.add(V::load(channel[c] + at)); };
  int c = 0;
  for (; c + 4 <= a.channels; c += 4) add(range, c), add(other, c + 1), add(range, c + 2), add(other, c + 3);
  for (; c < a.channels; ++c) add(range, c);
  range.add(other);
  const BlockQuantizer<V> quantizer(range, a.bits, a.sign);
  Int total{};
  // Transposing kLanes vectors of four channels each makes the rows of kLanes pixels.
  const auto pack = [&](int k, int left) {
    const auto value = [&](int i) {
      if (i >= left) return Int{};
      const float* from = channel[k + i] + at;
      __builtin_prefetch(from + 2 * kLanes);  // for a later call: there are more streams than the hardware prefetcher tracks
      const auto v = V::load(from);
      return Narrow ? quantizer.round(v) : quantizer.template quantize<Extra>(v);
    };
    const Int four = V::low_bytes(value(0), value(1), value(2), value(3));
    const Int mantissas = Narrow ? quantizer.template clamp_bytes<Extra>(four) : four & quantizer.nonzero;
    total = V::add_bytes(total, mantissas);
    return mantissas;
  };
  for (c = 0; c < a.channels; c += 4 * kLanes) {
    const int channels = V::min(a.channels - c, 4 * kLanes);
    Int packed[kLanes];
    if (channels == 4 * kLanes) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) packed[i] = pack(c + 4 * i, 4);
    } else {
      for (int i = 0; i < kLanes; ++i) packed[i] = pack(c + 4 * i, channels - 4 * i);
    }
    V::transpose(packed);
    const int octets = (channels + 7) / 8;  // the last one is padded with zeros
    for (int i = 0; i < pixels; ++i)
      store_octets<V>(a.rows.mantissa + row[i] * a.rows.row_bytes + a.first_byte + c, packed[i], octets);
  }
  store_scales<V>(a, first, pixels, quantizer.scale, total);
}

template <class V, bool Extra, bool Narrow>
void quantize_nchw_vectors(const QuantizeArgs& a, const float* const* channel, std::int64_t at) {
  for (int done = 0; done < a.pixels; done += V::kLanes) {
    // The last vector overlaps the previous one if there are enough pixels.
    const int first = V::max(0, V::min(done, a.pixels - V::kLanes));
    quantize_nchw_vector<V, Extra, Narrow>(a, first, V::min(a.pixels, V::kLanes), channel, at + first);
  }
}

template <class V>
void quantize_nchw(const QuantizeArgs& a, const float* const* channel, std::int64_t first) {
  const auto with_sign = [&]<bool Extra>() {
    a.bits <= 6 ? quantize_nchw_vectors<V, Extra, true>(a, channel, first)
                : quantize_nchw_vectors<V, Extra, false>(a, channel, first);
  };
  a.sign == Sign::extra ? with_sign.template operator()<true>() : with_sign.template operator()<false>();
}

// Quantizes blocks of `Vectors` whole vectors, or of any size if that is 0. first_read(pixel, channel, vector)
// returns vector(values + pixel * stride, channel), and may compute and store it first.
template <class V, bool Extra, int Vectors, class FirstRead>
inline void quantize_nhwc_block(const QuantizeArgs& args, const float* values, std::int64_t stride, FirstRead first_read) {
  constexpr int kLanes = V::kLanes;
  using Int = typename V::Int;
  const QuantizeArgs a = args;  // a local copy, which no store of mantissas can alias
  const int count = Vectors ? Vectors * kLanes : a.channels;
  // Loads the vector from channel c on, padded with zeros.
  const auto vector = [&](const float* from, int c) {
    return c + kLanes <= count ? V::load(from + c) : c < count ? V::load_some(from + c, count - c) : typename V::Float{};
  };
  for (int first = 0; first < a.pixels; first += kLanes) {
    const int pixels = V::min(a.pixels - first, kLanes);
    const float* from = values + first * stride;
    typename V::Word words[kLanes];
    Int ints[kLanes], totals[kLanes];
    for (int i = pixels; i < kLanes; ++i) words[i] = typename V::Word{}, ints[i] = totals[i] = Int{};
    for (int i = 0; i < pixels; ++i) {
      BlockRange<V> range;
#pragma GCC unroll 8
      for (int c = 0; c < count; c += kLanes) range.add(first_read(first + i, c, vector));
      words[i] = range.words, ints[i] = range.ints;
    }
    const BlockQuantizer<V> quantizer({V::reduce(words, V::max), V::reduce(ints, V::max)}, a.bits, a.sign);
    const typename BlockQuantizer<V>::Broadcasts quantizers(quantizer);
    for (int i = 0; i < pixels; ++i) {
      std::int8_t* to = a.rows.mantissa + a.row[first + i] * a.rows.row_bytes + a.first_byte;
      const BlockQuantizer<V> one = quantizers.of(i);
      Int total{};
#pragma GCC unroll 2
      for (int c = 0; c < count; c += 4 * kLanes) {
        const auto integer = [&](int k) {
          return c + k * kLanes < count ? one.integer(vector(from + i * stride, c + k * kLanes)) : Int{};
        };
        const Int four = one.template clamp_bytes<Extra>(V::saturate_to_bytes(integer(0), integer(1), integer(2), integer(3)));
        total = V::add_bytes(total, four);
        store_octets<V>(to + c, four, V::min((count - c + 7) / 8, kLanes / 2));
      }
      totals[i] = total;
    }
    store_scales<V>(a, first, pixels, quantizer.scale, V::reduce(totals, [](Int a, Int b) { return a + b; }));
  }
}

template <class V>
void quantize_nhwc(const QuantizeArgs& a, const float* values, std::int64_t stride) {
  const auto read = [&](int pixel, int c, auto vector) { return vector(values + pixel * stride, c); };
  const auto with_sign = [&]<bool Extra>() {
    switch (a.channels % V::kLanes ? 0 : a.channels / V::kLanes) {
      case 2: return quantize_nhwc_block<V, Extra, 2>(a, values, stride, read);
      case 4: return quantize_nhwc_block<V, Extra, 4>(a, values, stride, read);
      case 8: return quantize_nhwc_block<V, Extra, 8>(a, values, stride, read);
      default: return quantize_nhwc_block<V, Extra, 0>(a, values, stride, read);
    }
  };
  a.sign == Sign::extra ? with_sign.template operator()<true>() : with_sign.template operator()<false>();
}

}  // namespace dsconv
