// Sizes and memory offsets of all tensors of a program, derived from the sizes of its inputs.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <vector>

#include "../program/program.h"

namespace dsconv {

namespace file {
struct Average;
struct AverageWindows;
struct Convolve;
struct FloatTensor;
struct Interpolate;
struct Order;
struct Pick;
struct Places;
struct Pool;
struct Program;
struct QuantizedTensor;
struct Rearrange;
struct Step;
struct Stretch;
struct Target;
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
  std::int64_t listed() const { return listed_; }  // rows and columns over all steps that list them

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
  // Channels, as ranges that do not touch.
  class Channels {
   public:
    void add(std::int64_t first, std::int64_t count);
    bool has(std::int64_t first, std::int64_t count) const;

   private:
    std::map<std::int64_t, std::int64_t> ends_;  // of ranges, by where they begin
  };
  // State of a memory or of a quantized tensor.
  struct Place {
    Grid grid;
    Buffer place;
    Channels made;  // by the steps so far
  };

  void derive(const file::Step&);
  void lifetimes();
  void place();
  const file::FloatTensor& table(int float_tensor) const;
  const file::QuantizedTensor& quantized_table(int tensor) const;
  void set(int float_tensor, const Grid&);
  void set_quantized(const file::Target&, std::int64_t channels, const Grid&);
  bool is_made(int float_tensor) const;
  bool is_made_quantized(int tensor) const;
  const Grid& source_of(const file::Convolve&) const;

  const file::Program& of_;
  std::vector<Place> memory_, quantized_;
  std::int64_t listed_ = 0;
};

}  // namespace dsconv
