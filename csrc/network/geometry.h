// Sizes and memory offsets of all tensors of a program, derived from the sizes of its inputs.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "../program/program.h"

namespace dsconv {

namespace file {
struct Average;
struct AverageWindows;
struct Convolve;
struct Interpolate;
struct Order;
struct Pick;
struct Places;
struct Pool;
struct Program;
struct Rearrange;
struct Step;
struct Stretch;
}  // namespace file

// Pixels of an image; the frames of a 3-D image are stacked vertically.
struct Grid {
  std::int64_t frames = 0, height = 0, width = 0;

  std::int64_t rows() const { return frames * height; }
  bool operator==(const Grid&) const = default;
};

class Geometry {
 public:
  // Takes the pixels of each input; unused inputs are ignored. Throws FileError, or std::invalid_argument if the steps do not
  // accept these inputs.
  Geometry(const file::Program&, std::span<const Grid> inputs);

  // Tensors in the form that Program expects.
  FloatTensor float_tensor(int id) const;
  ActivationFormat format(int id) const;
  PaddedGrid quantized_grid(int id) const;
  std::int64_t quantized_offset(int id) const { return quantized_[id].place.offset; }
  Grid grid(int id) const;  // of a float tensor
  // Number of values per image at each base; base 0 has none.
  std::vector<std::int64_t> bases() const;

  // Parameters of steps, for the sizes of this geometry.
  ConvSizes conv_sizes(const file::Convolve&) const;
  Grid pooled(const file::Pool&) const;
  std::vector<Loop> loops(const file::Rearrange&) const;
  std::vector<std::int64_t> rows(const file::Pick&) const;
  std::vector<std::int64_t> columns(const file::Pick&) const;
  std::vector<Between> rows(const file::Interpolate&) const;
  std::vector<Between> columns(const file::Interpolate&) const;
  const file::Order& order(const file::Interpolate&) const;
  std::vector<Span> rows(const file::AverageWindows&) const;
  std::vector<Span> columns(const file::AverageWindows&) const;
  // Whether a step that is marked as joined is fused with the previous one.
  bool joined(const file::Step& before) const;

 private:
  // Bytes that are live from step `first` to step `last`, inclusive.
  struct Buffer {
    std::int64_t size = 0, offset = 0;
    int first = -1, last = -1;

    void use(int step);
    bool meets(const Buffer& other) const { return first <= other.last && other.first <= last; }
  };
  struct MemoryPlace {
    Grid grid;
    Buffer place;
  };

  void derive(const file::Step&);
  void lifetimes();
  void place();
  void set(int float_tensor, const Grid&);
  void set_quantized(int tensor, const Grid&);
  const Grid& source_of(const file::Convolve&) const;

  const file::Program& of_;
  std::vector<MemoryPlace> memory_, quantized_;
  std::int64_t listed_ = 0;
};

}  // namespace dsconv
