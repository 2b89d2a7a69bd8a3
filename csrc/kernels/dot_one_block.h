// Layers of one tap and one block: they have few products, so that the epilogue is fused with the dot products.
#pragma once

#include "epilogue.h"

namespace dsconv {

// Data that all outputs of a pixel share.
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

// KDS and post-ops of the outputs of a tile; absent ones are replaced by neutral values.
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

template <class Tile, int M, Weights W, bool Shift>
[[gnu::always_inline]] inline void one_block_tile(const DotArgs& a,
                                                  const OneBlockTerms<typename Tile::Vector, Tile::kVectors>& terms,
                                                  const std::uint8_t* w, Bounds bounds, const OneBlockPixel* pixels, int first) {
  using V = typename Tile::Vector;
  typename V::Int acc[M][Tile::kVectors];
  Tile::template sum<M, W>(a, w, pixels, acc);
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

// The outputs of a tile, from `first` on, of all pixels.
template <class Tile, Weights W, bool Shift>
[[gnu::noinline]] void one_block_outputs(const DotArgs& args, const EpilogueArgs& to, const OneBlockPixel* pixels, int first) {
  const DotArgs a = args;  // a local copy, which no store of outputs can alias
  const OneBlockTerms<typename Tile::Vector, Tile::kVectors> terms(a, to, first);
  const std::uint8_t* const w = a.weight + first / kPanel * a.panel_bytes + first % kPanel * 4;
  const Bounds bounds = bounds_of(to.post.activation);
  const OneBlockPixel* const end = pixels + a.pixels;
  for (; pixels + Tile::kMR <= end; pixels += Tile::kMR)
    one_block_tile<Tile, Tile::kMR, W, Shift>(a, terms, w, bounds, pixels, first);
  for (; pixels < end; ++pixels) one_block_tile<Tile, 1, W, Shift>(a, terms, w, bounds, pixels, first);
}

// Kernels::dot_one_block. Tile has
//   Vector, kMR, kVectors    those of a tile, whose vectors of outputs fill a panel or a part of one
//   template <int M, Weights W> static void sum(const DotArgs&, const std::uint8_t* w, const OneBlockPixel*, Vector::Int
//   (&acc)[M][kVectors])
template <class Tile>
void dot_one_block(const DotArgs& a, const EpilogueArgs& to) {
  OneBlockPixel pixels[kMaxTaskPixels];
  one_block_pixels(a, to, pixels);
  const auto with_settings = [&]<Weights W, bool Shift>() {
    for (int n = 0; n < to.outputs; n += Tile::Vector::kLanes * Tile::kVectors) one_block_outputs<Tile, W, Shift>(a, to, pixels, n);
  };
  const auto with_weights = [&]<Weights W>() {
    a.kds_shift ? with_settings.template operator()<W, true>() : with_settings.template operator()<W, false>();
  };
  a.rows.wide ? with_weights.template operator()<Weights::bytes>() : with_weights.template operator()<Weights::nibbles>();
}

}  // namespace dsconv
