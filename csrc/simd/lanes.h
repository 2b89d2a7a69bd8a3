// Vectors in the extensions of GCC and Clang, and operations that need no special instruction.
#pragma once

#include <cstdint>

namespace dsconv::simd {

template <class T, int Bytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(Bytes)));
};

// Types of vectors of N lanes of 32 bits, and their functions. The vector types of simd/<isa>.h derive from it and
// replace functions for which the instruction set has a better instruction. Each is in an unnamed namespace, which
// gives internal linkage to all templates over it: the linker must never merge functions that were compiled for
// different instruction sets.
template <int N, class Vector>
struct Lanes {
  static_assert(N == 4 || N == 8 || N == 16);
  static constexpr int kLanes = N;
  using Float = typename VectorOf<float, 4 * N>::type;
  using Int = typename VectorOf<std::int32_t, 4 * N>::type;
  using Word = typename VectorOf<std::uint32_t, 4 * N>::type;
  using Bytes = typename VectorOf<std::int8_t, 4 * N>::type;
  using Pairs = typename VectorOf<std::int64_t, 4 * N>::type;

  // Bit casts, and conversion.
  static Float as_float(auto v) { return reinterpret_cast<Float>(v); }
  static Int as_int(auto v) { return reinterpret_cast<Int>(v); }
  static Word as_word(auto v) { return reinterpret_cast<Word>(v); }
  static Float to_float(Int v) { return __builtin_convertvector(v, Float); }

  static Float broadcast(float v) { return v - Float{}; }  // adding zero would lose the sign of -0
  static Int broadcast(std::int32_t v) { return Int{} + v; }

  static Float load(const float* from) { return load_as<Float>(from); }
  static Int load(const std::int32_t* from) { return load_as<Int>(from); }
  static void store(float* to, Float v) { __builtin_memcpy(to, &v, sizeof v); }
  // Access to the first `count` lanes; load_some fills the others with zeros.
  static Float load_some(const float* from, int count) {
    Float v{};
    for (int i = 0; i < count; ++i) v[i] = from[i];
    return v;
  }
  static void store_some(float* to, Float v, int count) {
    for (int i = 0; i < count; ++i) to[i] = v[i];
  }
  static Float load(const float* from, int count) { return count == N ? load(from) : Vector::load_some(from, count); }
  static void store(float* to, Float v, int count) { count == N ? store(to, v) : Vector::store_some(to, v, count); }

  // For vectors and scalars; both return b if either is NaN.
  static constexpr auto max = [](auto a, auto b) { return a > b ? a : b; };
  static constexpr auto min = [](auto a, auto b) { return a < b ? a : b; };

  static bool any(Word v) {
    std::uint32_t all = 0;
    for (int i = 0; i < N; ++i) all |= v[i];
    return all != 0;
  }

  // Combines the lowest bytes of corresponding lanes.
  static Int low_bytes(Int a, Int b, Int c, Int d) { return (a & 255) | (b & 255) << 8 | (c & 255) << 16 | d << 24; }
  // Adds the four signed bytes of each lane to its sum.
  static Int add_bytes(Int sum, Int four) {
    return sum + (four << 24 >> 24) + (four << 16 >> 24) + (four << 8 >> 24) + (four >> 24);
  }
  // Adds the product of the low 16 bits, signed; b has zeros above them.
  static Int add_product(Int sum, Int a, Int b) { return sum + (a << 16 >> 16) * (b << 16 >> 16); }

  // Interleaves values, or pairs of values, of the first (Half 0) or the second halves of every 128 bits. Shuffles within
  // 128 bits are the fastest.
  template <int Half, class T>
  static T interleave_values(T a, T b) {
    constexpr int h = 2 * Half;
    if constexpr (N == 4) return __builtin_shufflevector(a, b, h, h + 4, h + 1, h + 5);
    if constexpr (N == 8) return __builtin_shufflevector(a, b, h, h + 8, h + 1, h + 9, h + 4, h + 12, h + 5, h + 13);
    if constexpr (N == 16)
      return __builtin_shufflevector(a, b, h, h + 16, h + 1, h + 17, h + 4, h + 20, h + 5, h + 21, h + 8, h + 24, h + 9, h + 25,
                                     h + 12, h + 28, h + 13, h + 29);
  }
  template <int Half, class T>
  static T interleave_pairs(T a, T b) {
    constexpr int h = 2 * Half;
    if constexpr (N == 4) return __builtin_shufflevector(a, b, h, h + 1, h + 4, h + 5);
    if constexpr (N == 8) return __builtin_shufflevector(a, b, h, h + 1, h + 8, h + 9, h + 4, h + 5, h + 12, h + 13);
    if constexpr (N == 16)
      return __builtin_shufflevector(a, b, h, h + 1, h + 16, h + 17, h + 4, h + 5, h + 20, h + 21, h + 8, h + 9, h + 24, h + 25,
                                     h + 12, h + 13, h + 28, h + 29);
  }
  // Takes every other 128 bits of a, then of b.
  template <int Half, class T>
  static T every_other_four(T a, T b) {
    constexpr int h = 4 * Half;
    if constexpr (N == 8) return __builtin_shufflevector(a, b, h, h + 1, h + 2, h + 3, h + 8, h + 9, h + 10, h + 11);
    if constexpr (N == 16)
      return __builtin_shufflevector(a, b, h, h + 1, h + 2, h + 3, h + 8, h + 9, h + 10, h + 11, h + 16, h + 17, h + 18, h + 19,
                                     h + 24, h + 25, h + 26, h + 27);
  }

  // Transposes: first within every 4x4 values, then between these.
  template <class T>
  static void transpose(T (&v)[N]) {
#pragma GCC unroll 4
    for (int i = 0; i < N; i += 4) {
      const T a = interleave_values<0>(v[i], v[i + 1]), b = interleave_values<1>(v[i], v[i + 1]);
      const T c = interleave_values<0>(v[i + 2], v[i + 3]), d = interleave_values<1>(v[i + 2], v[i + 3]);
      v[i] = interleave_pairs<0>(a, c), v[i + 1] = interleave_pairs<1>(a, c);
      v[i + 2] = interleave_pairs<0>(b, d), v[i + 3] = interleave_pairs<1>(b, d);
    }
    if constexpr (N > 4) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const T even = every_other_four<0>(v[j], v[4 + j]), odd = every_other_four<1>(v[j], v[4 + j]);
        v[j] = even, v[4 + j] = odd;
        if constexpr (N == 16) {
          const T more_even = every_other_four<0>(v[8 + j], v[12 + j]), more_odd = every_other_four<1>(v[8 + j], v[12 + j]);
          v[j] = every_other_four<0>(even, more_even), v[4 + j] = every_other_four<0>(odd, more_odd);
          v[8 + j] = every_other_four<1>(even, more_even), v[12 + j] = every_other_four<1>(odd, more_odd);
        }
      }
    }
  }

  // Reduces vectors: lane i of the result combines all lanes of v[i].
  template <class T, class Combine>
  static T reduce(T (&v)[N], Combine combine) {
    return reduce([&](int i) { return v[i]; }, combine);
  }
  // The same for integer vectors that make(i) returns, four at a time, so that few registers are live.
  template <class Make, class Combine>
  static auto reduce(Make make, Combine combine) {
    decltype(make(0)) v[N / 4];
#pragma GCC unroll 4
    for (int i = 0; i < N; i += 4) {
      const auto two = [&](int j) __attribute__((always_inline)) {
        const auto first = make(j), second = make(j + 1);
        return combine(interleave_values<0>(first, second), interleave_values<1>(first, second));
      };
      const auto a = two(i), b = two(i + 2);
      v[i / 4] = combine(interleave_pairs<0>(a, b), interleave_pairs<1>(a, b));
    }
    if constexpr (N > 4) {
#pragma GCC unroll 2
      for (int apart = 1; apart < N / 4; apart *= 2)
#pragma GCC unroll 2
        for (int i = 0; i < N / 4; i += 2 * apart)
          v[i] = combine(every_other_four<0>(v[i], v[i + apart]), every_other_four<1>(v[i], v[i + apart]));
    }
    return v[0];
  }

 private:
  template <class T>
  static T load_as(const void* from) {
    T v;
    __builtin_memcpy(&v, from, sizeof v);
    return v;
  }
};

}  // namespace dsconv::simd
