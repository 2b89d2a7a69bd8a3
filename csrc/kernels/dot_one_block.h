// Layers of one tap and block: so few products that their sums are finished where they are made.
#pragma once

#include "epilogue.h"

namespace dsconv {

// What all outputs of a pixel share.
struct OneBlockPixel {
  const std::int8_t* x;
  BlockScale scale;
  float shift_term;
  float* output;
};

inline void one_block_pixels(const DotArgs& a, const EpilogueArgs& to, OneBlockPixel* pixels) {
  for (int p = 0; p < a.pixels; ++p) {
    const std::int64_t row = a.row[p] + a.tap_row[0];
    pixels[p] = {a.rows.mantissa + row * a.rows.row_bytes, a.rows.scale[row], a.kds_shift ? a.rows.shift_term[row] : 0.0f,
                 to.output + to.place[p]};
  }
}

// KDS and what comes after the sums, of the outputs of a tile; absent ones are numbers that change nothing.
template <class V, int Vectors>
struct OneBlockTerms {
  typename V::Float kds[Vectors], shift[Vectors];
  PostOpVectors<V> post[Vectors];

  OneBlockTerms(const DotArgs& a, const EpilogueArgs& to, int first) {
    for (int v = 0; v < Vectors; ++v) {
      const auto each = [n = first + v * V::kLanes](const float* from) { return V::load(from + n); };
      kds[v] = each(a.kds);
      if (a.kds_shift) shift[v] = each(a.kds_shift);
      post[v] = PostOpVectors<V>(to.post, each);
    }
  }
};

template <class Tile, int M, bool Shift>
[[gnu::always_inline]] inline void one_block_tile(const DotArgs& a,
                                                  const OneBlockTerms<typename Tile::Vector, Tile::kVectors>& terms,
                                                  const std::uint8_t* w, Bounds bounds, const OneBlockPixel* pixels, int first) {
  using V = typename Tile::Vector;
  typename V::Int acc[M][Tile::kVectors];
  Tile::template sum<M>(a, w, pixels, acc);
  const auto low = V::broadcast(bounds.low), high = V::broadcast(bounds.high);
#pragma GCC unroll 2
  for (int v = 0; v < Tile::kVectors; ++v)
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      auto y = V::fma(terms.kds[v], V::as_float(acc[m][v]) - V::broadcast(pixels[m].scale.scale), typename V::Float{});
      if constexpr (Shift) y = V::fma(terms.shift[v], V::broadcast(pixels[m].shift_term), y);
      y = V::fma(y + terms.post[v].bias, terms.post[v].gain, terms.post[v].offset);
      y = y < low ? low : y;
      V::store(pixels[m].output + first + v * V::kLanes, y > high ? high : y);
    }
}

// The outputs of a tile from `first` on, of all pixels.
template <class Tile, bool Shift>
[[gnu::noinline]] void one_block_outputs(const DotArgs& args, const EpilogueArgs& to, const OneBlockPixel* pixels, int first) {
  const DotArgs a = args;  // a local copy, which no store of outputs can alias
  const OneBlockTerms<typename Tile::Vector, Tile::kVectors> terms(a, to, first);
  const std::uint8_t* const w = a.weight + first / kPanel * a.panel_bytes + first % kPanel * 4;
  const Bounds bounds = bounds_of(to.post.activation);
  const OneBlockPixel* const end = pixels + a.pixels;
  for (; pixels + Tile::kMR <= end; pixels += Tile::kMR) one_block_tile<Tile, Tile::kMR, Shift>(a, terms, w, bounds, pixels, first);
  for (; pixels < end; ++pixels) one_block_tile<Tile, 1, Shift>(a, terms, w, bounds, pixels, first);
}

// Kernels::dot_one_block. Tile has
//   Vector, kMR, kVectors    those of a tile, whose vectors of outputs fill a panel or a part of one
//   template <int M> static void sum(const DotArgs&, const std::uint8_t* w, const OneBlockPixel*, Vector::Int (&acc)[M][kVectors])
template <class Tile>
void dot_one_block(const DotArgs& a, const EpilogueArgs& to) {
  OneBlockPixel pixels[kMaxTaskPixels];
  one_block_pixels(a, to, pixels);
  for (int n = 0; n < to.outputs; n += Tile::Vector::kLanes * Tile::kVectors)
    a.kds_shift ? one_block_outputs<Tile, true>(a, to, pixels, n) : one_block_outputs<Tile, false>(a, to, pixels, n);
}

}  // namespace dsconv
