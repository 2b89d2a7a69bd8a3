// The driver of dot products: divides output pixels into tiles of MR x NR.
#pragma once

#include "kernels.h"

namespace dsconv {

// A Tile of an instruction set, a type of an unnamed namespace, has
//   template <int Panels> static constexpr int kMR;   pixels of a full tile
//   template <int M, int Panels, Weights W, bool Shift> static void run(const DotArgs&, const std::int64_t* row, float* sums);
template <class Tile, int M, int Panels, Weights W, bool Shift>
void dot_lower_tile(const DotArgs& a, int pixels, const std::int64_t* row, float* sums) {
  if constexpr (M > 0) {
    if (pixels == M) return Tile::template run<M, Panels, W, Shift>(a, row, sums);
    dot_lower_tile<Tile, M - 1, Panels, W, Shift>(a, pixels, row, sums);
  }
}

template <class Tile, int Panels, Weights W, bool Shift>
void dot_tiles(const DotArgs& a) {
  constexpr int M = Tile::template kMR<Panels>;
  int m = 0;
  // Two tiles of similar height are faster than a full one and a small one.
  for (int left = a.pixels; left > 0;) {
    const int height = left >= 2 * M || left == M ? M : left > M ? (left + 1) / 2 : left;
    for (int i = m; a.prefetch && i < m + height; ++i)
      for (int n = 0; n < Panels * kPanel; n += 16) __builtin_prefetch(a.prefetch + a.prefetch_place[i] + n, 1);  // cache lines
    if (height == M) Tile::template run<M, Panels, W, Shift>(a, a.row + m, a.sums + m * kNR);
    else dot_lower_tile<Tile, M - 1, Panels, W, Shift>(a, height, a.row + m, a.sums + m * kNR);
    m += height;
    left -= height;
  }
}

template <class Tile>
void dot(const DotArgs& a) {
  const auto with_settings = [&]<Weights W, bool Shift>() {
    a.panels == 2 ? dot_tiles<Tile, 2, W, Shift>(a) : dot_tiles<Tile, 1, W, Shift>(a);
  };
  const auto with_weights = [&]<Weights W>() {
    a.kds_shift ? with_settings.template operator()<W, true>() : with_settings.template operator()<W, false>();
  };
  switch (a.weights()) {
    case Weights::nibbles: return with_weights.template operator()<Weights::nibbles>();
    case Weights::bytes: return with_weights.template operator()<Weights::bytes>();
    case Weights::signed_bytes: return with_weights.template operator()<Weights::signed_bytes>();
  }
}

}  // namespace dsconv
