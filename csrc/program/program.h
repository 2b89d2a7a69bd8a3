// A network as a list of steps on tensors in one memory block.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <span>
#include <utility>
#include <vector>

#include "../conv/joined.h"

namespace dsconv {

// A float tensor: its address is base address number `base` plus `offset` bytes per image plus `first` values, and
// `strides.image` separates images. The frames of a 3-D tensor are stacked vertically.
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

// The destinations of a step's outputs, and its post-ops; -1 means no tensor.
struct StepOutputs {
  int values;
  int residual;                                       // added before the activation
  std::vector<std::pair<int, std::int64_t>> targets;  // quantized tensors, and the index of the first channel in each
  ActivationSettings activation;
};

// An operation of a map. Its operand is a tensor with all channels or with one, per pixel or per image; or constants per
// channel; or the alpha of `activation`, which is also the epsilon of layer norm.
struct MapOperation {
  Operation operation;
  ActivationSettings activation;
  int tensor;  // or -1
  const float *constants, *offset;
};

// Windows of a pooling.
struct PoolWindow {
  std::int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  bool average, count_padding;
  std::int64_t divisor;  // of an average; 0: the number of values, including counted padding
};

// A loop that moves values of an image: its size, and its strides in the tensors that are read and written, each in
// channels, rows and columns.
struct Loop {
  std::int64_t size;
  std::array<std::int64_t, 3> read, written;
};

// Rows or columns from `begin` to before `end`.
struct Span {
  std::int64_t begin, end;
};

// A position between two rows or columns, and their weights.
struct Between {
  std::int64_t one, other;
  float weight, other_weight;
};

// Tensors are identified by numbers. Base 0 is memory of bytes(images) bytes, aligned to 64 bytes and exclusive to a run;
// steps are fixed before the first run, and runs may be concurrent.
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

  // Reads quantized tensor `input`, or float tensor `from` for flattened blocks.
  void convolve(const ConvSizes&, const Layer&, int from, int input, const StepOutputs&);
  // Fuses the last step, a depthwise layer of float activations or a pooling, with the layer before it, whose outputs no
  // other step reads: these are not written to memory.
  void join();
  // Applies operations one after another.
  void map(int from, const std::vector<MapOperation>&, const StepOutputs&);
  // Averages every channel of an image, in the summation order of PyTorch's vectors of `lanes`.
  void average(int from, int lanes, int to);
  // Computes the means and scales of group norm (MomentsArgs), each a tensor of one pixel.
  void moments(int from, std::int64_t groups, const float* weight, float epsilon, int mean, int scale);
  // Flattens all values of an image to channels of one pixel, channel by channel.
  void flatten(int from, int to);
  // Copies every value of an image to its position in the result, by nested loops, the outermost first.
  void rearrange(int from, const std::vector<Loop>&, int to);
  // Copies pixels: a pixel of the result is that of this row and column of the input, or `fill` if either is -1.
  void pick(int from, const std::vector<std::int64_t>& rows, const std::vector<std::int64_t>& columns, float fill,
            const StepOutputs&);
  // Interpolates between rows and columns of the input: channels before `split` use one order of sums, others another.
  void interpolate(int from, const std::vector<Between>& rows, const std::vector<Between>& columns, std::int64_t split,
                   Interpolation first, Interpolation rest, const StepOutputs&);
  // Averages windows of rows and columns. A sum is divided by the number of pixels if `at_once`, otherwise by the number
  // of rows and then by the number of columns.
  void average_windows(int from, const std::vector<Span>& rows, const std::vector<Span>& columns, bool at_once, const StepOutputs&);
  void pool(int from, const PoolWindow&, std::int64_t out_height, std::int64_t out_width, const StepOutputs&);
  // Adds a step that the caller executes.
  void skip() {
    steps_.push_back([](const Run&) {});
  }

  // Adds the time of each step to seconds[step] unless `seconds` is null.
  void run(std::int64_t images, std::span<const std::uintptr_t> bases, int first, int last, double* seconds) const;

 private:
  struct QuantizedSlot {
    ActivationFormat format;
    PaddedGrid grid;  // of the frames of one image
    std::int64_t offset;
  };

  struct LayerStep {
    ConvSizes g;  // of one image
    Layer l;
    int from, input;
    StepOutputs to;
    std::size_t step;
  };
  // A step that can be fused with the layer that computes its input.
  struct Joinable {
    int from;
    std::size_t step;
    std::function<void(const Run&, const FirstLayer&)> together;
  };

  // Writes the pixels of one line of outputs, with stride `stride`, from the image at `values`.
  using Line = std::function<void(const float* values, std::int64_t y, float* to, std::int64_t stride)>;
  void add_lines(const FloatTensor&, std::int64_t out_height, std::int64_t out_width, const StepOutputs&, Line);
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
  std::vector<LayerStep> layers_;
  std::vector<Joinable> joinable_;
  std::int64_t bytes_ = 0;
  std::int64_t largest_ = 1;  // bytes per image of the largest memory
  int bases_ = 1;
};

}  // namespace dsconv
