// A network as a list of steps over tensors that lie in one piece of memory.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <utility>
#include <vector>

#include "../conv/conv.h"

namespace dsconv {

// A float tensor begins so many bytes an image after one of the addresses that a run is given, and `first` values on;
// it has strides for all dimensions but the first, along which images lie one behind the other.
struct Values {
  int base;
  std::int64_t offset, first;
  std::int64_t channels, height, width;
  Strides strides;

  bool dense() const {  // a pixel's channels side by side, pixels one after another
    return strides.channel == 1 && strides.y == width * strides.x && strides.image == height * strides.y;
  }
};

// What becomes of the outputs of a step; -1 is none.
struct Use {
  int values;
  int residual;                                       // added before the activation
  std::vector<std::pair<int, std::int64_t>> targets;  // quantized tensors, and the channel there that the first becomes
  Activation activation;
  float slope;
};

// Tensors are named by numbers. Base 0 is memory of bytes(images) bytes, aligned to 64, that nobody else uses during a run;
// steps are fixed before the first run, and runs may overlap.
class Program {
  struct Run {
    std::int64_t images;
    std::span<const std::uintptr_t> bases;
  };
  using Step = std::function<void(const Run&)>;

 public:
  explicit Program(const Kernels& kernels) : kernels_(kernels) {}

  int values(const Values&);
  int quantized(const Format&, const Grid&, std::int64_t offset);  // in base 0
  static std::int64_t quantized_bytes(const Format&, const Grid&);
  std::int64_t bytes(std::int64_t images) const;
  const Kernels& kernels() const { return kernels_; }

  // Of quantized tensor `input`, or with flattened blocks of float tensor `from`.
  void convolve(const Geometry&, const Layer&, int from, int input, const Use&);
  // Every value times its channel's scale plus its shift, where these are given, rounded once or twice; times that of `gate`,
  // a tensor of that size or of one pixel, where it is not -1.
  void map(int from, const float* scale, const float* shift, bool once, int gate, const Use&);
  // The average of every channel of an image, as an Average sums up on so many lanes.
  void average(int from, int lanes, int to);
  // All values of an image as channels of one pixel, those of a channel one after another.
  void flatten(int from, int to);
  // Over windows of the kernel size: the maximum, or the average, in which zeros of the padding count if they are to.
  struct Window {
    std::int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
    bool average, count_zeros;
    std::int64_t divisor;  // of an average; 0: the number of values
  };
  void pool(int from, const Window&, std::int64_t out_height, std::int64_t out_width, const Use&);

  // A step that somebody else takes.
  void skip() {
    steps_.push_back([](const Run&) {});
  }

  // Adds to seconds[step], if that is not null, what each step took.
  void run(std::int64_t images, std::span<const std::uintptr_t> bases, int first, int last, double* seconds) const;

 private:
  struct Tensor {
    Format format;
    Grid grid;
    std::int64_t offset;
  };

  const Values& values_of(int id) const;
  const Tensor& tensor_of(int id) const;
  std::uintptr_t base(const Run&, int number) const;
  float* address(const Run&, const Values&) const;
  Input input(const Run&, int id) const;
  Quantized quantized(const Run&, int id) const;
  std::vector<Target> targets(const Run&, const Use&, std::int64_t channels) const;
  void check(const Use&, std::int64_t channels, std::int64_t height, std::int64_t width, bool whole) const;

  const Kernels& kernels_;
  std::vector<Values> values_;
  std::vector<Tensor> tensors_;
  std::vector<Step> steps_;
  std::int64_t bytes_ = 0;
  std::int64_t most_ = 1;  // bytes an image of the largest of all memories
  int bases_ = 1;
};

}  // namespace dsconv
