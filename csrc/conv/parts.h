// Decomposition of transposed and 3-D convolutions into 2-D convolutions.
#pragma once

#include <vector>

#include "conv.h"

namespace dsconv {

// Outputs of a convolution with the same taps: those of one phase in height and width, in one frame.
struct Part {
  ConvSizes g;                        // of the whole convolution, except for the outputs' depth, height and width
  Output o;                           // begins with its first output
  std::int64_t first_tap;             // in the packed weights
  std::vector<std::int64_t> tap_row;  // of each tap: the distance in rows to row_of
  std::int64_t row, image_rows, line_rows, pixel_rows;

  std::int64_t row_of(std::int64_t image, std::int64_t y, std::int64_t x) const {
    return row + image * image_rows + y * line_rows + x * pixel_rows;
  }
};

// The parts of a convolution of a quantized input in `grid`. A 2-D convolution that is not transposed is one part.
class Parts {
 public:
  Parts(const ConvSizes& g, const PaddedGrid& grid, const Output& o)
      : g_(g), grid_(grid), o_(o), d_(g.axis_d()), h_(g.axis_h()), w_(g.axis_w()) {}

  std::int64_t count() const { return d_.out * h_.phases() * w_.phases(); }
  std::int64_t pixels() const { return g_.images * h_.outputs(0) * w_.outputs(0); }  // of the largest part
  Part at(std::int64_t index) const;

 private:
  const ConvSizes& g_;
  const PaddedGrid& grid_;
  const Output& o_;
  const Axis d_, h_, w_;
};

}  // namespace dsconv
