// A tile of dot products for instruction sets with few registers: two adjacent vectors of outputs.
#pragma once

#include "dot.h"

namespace dsconv {

inline constexpr int kTileVectors = 2;

// A tile of M x (kTileVectors * lanes) outputs. Dot, a type of an unnamed namespace or a template over one, has
//   Vector            a vector type
//   static constexpr int kMR, kMantissaBytes
//   template <Weights W> static constexpr int kOctetBytes    of the weights of a panel
//   template <Weights W> static Vector::Int acc_init(const DotArgs&, const BlockScale&, std::int64_t at)
//                                                      `at` counts values of `kds` up to those of the sums
//   template <Weights W, int M> static void add_octets(const DotArgs&, const std::uint8_t* w, const std::int8_t* const (&x)[M],
//                                                      int octets, Vector::Int (&acc)[M][kTileVectors])
template <class Dot, int M, Weights W, bool Shift>
void dot_tile(const DotArgs& a, const std::int64_t* row, const std::uint8_t* w, const float* kds, const float* shift, float* sums) {
  using V = typename Dot::Vector;
  const QuantizedRows& rows = a.rows;
  typename V::Float y[M][kTileVectors];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < kTileVectors; ++v) y[m][v] = typename V::Float{};
  for (int k = 0; k < a.taps; ++k) {
    const std::int8_t* x[M];
    std::int64_t block[M];
    for (int m = 0; m < M; ++m) {
      const std::int64_t at = row[m] + a.tap_row[k];
      x[m] = rows.mantissa + at * rows.row_bytes;
      block[m] = at * rows.blocks;
    }
    for (int b = 0; b < rows.blocks; ++b) {
      typename V::Int acc[M][kTileVectors];
      for (int m = 0; m < M; ++m)
        for (int v = 0; v < kTileVectors; ++v)
          acc[m][v] = Dot::template acc_init<W>(a, rows.scale[block[m] + b], kds - a.kds + V::kLanes * v);
      const int octets = b + 1 < rows.blocks ? a.octets : a.last_octets;
      Dot::template add_octets<W>(a, w, x, octets, acc);
      w += octets * Dot::template kOctetBytes<W>;
      for (int m = 0; m < M; ++m) {
        x[m] += 8 * octets * Dot::kMantissaBytes;
        const auto scale = V::broadcast(rows.scale[block[m] + b].scale);
        for (int v = 0; v < kTileVectors; ++v) {
          const auto term = W != Weights::nibbles && rows.int_acc ? V::to_float(acc[m][v]) * scale : V::as_float(acc[m][v]) - scale;
          y[m][v] = V::fma(V::load(kds + V::kLanes * v), term, y[m][v]);
          if constexpr (Shift)
            y[m][v] = V::fma(V::load(shift + V::kLanes * v), V::broadcast(rows.shift_term[block[m] + b]), y[m][v]);
        }
      }
      kds += kNR;
      if constexpr (Shift) shift += kNR;
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < kTileVectors; ++v) V::store(sums + m * kNR + V::kLanes * v, y[m][v]);
}

// The Tile of dot.h.
template <class Dot>
struct DotTile {
  template <int Panels>
  static constexpr int kMR = Dot::kMR;

  template <int M, int Panels, Weights W, bool Shift>
  static void run(const DotArgs& a, const std::int64_t* row, float* sums) {
    for (int n = 0; n < Panels * kPanel; n += Dot::Vector::kLanes * kTileVectors)
      dot_tile<Dot, M, W, Shift>(a, row, a.weight + (n / kPanel) * a.panel_bytes + 4 * (n % kPanel), a.kds + n,
                                 Shift ? a.kds_shift + n : nullptr, sums + n);
  }
};

}  // namespace dsconv
