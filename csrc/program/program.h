// A network as a list of steps over tensors in one piece of memory.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <utility>
#include <vector>

#include "../conv/conv.h"

namespace dsconv {

// A float tensor: of images that lie `strides.image` apart, from base address number `base` plus `offset` bytes an
// image plus `first` values on. The frames of a 3-D one lie one below the other.
struct FloatTensor {
  int base;
  std::int64_t offset, first;
  std::int64_t channels, height, width;
  Strides strides;

  std::int64_t pixels() const { return height * width; }
  bool dense() const {  // the channels of a pixel are contiguous, and so are pixels
    return strides.channel == 1 && strides.y == width * strides.x && strides.image == height * strides.y;
  }
};

// The destinations of a step's outputs, and its last operations; -1 is no tensor.
struct StepOutputs {
  int values;
  int residual;                                       // added before the activation
  std::vector<std::pair<int, std::int64_t>> targets;  // quantized tensors, and where the first channel goes there
  Activation activation;
  float slope;
};

// Windows of a pooling.
struct PoolWindow {
  std::int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  bool average, count_padding;
  std::int64_t divisor;  // of an average; 0: the number of values, with those of the padding if they count
};

// Tensors are named by numbers. Base 0 is memory of bytes(images) bytes, aligned to 64, that nobody else uses during a
// run; steps are fixed before the first run, and runs may overlap.
class Program {
  struct Run {
    std::int64_t images;
    std::span<const std::uintptr_t> bases;
  };
  using Step = std::function<void(const Run&)>;

 public:
  explicit Program(const Kernels& kernels) : kernels_(kernels) {}

  int add_float(const FloatTensor&);
  int add_quantized(const ActivationFormat&, const PaddedGrid&, std::int64_t offset);  // in base 0
  static std::int64_t quantized_bytes(const ActivationFormat&, const PaddedGrid&);
  std::int64_t bytes(std::int64_t images) const;
  const Kernels& kernels() const { return kernels_; }

  // Reads quantized tensor `input`, or with flattened blocks float tensor `from`.
  void convolve(const ConvSizes&, const Layer&, int from, int input, const StepOutputs&);
  // Multiplies by the channel's scale and adds its shift, where these are given, rounded once with `fma`, else twice;
  // then multiplies by `gate`, a tensor of the same size or of one pixel, where it is not -1.
  void map(int from, const float* scale, const float* shift, bool fma, int gate, const StepOutputs&);
  // Averages every channel of an image, in the order of PyTorch's vectors of `lanes`.
  void average(int from, int lanes, int to);
  // Turns all values of an image into channels of one pixel, those of a channel one after another.
  void flatten(int from, int to);
  // Moves factor * factor channels to each channel's pixels, as pixel_shuffle of PyTorch does.
  void shuffle(int from, int factor, int to);
  void pool(int from, const PoolWindow&, std::int64_t out_height, std::int64_t out_width, const StepOutputs&);
  // Adds a step that the caller takes.
  void skip() {
    steps_.push_back([](const Run&) {});
  }

  // Adds the time of each step to seconds[step], unless that is null.
  void run(std::int64_t images, std::span<const std::uintptr_t> bases, int first, int last, double* seconds) const;

 private:
  struct QuantizedSlot {
    ActivationFormat format;
    PaddedGrid grid;  // of the frames of one image
    std::int64_t offset;
  };

  const FloatTensor& float_tensor(int id) const;
  const QuantizedSlot& quantized_slot(int id) const;
  std::uintptr_t base(const Run&, int number) const;
  float* address(const Run&, const FloatTensor&) const;
  Input input(const Run&, int id) const;
  Output output(const Run&, const StepOutputs&, std::span<const QuantizedTarget>) const;
  QuantizedTensor quantized(const Run&, int id) const;
  std::vector<QuantizedTarget> targets(const Run&, const StepOutputs&, std::int64_t channels) const;
  void check(const StepOutputs&, std::int64_t channels, std::int64_t height, std::int64_t width, bool whole) const;
  void quantize_whole(const FloatTensor&, const StepOutputs&);

  const Kernels& kernels_;
  std::vector<FloatTensor> floats_;
  std::vector<QuantizedSlot> quantized_;
  std::vector<Step> steps_;
  std::int64_t bytes_ = 0;
  std::int64_t largest_ = 1;  // bytes an image of the largest of all memories
  int bases_ = 1;
};

}  // namespace dsconv
