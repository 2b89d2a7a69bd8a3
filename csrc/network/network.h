// A compiled network from a file, ready to run.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "../program/program.h"
#include "file.h"

namespace dsconv {

namespace file {
struct Network;
struct Bytes;
struct Program;
struct Port;
struct Size;
struct Weights;
}  // namespace file

class Geometry;
struct Grid;

using Shape = std::vector<std::int64_t>;

// Memory of float32 values.
class Memory {
 public:
  // Returns memory of this size, aligned to 64 bytes; if it has to grow, its contents are lost.
  std::byte* of(std::int64_t bytes);
  std::int64_t bytes() const { return bytes_; }

 private:
  struct Free {
    void operator()(std::byte* data) const { ::operator delete(data, std::align_val_t{64}); }
  };
  std::unique_ptr<std::byte, Free> data_;
  std::int64_t bytes_ = 0;
};

// An input or output of the user, (samples, ...), with strides in values. An output may have no memory.
struct UserTensor {
  float* values;
  Shape shape, strides;
};

class Network {
 public:
  // Throws FileError.
  Network(std::shared_ptr<const File>, const Kernels&);

  // Shapes of a sample.
  struct Size {
    std::vector<Shape> inputs, outputs;
  };

  const std::vector<std::string>& inputs() const { return inputs_; }
  const std::vector<std::string>& outputs() const { return outputs_; }
  const std::vector<std::string>& classes() const { return classes_; }
  const std::optional<std::string>& preprocess() const { return preprocess_; }
  const std::vector<Size>& sizes() const { return sizes_; }
  std::int64_t weight_bytes() const { return weight_bytes_; }

  // Returns the step by whose multiples heights and widths of further sizes may differ from listed ones; 0: no further sizes.
  std::int64_t size_step() const;

  // The location of an input or output in a run, in values, except the offset, which is in bytes.
  struct Port {
    int base;
    std::int64_t offset, first, sample_stride;
    Shape shape, strides;
    bool whole = false;  // it fills its memory, from the first value to the last
  };
  // A program for inputs of one size.
  struct Compiled {
    explicit Compiled(const Kernels& kernels) : program(kernels) {}
    Program program;
    int steps = 0;
    std::int64_t listed = 0;           // rows and columns, by all steps
    std::int64_t samples_at_once = 0;  // 0: all
    std::int64_t at_once(std::int64_t samples) const;
    // Returns the bytes of tensors between steps, and of inputs and outputs that are copied.
    double run_bytes(std::int64_t samples) const;
    std::vector<Port> inputs, outputs;
    std::vector<std::int64_t> bases;  // values per sample at each base, except base 0
  };

  // Returns the program for inputs of these shapes, (samples, ...); the last 16 are cached. Throws std::invalid_argument.
  std::shared_ptr<const Compiled> compiled_for(std::span<const Shape> inputs) const;
  // Runs a program on inputs of its size. Throws std::invalid_argument, NoMemory.
  void run(const Compiled&, std::span<const UserTensor> inputs, std::span<const UserTensor> outputs) const;

 private:
  // The programs of a size, for one sample and for several.
  struct Programs {
    std::shared_ptr<const Compiled> one, several;
  };
  // Memory of a run, for each base.
  using Workspace = std::vector<Memory>;
  struct PackedWeights {
    const std::uint8_t* weight = nullptr;
    const float *kds = nullptr, *shift = nullptr;
    std::int64_t weight_bytes = 0, kds_count = 0, shift_count = 0;
    Memory memory;
  };

  std::vector<Shape> shapes_of(const file::Size&) const;
  void add(const file::Program&, const std::vector<Shape>& inputs, const Kernels&);
  std::shared_ptr<const Compiled> compiled(const file::Program&, const std::vector<Shape>& inputs, const Kernels&) const;
  Grid grid_of(const file::Program&, std::size_t input, const Shape&) const;
  Port port(const file::Port&, const Geometry&, const Compiled&) const;
  std::vector<Shape> samples_of(std::span<const Shape> inputs) const;
  bool may_be(const std::vector<Shape>& inputs) const;
  std::string expected_for(std::span<const Shape> inputs) const;
  const PackedWeights& weights(int number, const ConvSizes&, int bits, const Kernels&) const;
  void pack(const file::Weights&, const ConvSizes&, int bits, const Kernels&, PackedWeights& to) const;
  std::vector<float> scales(const file::Bytes*, std::int64_t count, bool half) const;
  const std::byte* bytes(std::uint64_t begin, std::uint64_t size) const;
  const float* constant(int number, std::int64_t count) const;
  void run_part(const Compiled&, Workspace&, std::int64_t first, std::int64_t count, std::span<const UserTensor> inputs,
                std::span<const UserTensor> outputs) const;
  std::unique_ptr<Workspace> workspace() const;

  // A program that was built for an input size that the file does not list.
  struct Free {
    bool one;
    std::vector<Shape> inputs;
    std::shared_ptr<const Compiled> compiled;
  };

  std::shared_ptr<const File> file_;
  const Kernels& kernels_;
  const file::Network* tables_;
  std::vector<std::string> inputs_, outputs_, classes_;
  std::optional<std::string> preprocess_;
  std::vector<Size> sizes_;
  std::vector<Programs> programs_;
  std::int64_t steps_ = 0, listed_ = 0;                                // of all programs
  const file::Program *free_one_ = nullptr, *free_several_ = nullptr;  // for sizes that are not listed
  // Packed when the file is opened, for the first program that reads them.
  mutable std::vector<std::unique_ptr<PackedWeights>> weights_;
  mutable std::int64_t weight_bytes_ = 0;
  mutable std::mutex mutex_;
  mutable std::vector<Free> free_;
  mutable std::vector<std::unique_ptr<Workspace>> spare_;
};

// Returns a shape as "(2, 3)".
std::string text_of(const Shape&);

}  // namespace dsconv
